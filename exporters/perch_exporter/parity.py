"""The parity gate: does the artefact answer as the checkpoint does? Pure numpy; convert, publish and golden all ask it.

The rule. For each output, over N samples, in double precision:

- The *spread* is how far the checkpoint's own answers lie apart: the largest range over the samples of any one element.
- The *relative error* is the largest |artefact − checkpoint| divided by the spread. It must be at most the
  relativeTolerance. An error as a share of the answer itself would prove nothing: on random weights mobilenet answers
  1e-16 and inception_v3 1e8, and both must be judged by whether the answer still depends on the input in the same way.
- The *absolute error* is that largest difference itself. It must be at most absoluteTolerance × max(1, spread): the
  tolerance as it stands for answers of ordinary size, and in units of the spread for larger ones.
- The gate is *Unprovable* where the answers to different samples are too alike: where the spread is itself little more
  than FP32's rounding at the answers' size (64 ε max|answer|), or where the error is above the relativeTolerance but
  within that rounding (16 ε max|answer|). Agreement would then prove nothing, and disagreement neither. Answers that all
  lie from 0 to 1 are rounded as 1 is: sigmoid and softmax are computed so (onnxruntime's sigmoid is half an ε off at 1e-5).
- Where an output is the very same for every sample (a table of anchors) its size stands for the spread, and it proves
  nothing: another output has to.
- NaN or Inf on either side fails.
- Integers and truth values are the checkpoint's or they are not: the *relative error* is the share of elements that
  differ. It must be at most relativeTolerance. Where they are the same for every sample they prove nothing either.
- Rounding is that of the output's own type: an FP16 answer can prove less than one of FP32.

- *Top-1 agreement* is the share of samples for which both put the same class first (outputs of two dimensions, at least two
  columns). It must be at least minimumTop1Agreement, where there is one. In FP32 and FP16 there is none unless the user sets
  it: the golden samples are made up, and a tie on meaningless inputs is no fault.
- The *cosine* is the smallest, over the samples, between the checkpoint's vector (all numbers of the output for one sample) and
  the artefact's. It must be at least minimumCosine, where there is one: for features, which are searched by direction, while one
  element with a wide spread lets all the others be wrong within the bounds above. Both vectors are taken from the centre of the
  checkpoint's: features behind a ReLU all lie in one corner, and what they have in common makes any two alike (Mu and Viswanath,
  "All-but-the-Top", ICLR 2018, remove it for the same reason). Of an untrained resnet18 in INT8 the cosine is 0.98 so, and 0.9998
  from zero. The centre is the checkpoint's for both sides: an offset of the artefact counts. A vector nearer to the centre than a
  tenth of what is usual (root of the mean square) has no direction to be kept, and is left out.

Of *detections* (boxes, labels and scores, where the tolerance has a minimumIou) rows have no place of their own, so another rule
stands for the three together. Each detection has a partner on the other side, as `perch_exporter.detections` says which:

- The *relative error* is the share of detections without one, of both sides. It must be at most relativeTolerance.
- The *absolute error* is the largest difference between partners' scores. It must be at most absoluteTolerance.
- The *spread* is the relative error that the checkpoint's own answers have against those to the next sample. The gate is
  Unprovable where it is below a tenth or below twice the relativeTolerance, and where there is no detection to be judged.

The tolerances are the request's; where it says nothing they are those of the precision: 1e-3 for FP32, 5e-2 for FP16, 0.25 and
an agreement of 0.9 for INT8; for the features of a layer, in place of the agreement, a cosine of 0.999, 0.99 and 0.95; of
detections 1e-2 may be without a partner. With 256 levels for every tensor the single largest
error over all samples and classes is no fine measure, and 0.25 of the spread only tells a network from another; the agreement,
on real samples, tells the rest.

The answers to compare with are the checkpoint's own at every precision, here and beside every Triton: an artefact tied to its
own former answers would hide how far it has left the network that was trained. So that a sound INT8 artefact passes on every
device, its golden samples are those of the calibration set of which the checkpoint is surest, class by class; devices round
differently by one level here and there, which decides close calls, and close calls are judged in prove alone, over all
calibration samples.

With several outputs and batch sizes the worst figures stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from perch_exporter import detections
from perch_exporter.contract import Parity, ParityTolerance, Verdict
from perch_exporter.samples import Array, Tensors

_ROUNDING = 16
_LEAST_SPREAD = 64
"""In units of the type's epsilon."""
_ALIKE = "too alike to prove anything; real samples (verification.parity.samples), which the network tells apart, may prove it"
_NEAR_CENTRE = 0.1
_LEAST_APART = 0.1
"""Of the detections in a sample, the share that others do not have."""


