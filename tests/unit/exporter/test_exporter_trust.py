"""Pickles that run code: what `checkpoint.trustSource` lets through, and that nothing goes through without it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import convert_and_prove, file_request, packed, request
from pydantic import ValidationError

from perch_exporter.contract import CheckpointFormat, Outcome, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.workspace import MODEL, Workspace

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")

import onnxruntime  # noqa: E402

from perch_exporter import user_code  # noqa: E402
from perch_exporter.architectures import LeNet5  # noqa: E402
from perch_exporter.checkpoint import read_state_dict  # noqa: E402
from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.publish import publish  # noqa: E402

NETS = {
    "nets/__init__.py": "",
    "nets/model.py": """
from torch import nn


class Settings:
    rate = 0.1


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.last = nn.Linear(784, classes)
        self.settings = Settings()

    def forward(self, image):
        return self.last(image.flatten(1)) * 3


def build(classes):
    return Net(classes)
""",
}


def read(path: Path, key: str | None = None, trusted: bool = True) -> Any:
    return read_state_dict(path, CheckpointFormat.STATE_DICT, key, trusted)


def saved(content: object, root: Path) -> Path:
    torch.save(content, root / "v1.pt")
    return root / "v1.pt"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """Packed as a user does; and importable while the test makes the pickle, as in training."""
    archive = packed(tmp_path / "nets.zip", NETS)
    with user_code.opened(archive):
        yield archive


def test_a_whole_pickled_network_of_ones_own_goes_the_whole_way(source: Path, tmp_path: Path) -> None:
    import nets.model  # type: ignore[import-not-found]

    torch.manual_seed(0)
    network = nets.model.build(10)
    checkpoint = saved({"epoch": 3, "model": network, "settings": nets.model.Settings()}, tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]
    parts: dict[str, Any] = {
        "entryPoint": "nets.model:build",
        "source": {"uri": source.as_uri(), "sha256": hashlib.sha256(source.read_bytes()).hexdigest()},
        "parameters": {"classes": 10},
    }
    changes = {"architecture": parts, "checkpoint__stateDictKey": "model"}
    refused = file_request(tmp_path, checkpoint, **changes)
    workspace = Workspace(tmp_path / "work")
    fetch(refused, workspace, {})
    with pytest.raises(StepFailed, match=r"asks for nets\.model\..*safetensors.*checkpoint\.trustSource: true") as caught:
        convert_and_prove(refused, workspace)
    assert caught.value.reason is Reason.UNSAFE_CHECKPOINT

    asked = file_request(tmp_path, checkpoint, checkpoint__trustSource=True, **changes)
    convert_and_prove(asked, workspace)
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED
    images = np.random.default_rng(5).standard_normal((3, 1, 28, 28)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    found = onnxruntime.InferenceSession(workspace.output / MODEL).run(None, {"image": images})[0]
    assert np.allclose(found, expected, atol=1e-5)


def test_of_a_whole_network_the_weights_are_taken(tmp_path: Path) -> None:
    network = LeNet5()
    weights = read(saved(network, tmp_path))
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == {
        key: tuple(tensor.shape) for key, tensor in network.state_dict().items()
    }
    with pytest.raises(StepFailed, match=r"set checkpoint\.stateDictKey to net, where it keeps tensors"):
        read(saved({"net": network, "epoch": 1}, tmp_path))


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_a_pickle_runs_where_it_is_trusted_and_only_there(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = saved({"c1.weight": Malice(target)}, tmp_path)
    with pytest.raises(StepFailed) as caught:
        read(path, trusted=False)
    assert caught.value.reason is Reason.UNSAFE_CHECKPOINT
    assert not target.exists()
    with pytest.raises(StepFailed) as caught:
        read(path)
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE, "what os.system gave is no tensor"
    assert target.exists()


def test_a_class_that_cannot_be_imported_is_named_with_the_way_out(source: Path, tmp_path: Path) -> None:
    import nets.model

    path = saved(nets.model.Net(10), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "path", [place for place in sys.path if "perch-source-" not in place])
        with pytest.raises(StepFailed, match=r"No module named 'nets'.*architecture\.source") as caught:
            read(path)
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE


class Leaver:
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (0,)


@pytest.mark.parametrize(
    ("content", "says"),
    [(Leaver(), "SystemExit"), (3, "an object of type int and not a state dict")],
    ids=["ends the process", "is no network"],
)
def test_a_trusted_file_is_refused_that(content: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(StepFailed) as caught:
        read(saved(content, tmp_path))
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE
    assert says in caught.value.message


@pytest.mark.parametrize("form", ["SafeTensors", "TorchScript", "TorchExport", "ONNX"])
def test_only_a_pickle_can_be_trusted(form: str) -> None:
    changes = {} if form == "SafeTensors" else {"architecture": None}
    with pytest.raises(ValidationError, match="trustSource is for format StateDict alone"):
        request(checkpoint__format=form, checkpoint__trustSource=True, **changes)
