"""The folder that the Job's four containers share, and what lies where in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perch_exporter.contract import CHECKPOINT, StepSeconds, Summary

MODEL = "model.onnx"
MODEL_DATA = "model.onnx.data"
"""The weights, where they are many; the model names it, so it lies beside it under this very name."""
GOLDEN = "golden.npz"
OTHER = "other.npz"
"""Samples of another size, where sizes are dynamic, and the checkpoint's answers to them."""
CALIBRATED = "calibrated.npz"
"""The checkpoint's answers to the calibration set."""
ANSWERS = "answers.npy"
"""The checkpoint's first answers to the labelled data set."""
REFERENCE = "reference.json"

FIGURES = "figures.json"
PICTURES = "pictures.npz"
"""Only where the version takes pictures."""
REPORT = "report.html"
PLAN = "model.plan"
PLAN_FIGURES = "plan.json"
TIMING = "timing.cache"
"""TensorRT's, where the build leaves one."""


def timing_file(version: str, capability: str) -> str:
    """What fetch brings of former builds by this TensorRT on such a GPU is called so."""
    return f"{version}-{capability}.cache"


@dataclass(frozen=True)
class Workspace:
    """fetch writes `checkpoint` and `state`, convert reads them and writes `output`, prove writes `proof`, build writes `plan`,
    publish only reads.

    Each is a mount of its own in the pod; convert, which runs on other people's bytes, can write to `output` alone.
    """

    root: Path

    @property
    def checkpoint(self) -> Path:
        return self.object(CHECKPOINT)

    def object(self, name: str) -> Path:
        """Where fetch puts the object that the request calls so (`ExportRequest.objects`)."""
        return self.root / "checkpoint" / name

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def timings(self) -> Path:
        """What fetch found of former builds, for build."""
        return self.state / "timing"

    @property
    def output(self) -> Path:
        return self.root / "output"

    @property
    def proof(self) -> Path:
        return self.root / "proof"

    @property
    def plan(self) -> Path:
        return self.root / "plan"

    def published(self) -> Summary | None:
        """What fetch found to be in the repository already: then there is nothing left to do."""
        path = self.state / "published.json"
        return Summary.from_json(path.read_bytes()) if path.exists() else None

    def write_published(self, summary: Summary) -> None:
        self._write_state("published.json", summary.to_json())

    def fetch_seconds(self) -> float | None:
        path = self.state / "seconds.json"
        return StepSeconds.from_json(path.read_bytes()).fetch if path.exists() else None

    def write_fetch_seconds(self, seconds: float) -> None:
        self._write_state("seconds.json", StepSeconds(fetch=round(seconds, 3)).to_json())

    def _write_state(self, name: str, text: str) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / name).write_text(text)