@dataclass(frozen=True)
class Answers:
    """What checkpoint (`reference`) and artefact (`actual`) said to the same samples; `batch` is for the message."""

    reference: Tensors
    actual: Tensors
    batch: str


@dataclass(frozen=True)
class _Judgement:
    verdict: Verdict
    message: str
    absolute: float = 0.0
    relative: float = 0.0
    spread: float = 0.0
    top1: float | None = None
    cosine: float | None = None
    proves: bool = True


def judge(cases: Sequence[Answers], tolerance: ParityTolerance) -> Parity:
    """The worst verdict over all cases and outputs, with the worst figures. `cases` holds at least one output."""
    all_of_them = [judgement for case in cases for judgement in _judge_case(case, tolerance)]
    order = (Verdict.PASSED, Verdict.UNPROVABLE, Verdict.FAILED)
    worst = max(all_of_them, key=lambda judgement: (order.index(judgement.verdict), judgement.proves, judgement.relative))
    if not any(judgement.proves for judgement in all_of_them):
        worst = replace(worst, verdict=Verdict.UNPROVABLE)
    furthest = max(all_of_them, key=lambda judgement: judgement.absolute)
    relative = max(judgement.relative for judgement in all_of_them)
    agreements = [judgement.top1 for judgement in all_of_them if judgement.top1 is not None]
    cosines = [judgement.cosine for judgement in all_of_them if judgement.cosine is not None]
    return Parity(
        verdict=worst.verdict,
        message=worst.message,
        samples=max(len(array) for case in cases for array in case.reference.values()),
        max_absolute_error=_finite(furthest.absolute),
        spread=_finite(furthest.spread),
        max_relative_error=_finite(relative),
        top1_agreement=min(agreements) if agreements else None,
        cosine=min(cosines) if cosines else None,
    )


def within(parity: Parity, tolerance: ParityTolerance) -> bool:
    """Whether the figures by themselves pass: for figures that somebody else wrote down."""
    absolute, relative, extent = parity.max_absolute_error, parity.max_relative_error, parity.spread
    if absolute is None or relative is None or extent is None:
        return False
    agrees = parity.top1_agreement is None or parity.top1_agreement >= tolerance.top1
    if tolerance.minimum_cosine is not None:
        agrees = agrees and parity.cosine is not None and parity.cosine >= tolerance.cosine
    return agrees and relative <= tolerance.relative and absolute <= _allowed(extent, tolerance)


def _allowed(extent: float, tolerance: ParityTolerance) -> float:
    return tolerance.absolute * max(1.0, extent)


def _finite(figure: float) -> float | None:
    return figure if np.isfinite(figure) else None


def _judge_case(case: Answers, tolerance: ParityTolerance) -> list[_Judgement]:
    if tolerance.minimum_iou is None:
        return [_judge_output(name, reference, case, tolerance) for name, reference in case.reference.items()]
    strange = (_strange(name, reference, case) for name, reference in case.reference.items())
    return [next((found for found in strange if found), None) or _judge_detections(case, tolerance)]


