"""The accuracy gate: how many samples of a labelled set get their own label as the first answer. Pure numpy.

Top-1: the class with the largest figure of the first output, the first one where several are equal. Checkpoint and artefact are
asked for the same samples, so the drop between them is what the export cost, and not what the data set happens to be.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from perch_exporter.contract import Accuracy, AccuracyGate, Confused, Verdict

_PAIRS = 20

Classes = npt.NDArray[np.int64]


class Tally:
    """Counts batch by batch: a data set may be larger than memory."""

    def __init__(self, classes: int) -> None:
        self.samples = self.checkpoint_correct = 0
        self.of_class, self.correct_of_class = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
        self._confused: Counter[tuple[int, int]] = Counter()

    @property
    def correct(self) -> int:
        return int(self.correct_of_class.sum())

    def add(self, labels: Classes, artifact: Classes, checkpoint: Classes) -> None:
        """The labels of some samples, and the first answers of both; int64 [N] each, from 0 to below `classes`."""
        right = artifact == labels
        self.samples += len(labels)
        self.checkpoint_correct += int((checkpoint == labels).sum())
        self.of_class += np.bincount(labels, minlength=len(self.of_class))
        self.correct_of_class += np.bincount(labels[right], minlength=len(self.of_class))
        self._confused.update(zip(labels[~right].tolist(), artifact[~right].tolist(), strict=True))

    def worst(self) -> tuple[Confused, ...]:
        ordered = sorted(self._confused.items(), key=lambda pair: (-pair[1], pair[0]))[:_PAIRS]
        return tuple(Confused(label=label, predicted=predicted, count=count) for (label, predicted), count in ordered)


def judge_accuracy(tally: Tally | Accuracy, gate: AccuracyGate) -> Accuracy:
    """The figures with a verdict; also of figures that somebody else wrote down, whose verdict does not count.

    The limits are compared as decimals over whole samples: 95 of 100 is "0.95", not a hair less.
    """
    total, correct, own = Decimal(tally.samples), Decimal(tally.correct), Decimal(tally.checkpoint_correct)
    words = f"accuracy {correct / total:.4f} on {tally.samples:,} samples, the checkpoint's is {own / total:.4f}"
    faults = []
    if gate.minimum is not None and correct < Decimal(gate.minimum) * total:
        faults.append(f"{Decimal(gate.minimum) - correct / total:.4f} below the minimum of {gate.minimum}")
    if gate.maximum_drop is not None and own - correct > Decimal(gate.maximum_drop) * total:
        faults.append(f"a drop of {(own - correct) / total:.4f}, allowed is {gate.maximum_drop}")
    return Accuracy(
        verdict=Verdict.FAILED if faults else Verdict.PASSED,
        message=f"{words}: {' and '.join(faults)}" if faults else words,
        dataset_sha256=gate.dataset.sha256,
        samples=tally.samples,
        correct=tally.correct,
        checkpoint_correct=tally.checkpoint_correct,
        confused=tally.worst() if isinstance(tally, Tally) else tally.confused,
        minimum=gate.minimum,
        maximum_drop=gate.maximum_drop,
    )
