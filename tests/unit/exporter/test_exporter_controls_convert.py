"""The checks of convert and prove, each with its control: the same attack with that check taken away, in which it has its effect.

As in test_exporter_controls, for what needs torch. Where a library beneath has a check of its own, the attack is one that it lets
through.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import file_request

from perch_exporter.contract import CheckpointFormat, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.workspace import FIGURES, GOLDEN, MODEL, Workspace

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the command line does, before onnxruntime is imported

import onnx  # noqa: E402

from perch_exporter import checkpoint, onnx_file, prove, user_code  # noqa: E402
from perch_exporter.architectures import LeNet5  # noqa: E402
from perch_exporter.convert import convert  # noqa: E402
from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.onnx_session import ask, open_session  # noqa: E402

UNPACKED = 16 * 2**20


class Place:
    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.workspace = Workspace(root / "work")

    @property
    def model(self) -> Path:
        return self.workspace.output / MODEL


def exported(place: Place) -> Any:
    torch.save(LeNet5().eval().state_dict(), place.root / "v1.pt")
    request = file_request(place.root, place.root / "v1.pt")
    fetch(request, place.workspace, {})
    convert(request, place.workspace)
    return request


# --- attacks: each returns once it had its effect, and raises StepFailed where it is refused


def unpacks_a_bomb(place: Place) -> None:
    """Zeros in the place of the pickle: torch unpacks them into memory, whatever becomes of them then."""
    torch.save({"a": torch.ones(1)}, place.root / "small.pt")
    path = place.root / "v1.pt"
    with zipfile.ZipFile(place.root / "small.pt") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for item in source.infolist():
            out.writestr(item.filename, bytes(UNPACKED) if item.filename.endswith("data.pkl") else source.read(item))
    assert path.stat().st_size < UNPACKED / 100
    whole = torch._C.PyTorchFileReader.get_record
    sizes = []

    def watched(reader: Any, name: str) -> Any:
        record = whole(reader, name)
        sizes.append(len(record))
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C.PyTorchFileReader, "get_record", watched)
        with pytest.raises(StepFailed) as failed:
            checkpoint.read_state_dict(path, CheckpointFormat.STATE_DICT, None, False)
    if not sizes:
        raise failed.value
    assert max(sizes) == UNPACKED


def weights_of(name: str, count: int, location: str) -> Any:
    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[count], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, "length": str(4 * count)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def reads_a_neighbour(place: Place) -> None:
    """A ready-made ONNX file that takes its weights from another object of the Job, which no digest of its own covers."""
    secret = np.arange(10, dtype=np.float32)
    (place.root / "neighbour").write_bytes(secret.tobytes())
    value = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["image", "w"], ["logits"])],
        "reads",
        [value("image", kind, ["batch", 10])],
        [value("logits", kind, ["batch", 10])],
        [weights_of("w", 10, "neighbour")],
    )
    path = place.root / "checkpoint"
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.root)  # onnx's own check looks for such a file there
        onnx_file.check_onnx(path)
    answers = ask(open_session(path), ["logits"], {"image": np.zeros((1, 10), np.float32)}, 1)
    assert np.array_equal(answers["logits"][0], secret)


def serves_what_lies_beside_it(place: Place) -> None:
    """User code's model has its weights in a file that is handed over for something else, and is not published with it."""
    request = exported(place)
    model = onnx.load(place.model)
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("output.bias")]
    bias.CopyFrom(weights_of(bias.name, 10, GOLDEN))
    place.model.write_bytes(model.SerializeToString())
    with pytest.raises(StepFailed) as failed:
        prove.prove(request, place.workspace)
    if failed.value.reason is Reason.OUTPUT_REJECTED:
        raise failed.value
    assert failed.value.reason is Reason.PARITY_FAILED, "it was computed with bytes of golden.npz"


def proves_what_a_link_leads_to(place: Place) -> None:
    request = exported(place)
    elsewhere = place.root / "elsewhere.onnx"
    place.model.rename(elsewhere)
    place.model.symlink_to(elsewhere)
    prove.prove(request, place.workspace)
    assert (place.workspace.proof / FIGURES).exists()


def opens(place: Place, name: str, content: bytes) -> None:
    with zipfile.ZipFile(place.root / "source.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place.root))
        with user_code.opened(place.root / "source.zip") as code:
            assert (code.folder / name).stat().st_size == len(content)


def writes_outside_of_its_folder(place: Place) -> None:
    opens(place, "../escaped.py", b"import os")
    assert (place.root / "escaped.py").read_bytes() == b"import os", "it stays when the folder is gone"


def fills_the_disk(place: Place) -> None:
    opens(place, "zeros.py", bytes(UNPACKED))


# --- and the checks taken away


def replaced(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value)


@dataclass(frozen=True)
class Control:
    attack: Callable[[Place], None]
    reason: Reason
    remove: Callable[[pytest.MonkeyPatch], None]


def nothing(*_: object) -> None:
    """In the place of a check."""


CONTROLS = [
    Control(unpacks_a_bomb, Reason.CHECKPOINT_UNREADABLE, replaced(checkpoint, "check_unpacked", nothing)),
    Control(reads_a_neighbour, Reason.CHECKPOINT_UNREADABLE, replaced(onnx_file, "_outside", lambda _: [])),
    Control(serves_what_lies_beside_it, Reason.OUTPUT_REJECTED, replaced(onnx_file, "_outside", lambda _: [])),
    Control(proves_what_a_link_leads_to, Reason.OUTPUT_REJECTED, replaced(prove, "inspect", nothing)),
    Control(writes_outside_of_its_folder, Reason.SOURCE_REJECTED, replaced(user_code, "_inspect", nothing)),
    Control(fills_the_disk, Reason.SOURCE_REJECTED, replaced(user_code, "_inspect", nothing)),
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.attack.__name__)
def test_what_a_check_keeps_out_has_its_effect_where_the_check_is_removed(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MOST_UNPACKED", 2**20)
    monkeypatch.setattr(user_code, "MOST_BYTES", 2**20)
    with pytest.raises(StepFailed) as refused:
        control.attack(Place(tmp_path / "checked"))
    assert refused.value.reason is control.reason
    control.remove(monkeypatch)
    control.attack(Place(tmp_path / "unchecked"))
