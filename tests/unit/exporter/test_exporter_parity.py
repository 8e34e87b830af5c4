"""The parity rule: judged against the answers' spread, with what proves nothing called so."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from exporter_builders import request
from hypothesis import given, settings
from hypothesis import strategies as st

from perch_exporter.contract import ParityTolerance, Verdict
from perch_exporter.parity import Answers, judge, within

RANDOM = np.random.default_rng(1)
LOGITS = RANDOM.standard_normal((8, 10)).astype(np.float32)
DEFAULT = ParityTolerance()


def answers(reference: np.ndarray, actual: np.ndarray) -> Answers:
    return Answers({"logits": reference.astype(np.float32)}, {"logits": actual.astype(np.float32)}, "in one batch")


def noise(size: float) -> np.ndarray:
    return size * np.sign(LOGITS)


def one(index: tuple[int, int], value: float) -> np.ndarray:
    changed = LOGITS.copy()
    changed[index] = value
    return changed


CASES = [
    ("equal answers pass", LOGITS, LOGITS, Verdict.PASSED),
    ("an error of FP32's rounding passes", LOGITS, LOGITS + noise(1e-6), Verdict.PASSED),
    ("an error above both tolerances fails", LOGITS, LOGITS + noise(1e-2), Verdict.FAILED),
    ("one wrong element of all fails", LOGITS, one((3, 4), 0.9), Verdict.FAILED),
    ("huge answers pass with a proportionate error", LOGITS * 1e8, (LOGITS + noise(1e-6)) * 1e8, Verdict.PASSED),
    ("huge answers fail with a disproportionate error", LOGITS * 1e8, (LOGITS + noise(1e-2)) * 1e8, Verdict.FAILED),
    ("tiny answers pass with a proportionate error", LOGITS * 1e-16, (LOGITS + noise(1e-6)) * 1e-16, Verdict.PASSED),
    ("tiny answers that are all wrong fail, far below any absolute tolerance", LOGITS * 1e-16, -LOGITS * 1e-16,
     Verdict.FAILED),
    ("zeros where answers should be fail", LOGITS * 1e-16, LOGITS * 0, Verdict.FAILED),
    ("answers all zero prove nothing", LOGITS * 0, LOGITS * 0, Verdict.UNPROVABLE),
    ("the same answer to every sample proves nothing", np.ones((8, 10)), np.ones((8, 10)), Verdict.UNPROVABLE),
    ("answers that differ in their last bits prove nothing", 1 + LOGITS * 1e-6, 1 + LOGITS * 1e-6, Verdict.UNPROVABLE),
    ("a disagreement within rounding, where answers are alike, proves nothing", 1 + LOGITS * 1e-4,
     1 + LOGITS * 1e-4 + noise(1.2e-6), Verdict.UNPROVABLE),
    ("alike answers that are clearly wrong fail", 1 + LOGITS * 1e-4, 1.1 + LOGITS * 1e-4, Verdict.FAILED),
    ("a single sample proves nothing", LOGITS[:1], LOGITS[:1], Verdict.UNPROVABLE),
    ("NaN from the artefact fails", LOGITS, one((0, 0), np.nan), Verdict.FAILED),
    ("Inf from the artefact fails", LOGITS, one((0, 0), np.inf), Verdict.FAILED),
    ("NaN from both fails", one((0, 0), np.nan), one((0, 0), np.nan), Verdict.FAILED),
    ("another shape fails, even one that would broadcast", LOGITS, LOGITS[:, :1], Verdict.FAILED),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "actual", "verdict"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_that(reference: np.ndarray, actual: np.ndarray, verdict: Verdict) -> None:
    parity = judge([answers(reference, actual)], DEFAULT)
    assert parity.verdict is verdict
    assert parity.message
    assert within(parity, DEFAULT) == (verdict is Verdict.PASSED) or verdict is Verdict.UNPROVABLE


def test_a_missing_output_fails() -> None:
    assert judge([Answers({"logits": LOGITS}, {}, "")], DEFAULT).verdict is Verdict.FAILED


def test_the_worst_case_and_the_worst_output_stand_for_all() -> None:
    good, bad = answers(LOGITS, LOGITS), answers(LOGITS, LOGITS + noise(1e-2))
    assert judge([good, bad, good], DEFAULT).verdict is Verdict.FAILED
    two = Answers({"a": LOGITS, "b": LOGITS}, {"a": LOGITS, "b": -LOGITS}, "")
    parity = judge([two], DEFAULT)
    assert parity.verdict is Verdict.FAILED
    assert parity.message.startswith("b:")
    assert parity.top1_agreement == 0


def test_a_tight_absolute_tolerance_holds_for_answers_of_ordinary_size() -> None:
    actual = LOGITS * 0.1 + noise(2e-5)
    assert judge([answers(LOGITS * 0.1, actual)], DEFAULT).verdict is Verdict.PASSED
    assert judge([answers(LOGITS * 0.1, actual)], ParityTolerance(absolute_tolerance="1e-5")).verdict is Verdict.FAILED


def test_both_figures_and_the_agreement_are_told() -> None:
    parity = judge([answers(LOGITS, LOGITS + noise(1e-4))], DEFAULT)
    extent = float(np.ptp(LOGITS.astype(np.float64), axis=0).max())
    assert parity.max_absolute_error == pytest.approx(1e-4, rel=1e-2)
    assert parity.max_relative_error == pytest.approx(1e-4 / extent, rel=1e-2)
    assert parity.spread == pytest.approx(extent)
    assert (parity.samples, parity.top1_agreement) == (8, 1.0)


def test_figures_that_are_not_finite_are_absent_and_do_not_pass() -> None:
    parity = judge([answers(LOGITS, one((0, 0), np.inf))], DEFAULT)
    assert parity.max_absolute_error is None
    assert not within(parity, DEFAULT)


@settings(deadline=None)  # the machine may be busy
@given(scale=st.floats(1e-16, 1e8), error=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
def test_the_relative_verdict_does_not_depend_on_the_answers_scale(scale: float, error: float) -> None:
    """Outputs of an untrained mobilenet and of an untrained inception_v3 are judged alike."""
    parity = judge([answers(LOGITS * scale, (LOGITS + noise(error)) * scale)], DEFAULT)
    assert parity.verdict is (Verdict.PASSED if error < 1e-3 else Verdict.FAILED)


# --- features ----------------------------------------------------------------------------------------------------------------

FEATURES = 3 + np.random.default_rng(2).standard_normal((64, 512))
"""As behind a ReLU: all in one corner, where any two point nearly the same way."""
CALIBRATION = {"uri": "s3://b/x.npz", "sha256": "a" * 64}
INT8 = request(architecture__layer="f6", conversion={"precision": "INT8", "calibration": CALIBRATION}).tolerance


def turned(degrees: float) -> np.ndarray:
    """Every vector turned about their centre, towards another sample's."""
    centre = FEATURES.mean(axis=0)
    angle = np.radians(degrees)
    return centre + np.cos(angle) * (FEATURES - centre) + np.sin(angle) * np.roll(FEATURES - centre, 1, axis=0)