def _strange(name: str, reference: Array, case: Answers) -> _Judgement | None:
    """Answers that are not even of one kind."""
    actual = case.actual.get(name)
    if actual is None or actual.shape != reference.shape:
        answer = "is missing" if actual is None else f"has shape {list(actual.shape)}"
        words = f"{name} {answer}, the checkpoint's has {list(reference.shape)} ({case.batch})"
        return _Judgement(Verdict.FAILED, words, np.inf, np.inf)
    if actual.dtype != reference.dtype:
        words = f"{name} is {actual.dtype}, the checkpoint's is {reference.dtype} ({case.batch})"
        return _Judgement(Verdict.FAILED, words, np.inf, np.inf)
    if not np.issubdtype(reference.dtype, np.floating):
        return None
    for whose, array in (("the checkpoint's", reference), ("the artefact's", actual)):
        if not np.isfinite(array).all():
            words = f"{whose} {name} holds NaN or Inf ({case.batch})"
            return _Judgement(Verdict.FAILED, words, np.inf, np.inf)
    return None


def _judge_detections(case: Answers, tolerance: ParityTolerance) -> _Judgement:
    overlap = float(tolerance.minimum_iou or 0)
    found = detections.compare(case.reference, case.actual, tolerance.absolute, overlap)
    next_one = {name: np.roll(array, 1, axis=0) for name, array in case.reference.items()}
    apart = detections.compare(case.reference, next_one, tolerance.absolute, overlap).share_alone
    words = (
        f"detections: {found.alone} of {found.asked} have no partner of the same label with an overlap of {overlap:g} "
        f"(allowed {tolerance.relative_tolerance} of them), partners' scores differ by at most {found.score_error:.2g} "
        f"(allowed {_allowed(apart, tolerance):.2g}), {case.batch}"
    )
    verdict = Verdict.PASSED
    if found.share_alone > tolerance.relative or found.score_error > _allowed(apart, tolerance):
        verdict = Verdict.FAILED
    elif found.asked == 0:
        verdict = Verdict.UNPROVABLE
        words = (
            "detections: the checkpoint finds nothing for certain in the samples; real ones (verification.parity.samples) may "
            "show more"
        )
    elif apart < max(_LEAST_APART, 2 * tolerance.relative):
        verdict = Verdict.UNPROVABLE
        words += f"; the checkpoint finds the same in different samples, but for {apart:.2g}, {_ALIKE}"
    return _Judgement(verdict, words, found.score_error, found.share_alone, apart)


def _judge_output(name: str, reference: Array, case: Answers, tolerance: ParityTolerance) -> _Judgement:
    if strange := _strange(name, reference, case):
        return strange
    actual = case.actual[name]
    if not np.issubdtype(reference.dtype, np.floating):
        return _judge_integers(name, reference, actual, case, tolerance)
    absolute = max((_furthest(*pair) for pair in zip(reference, actual, strict=True)), default=0.0)
    extent, size = spread(reference), float(np.abs(reference).max(initial=0.0))
    if extent == 0:
        return _judge_constant(name, absolute, size, case, tolerance)
    epsilon = float(np.finfo(reference.dtype).eps)
    if extent <= _LEAST_SPREAD * epsilon * size:
        words = f"{name}: the checkpoint's answers to different inputs lie only {extent:.2g} apart at a size of {size:.2g}"
        return _Judgement(Verdict.UNPROVABLE, f"{words}, {_ALIKE}", absolute, spread=extent)
    relative = absolute / extent
    top1 = _top1(reference, actual)
    cosine = None if tolerance.minimum_cosine is None else _cosine(reference.astype(np.float64), actual.astype(np.float64))
    words = (
        f"{name}: largest error {absolute:.2g} (allowed {_allowed(extent, tolerance):.2g}), "
        f"{relative:.2g} of the answers' spread of {extent:.3g} (allowed {tolerance.relative_tolerance}), {case.batch}"
    )
    if top1 is not None and tolerance.minimum_top1_agreement is not None:
        words += f", the same class first for {top1:.3g} of them (at least {tolerance.minimum_top1_agreement})"
    if cosine is not None:
        words += f", the smallest cosine {cosine:.4g} (at least {tolerance.minimum_cosine})"
    agrees = (top1 is None or top1 >= tolerance.top1) and (cosine is None or cosine >= tolerance.cosine)
    verdict = Verdict.FAILED
    if agrees and relative <= tolerance.relative and absolute <= _allowed(extent, tolerance):
        verdict = Verdict.PASSED
    elif absolute <= _ROUNDING * epsilon * (1.0 if _are_shares(reference, actual) else size):
        verdict = Verdict.UNPROVABLE
        words += (
            f"; {reference.dtype} itself rounds by as much, so these answers are too alike to prove more: samples with clearly "
            "different answers (verification.parity.samples) prove it, or a relativeTolerance above "
            f"{relative:.2g} asks for no more than rounding allows"
        )
    return _Judgement(verdict, words, absolute, relative, extent, top1, cosine)


