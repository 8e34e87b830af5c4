"""The trained checkpoints of the demo, and what training said about them; made by `python -m demo.train`."""

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
METRICS = FOLDER / "metrics.json"


@dataclass(frozen=True)
class Record:
    """What training said about one version."""

    epochs: int
    sha256: str
    """Of the checkpoint's file."""
    accuracy: float
    """On the held-out images, 0 to 1."""
    predictions: str
    """The digit that the checkpoint itself answers for each held-out image, in their order."""


def path(version: int) -> Path:
    return FOLDER / f"v{version}.pt"


def records() -> dict[int, Record]:
    """By version."""
    return {
        entry["version"]: Record(entry["epochs"], entry["sha256"], entry["heldOutAccuracy"], entry["heldOutPredictions"])
        for entry in json.loads(METRICS.read_text())["versions"]
    }
