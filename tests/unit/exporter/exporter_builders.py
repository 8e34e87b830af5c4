"""Documents, workspaces and stores for the exporter's unit tests. No torch here."""

from __future__ import annotations

import copy
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perch_exporter.accuracy import Tally
from perch_exporter.contract import ExportRequest, Figures, Owner, Reference
from perch_exporter.parity import Answers, judge
from perch_exporter.picture_samples import save_pictures
from perch_exporter.samples import Golden, make_inputs, save_golden
from perch_exporter.store import FileStore
from perch_exporter.workspace import FIGURES, GOLDEN, MODEL, REFERENCE, REPORT, Workspace
from perch_exporter.workspace import PICTURES as PICTURES_FILE

OWNER = Owner(cluster="test", namespace="vision", name="digits")
REVISION = "0123abcd"
STRANGER = Owner(cluster="test", namespace="vision", name="somebody-else")

_DOCUMENT: dict[str, Any] = {
    "schema": "perch.dev/export-request/v1",
    "owner": {"cluster": "test", "namespace": "vision", "name": "digits"},
    "modelName": "digits",
    "version": 1,
    "artifactRevision": REVISION,
    "checkpoint": {"uri": "s3://checkpoints/v1.pt", "format": "StateDict", "sha256": "a" * 64},
    "architecture": {"name": "lenet5", "parameters": {"numClasses": 10}},
    "inputs": [{"name": "image", "dataType": "FP32", "shape": [1, 28, 28]}],
    "outputs": [{"name": "logits", "dataType": "FP32", "shape": [10]}],
    "triton": {"maxBatchSize": 8},
    "destination": {"uri": "s3://models/prod/vision/digits/1-0123abcd"},
}


def document(**changes: Any) -> dict[str, Any]:
    """A good request as JSON's objects; `a__b=value` changes what lies at a.b."""
    content = copy.deepcopy(_DOCUMENT)
    for path, value in changes.items():
        *folders, last = path.split("__")
        place = content
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = copy.deepcopy(value)
    return content


def request(**changes: Any) -> ExportRequest:
    return ExportRequest.from_json(json.dumps(document(**changes)))


def file_request(root: Path, checkpoint: bytes | Path, **changes: Any) -> ExportRequest:
    """A request whose checkpoint and repository are folders below `root`."""
    if isinstance(checkpoint, bytes):
        path = root / "checkpoints" / "v1.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(checkpoint)
        checkpoint = path
    settings = {
        "checkpoint__uri": checkpoint.as_uri(),
        "checkpoint__sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "destination__uri": (root / "repository" / "vision" / "digits" / f"1-{REVISION}").as_uri(),
    }
    return request(**(settings | changes))


def golden(samples: int = 4) -> Golden:
    inputs = make_inputs(request().inputs, REVISION, samples)
    weights = np.random.default_rng(0).standard_normal((28 * 28, 10)).astype(np.float32)
    return Golden(inputs, {"logits": linear(inputs["image"], weights)})


def linear(image: Any, weights: Any) -> Any:
    return (image.reshape(len(image), -1) @ weights).astype(np.float32)


def hand_over(workspace: Workspace, content: Golden | None = None) -> None:
    """What a sound convert and a sound prove leave behind, with bytes in place of a model: publish does not look into it."""
    content = content or golden()
    workspace.output.mkdir(parents=True, exist_ok=True)
    (workspace.output / MODEL).write_bytes(b"onnx" * 1000)
    save_golden(content, workspace.output / GOLDEN)
    figures = {
        "parity": judge([Answers(content.outputs, content.outputs, "")], request().tolerance).model_dump(),
        "tooling": {"torch": "2.15.0+cpu", "onnx": "1.23.2", "onnxruntime": "1.31.1", "opset": 18},
        "seconds": 1.5,
        "prove_seconds": 0.5,
    }
    (workspace.output / REFERENCE).write_text(Reference(torch="2.15.0+cpu", seconds=1.5, eager_seconds=0.1).to_json())
    workspace.proof.mkdir(parents=True, exist_ok=True)
    (workspace.proof / FIGURES).write_text(Figures.model_validate(figures).to_json())
    (workspace.proof / REPORT).write_text("<!doctype html>")


def tally(samples: int, correct: int, own: int) -> Tally:
    """Of two classes: so many samples, of which artefact and checkpoint get so many right."""
    found = Tally(2)
    labels = np.zeros(samples, np.int64)
    found.add(labels, (np.arange(samples) >= correct).astype(np.int64), (np.arange(samples) >= own).astype(np.int64))
    return found


def convert_and_prove(asked: ExportRequest, workspace: Workspace) -> None:
    """Needs torch."""
    from perch_exporter.convert import convert
    from perch_exporter.prove import prove

    convert(asked, workspace)
    prove(asked, workspace)


PICTURES: dict[str, Any] = {
    "preprocessing": {"decode": "L", "resize": [28, 28]},
    "postprocessing": {"topK": 3, "softmax": True},
    "triton": {"maxBatchSize": 3, "labels": [f"digit {n}" for n in range(10)], "warmup": True, "responseCache": True},
}
"""Changes of a request that make it one for pictures."""


def hand_over_pictures(workspace: Workspace, content: Golden | None = None) -> list[bytes]:
    """What convert leaves behind of a version that takes pictures; they are told apart by their ends, and hold nothing."""
    content = content or golden()
    hand_over(workspace, content)
    pictures = [b"\xff\xd8\xff" + bytes([place]) for place in range(content.samples)]
    save_pictures(pictures, workspace.output / PICTURES_FILE)
    return pictures


def wheel_folder(root: Path) -> Path:
    """A stand-in for what the perch-artifacts image carries."""
    root.mkdir(parents=True, exist_ok=True)
    for tag in ("cp311", "cp312"):
        (root / f"pillow-13.0.0-{tag}-{tag}-manylinux_2_28_x86_64.whl").write_bytes(tag.encode())
    return root


class Killed(BaseException):
    """The process dies here: no handler of the code under test may catch it."""


class DyingStore(FileStore):
    """Dies before the n-th change, as a container does that the node kills. Keeps the order of the changes."""

    def __init__(self, root: Path, changes: int) -> None:
        super().__init__(root)
        self.left = changes
        self.done: list[str] = []

    def upload(self, source: Path, key: str) -> None:
        self._change("put " + key, lambda: super(DyingStore, self).upload(source, key))

    def write(self, key: str, content: bytes) -> None:
        self._change("put " + key, lambda: super(DyingStore, self).write(key, content))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._change("delete " + key, lambda key=key: super(DyingStore, self).delete([key]))

    def _change(self, name: str, action: Callable[[], None]) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.done.append(name)
        action()


def packed(path: Path, files: Mapping[str, str]) -> Path:
    """A zip of texts by name, as a user packs a network."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path
