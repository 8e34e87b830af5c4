"""Checkpoints as their authors' own code writes and loads them: wrapped, tied, of a former release, beside plain data.

What loads there by torch's or torchvision's usual means loads here, or the sentence names the way out.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import gzip
import io
import pathlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from perch_exporter.architectures import LeNet5, build_model  # noqa: E402
from perch_exporter.checkpoint import load_model, read_state_dict  # noqa: E402
from perch_exporter.contract import Architecture, CheckpointFormat, Reason  # noqa: E402
from perch_exporter.failure import StepFailed  # noqa: E402

pytestmark = pytest.mark.torch

STATE = CheckpointFormat.STATE_DICT


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path / "checkpoint")
    return path / "checkpoint"


def alike(found: nn.Module, wanted: nn.Module) -> None:
    x = torch.rand(3, 4)
    with torch.inference_mode():
        assert torch.equal(found(x), wanted.eval()(x))


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "DataParallel": lambda model: {f"module.{key}": value for key, value in model.state_dict().items()},
    "torch.compile of a part": lambda model: {
        key.replace("body.", "body._orig_mod."): value for key, value in model.state_dict().items()
    },
    "torch.compile of all, in DataParallel": lambda model: {
        f"module._orig_mod.{key}": value for key, value in model.state_dict().items()
    },
    "an averaged model": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "a Lightning module's model": lambda model: {f"model.{key}": value for key, value in model.state_dict().items()},
    "two levels": lambda model: {f"system.net.{key}": value for key, value in model.state_dict().items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_weights_are_taken_out_of_what_wraps_them(wrap: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    model = Small()
    weights = read_state_dict(saved(tmp_path, wrap(model)), STATE)
    alike(load_model(Small, weights), model)


def test_another_networks_weights_are_not_taken_however_they_are_wrapped(tmp_path: Path) -> None:
    weights = {f"model.{key}": value for key, value in LeNet5().state_dict().items()}
    with pytest.raises(StepFailed, match=r"begin with model\."):
        load_model(Small, read_state_dict(saved(tmp_path, weights), STATE))


def test_a_state_dict_two_levels_deep_is_found_by_the_key_that_the_refusal_names(tmp_path: Path) -> None:
    model = Small()
    file = saved(tmp_path, {"epoch": 3, "state": {"model": model.state_dict(), "step": 7}})
    with pytest.raises(StepFailed, match=r"set checkpoint.stateDictKey to state\.model"):
        read_state_dict(file, STATE)
    alike(load_model(Small, read_state_dict(file, STATE, "state.model")), model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


@pytest.mark.parametrize("on_meta", [True, False])
def test_a_tensor_that_the_network_has_twice_may_be_in_the_file_once(on_meta: bool, tmp_path: Path) -> None:
    model = Tied()
    save_file({"first.weight": model.first.weight.detach()}, tmp_path / "checkpoint")
    weights = read_state_dict(tmp_path / "checkpoint", CheckpointFormat.SAFE_TENSORS)
    alike(load_model(Tied, weights, on_meta), model)


def test_weight_norm_of_a_former_release_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    model = build()
    former = {
        "bias": model.bias.detach(),
        "weight_g": model.parametrizations.weight.original0.detach(),
        "weight_v": model.parametrizations.weight.original1.detach(),
    }
    alike(load_model(build, read_state_dict(saved(tmp_path, former), STATE), on_meta=False), model)


@pytest.mark.parametrize("safe", [False, True], ids=["torch.save", "safetensors"])
def test_torchvisions_first_published_keys_load_as_torchvision_loads_them(safe: bool, tmp_path: Path) -> None:
    import torchvision.models

    model = torchvision.models.densenet121(weights=None, num_classes=3)
    former = {
        key.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.").replace("conv2.", "conv.2.")
        if "denselayer" in key
        else key: value
        for key, value in model.state_dict().items()
    }
    assert any(".norm.1." in key for key in former)
    if safe:
        save_file(former, tmp_path / "checkpoint")
        weights = read_state_dict(tmp_path / "checkpoint", CheckpointFormat.SAFE_TENSORS)
    else:
        weights = read_state_dict(saved(tmp_path, former), STATE)
    architecture = Architecture(name="torchvision:densenet121", parameters={"numClasses": 3})
    loaded = load_model(lambda: build_model(architecture, weights.keys()), weights)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_pruned_network_is_told_how_to_make_it_permanent() -> None:
    from torch.nn.utils import prune

    model = Small()
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    with pytest.raises(StepFailed, match=r"head\.weight was pruned: call torch\.nn\.utils\.prune\.remove"):
        load_model(Small, model.state_dict())


def test_a_part_beside_the_network_is_told_from_it() -> None:
    weights = {f"model.{key}": tensor for key, tensor in Small().state_dict().items()} | {"criterion.weight": torch.ones(2)}
    with pytest.raises(StepFailed, match=r"own ones begin with model\. and others with criterion\.: save that part"):
        load_model(Small, weights)


def test_what_lies_below_the_key_is_named_from_the_top(tmp_path: Path) -> None:
    file = saved(tmp_path, {"model": {"state_dict": Small().state_dict(), "arch": "small"}})
    with pytest.raises(StepFailed, match=r"set checkpoint\.stateDictKey to model\.state_dict, where it keeps tensors"):
        read_state_dict(file, STATE, "model")


def test_complex_numbers_never_lose_a_part_in_silence() -> None:
    weights = Small().state_dict() | {"head.bias": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(StepFailed, match=r"complex numbers where the architecture has real ones: head\.bias"):
        load_model(Small, weights)


def test_a_class_of_the_training_script_is_told_from_one_that_can_be_brought(tmp_path: Path, monkeypatch: Any) -> None:
    import __main__

    kind = type("OfTheScript", (Small,), {"__module__": "__main__"})
    monkeypatch.setattr(__main__, "OfTheScript", kind, raising=False)
    file = saved(tmp_path, kind())
    monkeypatch.delattr(__main__, "OfTheScript")
    with pytest.raises(StepFailed, match=r"a class that the training script itself defines \(__main__\).*save model\.state_dict"):
        read_state_dict(file, STATE, trusted=True)


BESIDE: dict[str, Any] = {
    "argparse": argparse.Namespace(lr=0.1, names=["a"], out=pathlib.PurePosixPath("/x")),
    "simple namespace": SimpleNamespace(a=1),
    "counters": collections.Counter("aab"),
    "time": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "duration": datetime.timedelta(seconds=3),
    "decimal": decimal.Decimal("0.5"),
    "numpy scalar": np.float64(0.5),
    "numpy array": np.arange(3),
    "set": {1, 2},
    "complex": 1j,
}


@pytest.mark.parametrize("value", BESIDE.values(), ids=BESIDE.keys())
def test_plain_data_beside_the_weights_is_no_danger(value: Any, tmp_path: Path) -> None:
    model = Small()
    file = saved(tmp_path, {"model": model.state_dict(), "args": value, "nested": {"deeper": [value]}})
    alike(load_model(Small, read_state_dict(file, STATE, "model")), model)


class Bad:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    "value",
    [Bad(), argparse.Namespace(inner=Bad()), collections.defaultdict(Bad), [Bad()], np.array([Bad()], dtype=object)],
    ids=["alone", "in a namespace", "as a factory", "in a list", "in an array"],
)
def test_code_beside_the_weights_never_runs_whatever_plain_data_it_hides_in(value: Any, tmp_path: Path) -> None:
    file = saved(tmp_path, {"model": Small().state_dict(), "args": value})
    with pytest.raises(StepFailed) as caught:
        read_state_dict(file, STATE, "model")
    assert caught.value.reason is Reason.UNSAFE_CHECKPOINT


def zipped(name: str, content: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, content)
    return packed.getvalue()


def arrays() -> bytes:
    packed = io.BytesIO()
    np.savez(packed, a=np.arange(3))
    return packed.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "run git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html></html>", "it is a web page"),
    "an object store's error": (b"<?xml version='1.0'?><Error/>", "an XML document"),
    "gzip": (gzip.compress(b"x" * 100), "compressed with gzip"),
    "a zip around it": (zipped("run/model.pt", b"x"), r"a zip around run/model\.pt: upload that file itself"),
    "an npz": (arrays(), "it is an npz"),
    "nothing": (b"", "it is empty"),
    "the beginning of a zip": (b"PK\x03\x04" + bytes(100), "its end is missing"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
}


@pytest.mark.parametrize("form", [STATE, CheckpointFormat.SAFE_TENSORS])
@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES.keys())
def test_a_file_that_is_something_else_is_called_what_it_is(
    content: bytes, said: str, form: CheckpointFormat, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(StepFailed, match=said) as caught:
        read_state_dict(tmp_path / "checkpoint", form)
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE


def test_a_safetensors_file_under_the_wrong_format_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "checkpoint")
    with pytest.raises(StepFailed, match="say format: SafeTensors"):
        read_state_dict(tmp_path / "checkpoint", STATE)