def _judge_constant(name: str, absolute: float, size: float, case: Answers, tolerance: ParityTolerance) -> _Judgement:
    """An output that is the very same for every sample, as a table of anchors is."""
    relative = absolute / size if size else absolute
    right = relative <= tolerance.relative and absolute <= _allowed(size, tolerance)
    words = (
        f"{name}: largest error {absolute:.2g} (allowed {_allowed(size, tolerance):.2g}), {relative:.2g} of the answers' size of "
        f"{size:.3g} (allowed {tolerance.relative_tolerance}), {case.batch}; "
        f"the checkpoint answers the same to every input, {_ALIKE}"
    )
    return _Judgement(Verdict.PASSED if right else Verdict.FAILED, words, absolute, relative, size, proves=False)


def _judge_integers(name: str, reference: Array, actual: Array, case: Answers, tolerance: ParityTolerance) -> _Judgement:
    differing = float((reference != actual).mean()) if reference.size else 0.0
    words = f"{name}: {differing:.2g} of the elements differ (allowed {tolerance.relative_tolerance}), {case.batch}"
    if differing > tolerance.relative:
        return _Judgement(Verdict.FAILED, words, relative=differing)
    if (reference == reference[:1]).all():
        words = f"{name}: the checkpoint answers the same to every input, {_ALIKE}"
        return _Judgement(Verdict.PASSED, words, relative=differing, proves=False)
    return _Judgement(Verdict.PASSED, words, relative=differing)


def _are_shares(*answers: npt.NDArray[np.floating]) -> bool:
    """Whether all lie from 0 to 1, as what comes of a sigmoid or a softmax does."""
    return all(float(array.min(initial=0.0)) >= 0 and float(array.max(initial=0.0)) <= 1 for array in answers)


def spread(answers: npt.NDArray[np.floating]) -> float:
    """How far answers to different samples lie apart; the first axis is the sample's."""
    highest, lowest = (extreme(answers, axis=0).astype(np.float64) for extreme in (np.max, np.min))
    return float((highest - lowest).max(initial=0.0))


def _furthest(reference: npt.NDArray[np.floating], actual: npt.NDArray[np.floating]) -> float:
    """The largest difference in one sample, in double precision. Of all samples at once it would take 16 times an FP16 answer's
    memory, and the containers that judge are small."""
    return float(np.abs(reference.astype(np.float64) - actual.astype(np.float64)).max(initial=0.0))


def _top1(reference: npt.NDArray[np.floating], actual: npt.NDArray[np.floating]) -> float | None:
    if reference.ndim != 2 or reference.shape[1] < 2:
        return None
    return float((reference.argmax(axis=1) == actual.argmax(axis=1)).mean())


def _cosine(reference: npt.NDArray[np.float64], actual: npt.NDArray[np.float64]) -> float | None:
    """Of answers that lie apart at all: at least one of them is far from the centre."""
    ours, theirs = (array.reshape(len(array), -1) - reference.mean(axis=0).ravel() for array in (reference, actual))
    if ours.shape[1] < 2:
        return None
    far = np.linalg.norm(ours, axis=1)
    clear = far > _NEAR_CENTRE * np.sqrt((far**2).mean())
    lengths = (far * np.linalg.norm(theirs, axis=1))[clear]
    products = (ours * theirs).sum(axis=1)[clear]
    cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return float(cosines.clip(-1, 1).min())