EMBEDDINGS = [
    ("as INT8 leaves them pass", FEATURES + 0.15 * np.sign(np.roll(FEATURES, 1, axis=0) - 3), Verdict.PASSED),
    ("turned by 5 degrees pass", turned(5), Verdict.PASSED),
    ("turned by 22 degrees fail", turned(22), Verdict.FAILED),
    ("moved away from all others' corner fail", FEATURES + 0.7, Verdict.FAILED),
    ("that are the same for every sample fail", np.tile(FEATURES.mean(axis=0), (64, 1)), Verdict.FAILED),
]


@pytest.mark.parametrize(("actual", "verdict"), [c[1:] for c in EMBEDDINGS], ids=[c[0] for c in EMBEDDINGS])
def test_features(actual: np.ndarray, verdict: Verdict) -> None:
    parity = judge([answers(FEATURES, actual)], INT8)
    assert parity.verdict is verdict
    assert within(parity, INT8) is (verdict is Verdict.PASSED)
    assert parity.cosine is not None
    assert f"the smallest cosine {parity.cosine:.4g} (at least 0.95)" in parity.message


def test_a_turn_that_the_spread_allows_and_the_common_corner_hides_is_seen_by_the_centred_cosine() -> None:
    """The control: without the cosine it passes, and from zero in place of the centre it would."""
    without = judge([answers(FEATURES, turned(22))], INT8.model_copy(update={"minimum_cosine": None}))
    assert (without.verdict, without.cosine) == (Verdict.PASSED, None)
    assert not within(without, INT8), "a cosine that nobody took is none that passes"
    lengths = np.linalg.norm(FEATURES, axis=1) * np.linalg.norm(turned(22), axis=1)
    assert ((FEATURES * turned(22)).sum(axis=1) / lengths).min() > 0.98


