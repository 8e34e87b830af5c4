"""The golden check of an ensemble: what it answers to the golden pictures, against the checkpoint's answers to their tensors.

Without postprocessing the answers are the network's own, and the parity rule judges them. Names and scores are judged by how far
the scores lie apart, each name by the score that the checkpoint gives this class: so classes of one score may change places.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perch_exporter.contract import POSTPROCESS, ParityTolerance, Verdict
from perch_exporter.ensemble import IMAGE, LABEL_NAMES, SCORES
from perch_exporter.parity import Answers, judge, spread
from perch_exporter.ranking import Ranking, rank, scores
from perch_exporter.samples import Golden
from perch_exporter.triton_config import LABELS, parse_config

Infer = Callable[[Mapping[str, Any], list[str]], dict[str, Any]]


@dataclass(frozen=True)
class PictureCheck:
    pictures: list[bytes]
    ranking: Ranking | None

    @classmethod
    def load(cls, models: Path, model: str, pictures: list[bytes]) -> PictureCheck:
        """`models`: Triton's repository."""
        back = models / (model + POSTPROCESS)
        if not back.exists():
            return cls(pictures, None)
        settings = json.loads(parse_config((back / "config.pbtxt").read_text()).parameters["ranking"].string_value)
        names = back / LABELS
        labels = names.read_text(encoding="utf-8").split("\n")[:-1] if names.exists() else []
        return cls(pictures, Ranking(softmax=settings["softmax"], top=settings["topK"], labels=labels))

    def check(self, golden: Golden, infer: Infer, largest: int, tolerance: ParityTolerance) -> str | None:
        """What is wrong, if anything."""
        for batch in sorted({1, largest}):
            if wrong := self._check(golden, infer, batch, tolerance):
                return wrong
        return None

    def _check(self, golden: Golden, infer: Infer, batch: int, tolerance: ParityTolerance) -> str | None:
        outputs = [LABEL_NAMES, SCORES] if self.ranking else list(golden.outputs)
        column = np.array(self.pictures, np.object_).reshape(-1, 1)
        parts = [infer({IMAGE: column[start : start + batch]}, outputs) for start in range(0, len(column), batch)]
        answers = {name: np.concatenate([part[name] for part in parts]) for name in outputs}
        if self.ranking is None:
            parity = judge([Answers(golden.outputs, answers, f"pictures in batches of {batch}")], tolerance)
            return None if parity.verdict is Verdict.PASSED else parity.message
        (logits,) = golden.outputs.values()
        allowed = tolerance.absolute * max(1.0, spread(logits))
        return _compare(self.ranking, logits, answers[LABEL_NAMES], answers[SCORES], allowed)


def _compare(ranking: Ranking, logits: Any, names: Any, found: Any, allowed: float) -> str | None:
    _, expected = rank(logits, ranking)
    if found.shape != expected.shape or names.shape != expected.shape:
        return f"{SCORES} has shape {list(found.shape)} and {LABEL_NAMES} {list(names.shape)}, not {list(expected.shape)}"
    error = float(np.abs(found - expected).max())
    if not error <= allowed:
        return f"{SCORES}: largest error {error:.2g} (allowed {allowed:.2g})"
    values, classes = scores(logits, ranking), np.array([ranking.name(index).encode() for index in range(logits.shape[1])])
    for place, (row, said) in enumerate(zip(values, names, strict=True)):
        for name, score in zip(said, found[place], strict=True):
            if not (np.abs(row[classes == name] - score) <= allowed).any():
                return (
                    f"picture {place} is called {name.decode(errors='replace')!r} with a score of {score:.3g}, which is another's"
                )
    return None