def test_a_vector_in_the_middle_of_all_others_has_no_direction_to_be_kept() -> None:
    middle = FEATURES.copy()
    middle[0] = np.delete(middle, 0, axis=0).mean(axis=0)
    actual = middle + 0.05 * np.sign(np.roll(FEATURES, 1, axis=0) - 3)
    parity = judge([answers(middle, actual)], INT8)
    assert parity.verdict is Verdict.PASSED
    assert (parity.cosine or 0) > 0.99


def test_feature_maps_are_vectors_too_and_a_single_number_is_none() -> None:
    assert (judge([answers(FEATURES.reshape(64, 8, 8, 8), turned(22).reshape(64, 8, 8, 8))], INT8).cosine or 1) < 0.95
    assert judge([answers(FEATURES[:, :1], FEATURES[:, :1])], INT8).cosine is None


# --- whole numbers and truth values ------------------------------------------------------------------------------------------

LABELS = np.arange(2000).reshape(20, 100) % 7


def few(share: float) -> np.ndarray:
    changed = LABELS.copy()
    changed.flat[: int(share * LABELS.size)] += 1
    return changed


INTEGERS = [
    ("equal labels pass", LABELS, LABELS, Verdict.PASSED),
    ("truth values pass", LABELS > 3, LABELS > 3, Verdict.PASSED),
    ("a share of others within the tolerance passes", LABELS, few(0.001), Verdict.PASSED),
    ("a share of others above the tolerance fails", LABELS, few(0.002), Verdict.FAILED),
    ("opposite truth values fail", LABELS > 3, LABELS <= 3, Verdict.FAILED),
    ("labels as another type fail", LABELS, LABELS.astype(np.int32), Verdict.FAILED),
    ("labels as floats fail", LABELS, LABELS.astype(np.float32), Verdict.FAILED),
    ("the same labels for every sample prove nothing", LABELS * 0 + 3, LABELS * 0 + 3, Verdict.UNPROVABLE),
    ("the same labels for every sample, and others, fail", LABELS * 0 + 3, LABELS * 0 + 4, Verdict.FAILED),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "actual", "verdict"), [c[1:] for c in INTEGERS], ids=[c[0] for c in INTEGERS])
def test_of_whole_numbers(reference: np.ndarray, actual: np.ndarray, verdict: Verdict) -> None:
    parity = judge([Answers({"labels": reference}, {"labels": actual}, "")], DEFAULT)
    assert parity.verdict is verdict
    assert within(parity, DEFAULT) == (verdict is Verdict.PASSED) or verdict is Verdict.UNPROVABLE


def test_an_output_that_says_the_same_to_everything_may_stand_beside_one_that_proves() -> None:
    same = np.full((8, 1), 3)
    both = Answers({"count": same, "logits": LOGITS}, {"count": same, "logits": LOGITS}, "")
    assert judge([both], DEFAULT).verdict is Verdict.PASSED
    alone = Answers({"count": same}, {"count": same}, "")
    assert judge([alone, alone], DEFAULT).verdict is Verdict.UNPROVABLE


TABLE = np.tile(np.linspace(-3, 500, 6, dtype=np.float32), (8, 1))
TABLES = [
    ("its own table passes", LOGITS, TABLE, Verdict.PASSED),
    (
        "a table rounded as half precision rounds fails in FP32, beyond the absolute tolerance",
        LOGITS,
        TABLE + 0.25,
        Verdict.FAILED,
    ),
    ("another table fails", LOGITS, TABLE[:, ::-1], Verdict.FAILED),
    ("a table that depends on the sample fails", LOGITS, TABLE + 5 * LOGITS[:, :1], Verdict.FAILED),
    ("no table fails", LOGITS, TABLE * 0, Verdict.FAILED),
    ("its own table saves no wrong answer", -LOGITS, TABLE, Verdict.FAILED),
]


@pytest.mark.parametrize(("logits", "table", "verdict"), [c[1:] for c in TABLES], ids=[c[0] for c in TABLES])
def test_of_a_table_that_is_the_same_for_every_sample(logits: np.ndarray, table: np.ndarray, verdict: Verdict) -> None:
    tolerance = ParityTolerance(relative_tolerance="1e-4")
    both = Answers({"logits": LOGITS, "table": TABLE}, {"logits": logits, "table": table.astype(np.float32)}, "")
    parity = judge([both], tolerance)
    assert parity.verdict is verdict
    assert within(parity, tolerance) == (verdict is Verdict.PASSED)
    alone = judge([Answers({"table": TABLE}, {"table": table.astype(np.float32)}, "")], tolerance)
    assert alone.verdict is Verdict.UNPROVABLE
    assert "real samples (verification.parity.samples)" in alone.message


def shares(bias: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(LOGITS[:, :1].astype(np.float64) + bias)))


SHARES = [
    ("an error of a runtime's own sigmoid proves nothing where the network is sure of one side", -14, 4e-8, Verdict.UNPROVABLE),
    ("nor where it is sure of the other", 12, 2e-7, Verdict.UNPROVABLE),
    ("the same error passes where the answers lie apart", 0, 4e-8, Verdict.PASSED),
    ("more than rounding fails", -12, 1e-5, Verdict.FAILED),
    ("more than rounding fails on the other side", 12, 1e-5, Verdict.FAILED),
]


@pytest.mark.parametrize(("bias", "error", "verdict"), [c[1:] for c in SHARES], ids=[c[0] for c in SHARES])
def test_of_a_sigmoid(bias: float, error: float, verdict: Verdict) -> None:
    parity = judge([answers(shares(bias), (shares(bias) - error).clip(0, 1))], DEFAULT)
    assert parity.verdict is verdict, parity.message
    if verdict is Verdict.UNPROVABLE:
        assert "samples with clearly different answers (verification.parity.samples) prove it" in parity.message


def test_answers_of_a_sure_sigmoid_that_are_wrong_fail() -> None:
    assert judge([answers(shares(-8), shares(-8)[::-1])], DEFAULT).verdict is Verdict.FAILED
    tiny = LOGITS * 1e-8
    assert judge([answers(tiny, -tiny)], DEFAULT).verdict is Verdict.FAILED, "tiny numbers of both signs are no shares"


def test_answers_in_half_precision_are_judged_by_its_own_rounding() -> None:
    half = LOGITS.astype(np.float16)
    off = (half + np.float16(0.004)).astype(np.float16)
    tight = ParityTolerance(absolute_tolerance="1e-4", relative_tolerance="1e-4")
    assert judge([Answers({"y": half}, {"y": off}, "")], tight).verdict is Verdict.UNPROVABLE
    assert judge([Answers({"y": half.astype(np.float32)}, {"y": off.astype(np.float32)}, "")], tight).verdict is Verdict.FAILED


SCORES = np.eye(10)[np.arange(20) % 10] + np.linspace(0, 0.1, 10)
AGREEING = ParityTolerance(absolute_tolerance="10", relative_tolerance="10", minimum_top1_agreement="0.9")


@pytest.mark.parametrize(("flipped", "verdict"), [(0, Verdict.PASSED), (2, Verdict.PASSED), (3, Verdict.FAILED)])
def test_top1_agreement_is_judged_where_a_minimum_is_given(flipped: int, verdict: Verdict) -> None:
    actual = SCORES.copy()
    actual[:flipped] = actual[:flipped, ::-1]
    parity = judge([answers(SCORES, actual)], AGREEING)
    assert parity.verdict is verdict
    assert parity.top1_agreement == 1 - flipped / 20
    assert f"{1 - flipped / 20:.3g} of them (at least 0.9)" in parity.message
    assert within(parity, AGREEING) is (verdict is Verdict.PASSED)
    assert (
        judge([answers(SCORES, actual)], ParityTolerance(absolute_tolerance="10", relative_tolerance="10")).verdict
        is Verdict.PASSED
    )


@pytest.mark.parametrize("data_type", [np.float16, np.float32, np.int64])
def test_large_answers_are_judged_in_a_small_container(data_type: type) -> None:
    """All golden samples may take 32 MiB, and publish has 512 for everything: of samples in double precision at once it took
    ten times an FP16 answer's memory."""
    reference = (RANDOM.standard_normal((8, 10**6)) * 100).astype(data_type)
    actual = reference.copy()
    tracemalloc.start()
    parity = judge([Answers({"mask": reference}, {"mask": actual}, "in one batch")], DEFAULT)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parity.verdict is Verdict.PASSED
    assert most < 4 * reference.nbytes
