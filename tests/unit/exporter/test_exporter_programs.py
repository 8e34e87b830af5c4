"""Whole programs as checkpoints: TorchScript in all its forms, and what torch.export saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import convert_and_prove, file_request

from perch_exporter.contract import ExportRequest, Outcome, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.workspace import MODEL, Workspace

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from perch_exporter.architectures import LeNet5  # noqa: E402
from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.publish import publish  # noqa: E402

PICTURE = {"name": "image", "dataType": "FP32", "shape": [3, 64, 64]}


class Loop(torch.nn.Module):  # type: ignore[misc]
    """As often as a tensor of the checkpoint says."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(784, 10)
        self.register_buffer("times", torch.tensor(3))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1)
        for _ in range(int(self.times)):
            flat = torch.tanh(flat) * 2
        return self.last(flat)


class Moody(Loop):
    """What it says of one image depends on the others of the batch."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1)
        if bool(flat.mean() > 0):
            flat = flat * 2
        return self.last(flat)


class Forgetful(Loop):
    """Drops out in eval mode, too."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.dropout(image.flatten(1), 0.5, True))


class Relative(Loop):
    """What it says of one image is how far it lies from the batch's mean."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1)
        return self.last(flat - flat.mean(0))


class Folded(Loop):
    """Two images become one row."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.last(image.view(-1, 1568)[:, :784])


def scripted(module: Any) -> Any:
    return torch.jit.script(module.eval())


def traced(module: Any) -> Any:
    return torch.jit.trace(module.eval(), torch.randn(2, 1, 28, 28))


def asked_for(root: Path, path: Path, form: str, **changes: Any) -> ExportRequest:
    return file_request(root, path, checkpoint__format=form, architecture=None, **changes)


def converted(asked: ExportRequest, root: Path) -> Workspace:
    workspace = Workspace(root / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    return workspace


def script_request(root: Path, module: Any, **changes: Any) -> ExportRequest:
    module.save(str(root / "v1.pt"))
    return asked_for(root, root / "v1.pt", "TorchScript", **changes)


def program_request(
    root: Path, module: Any, dynamic: Any, sizes: tuple[int, ...] = (2, 1, 28, 28), **changes: Any
) -> ExportRequest:
    program = torch.export.export(module.eval(), (torch.randn(sizes),), dynamic_shapes=dynamic)
    torch.export.save(program, root / "v1.pt2")
    return asked_for(root, root / "v1.pt2", "TorchExport", **changes)


def answers_alike(module: Any, output: Path, shape: tuple[int, ...] = (3, 1, 28, 28)) -> bool:
    session = onnxruntime.InferenceSession(output / MODEL)
    for level in (-1.0, 1.0):
        images = (level + np.random.default_rng(5).standard_normal(shape)).astype(np.float32)
        with torch.inference_mode():
            expected = module(torch.from_numpy(images)).numpy()
        if np.abs(session.run(None, {"image": images})[0] - expected).max() > 1e-4 * np.ptp(expected):
            return False
    return True


SCRIPTS: list[tuple[str, Callable[[], Any]]] = [
    ("scripted", lambda: scripted(LeNet5())),
    ("traced", lambda: traced(LeNet5())),
    ("frozen", lambda: torch.jit.freeze(scripted(LeNet5()))),
    ("with a loop", lambda: scripted(Loop())),
]


@pytest.mark.parametrize("make", [case[1] for case in SCRIPTS], ids=[case[0] for case in SCRIPTS])
def test_torchscript_is_exported_that_is(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = make()
    asked = script_request(tmp_path, module)
    workspace = converted(asked, tmp_path)
    assert answers_alike(module, workspace.output)
    assert not any(node.doc_string for node in onnx.load(workspace.output / MODEL).graph.node)
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED


def test_a_program_whose_answers_depend_on_the_rest_of_the_batch_is_not_passed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(StepFailed) as caught:
        converted(script_request(tmp_path, scripted(Moody())), tmp_path)
    assert caught.value.reason is Reason.PARITY_FAILED


@pytest.mark.parametrize(
    ("module", "reason", "said"),
    [
        (Forgetful(), Reason.PARITY_FAILED, r"differently when it is asked twice .*such as functional dropout"),
        (Relative(), Reason.PARITY_FAILED, r"differently beside other samples .*compute each sample by itself"),
        (Folded(), Reason.SHAPE_MISMATCH, r"logits has 8 rows for 16 samples"),
    ],
    ids=["at random", "by the batch's mean", "half as many rows"],
)
def test_why_a_network_cannot_agree_with_itself_is_told(module: Any, reason: Reason, said: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(StepFailed, match=said) as caught:
        converted(script_request(tmp_path, scripted(module)), tmp_path)
    assert caught.value.reason is reason
    assert not reason.retryable


def test_a_scripted_network_that_also_gives_heads_for_training_serves_its_first_answer(tmp_path: Path) -> None:
    import torchvision.models

    torch.manual_seed(0)
    module = scripted(torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False))
    logits = {"name": "logits", "dataType": "FP32", "shape": [1000]}
    asked = script_request(tmp_path, module, inputs=[PICTURE], outputs=[logits])
    converted(asked, tmp_path)


def test_a_torch_export_program_goes_the_whole_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = LeNet5().eval()
    asked = program_request(tmp_path, module, ({0: torch.export.Dim.DYNAMIC},))
    workspace = converted(asked, tmp_path)
    assert answers_alike(module, workspace.output)
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED


def test_a_program_may_bound_its_batch_below_what_is_proven(tmp_path: Path) -> None:
    """The sentence has torch's own words, with the bound."""
    asked = program_request(tmp_path, LeNet5(), ({0: torch.export.Dim("batch", min=1, max=4)},))
    with pytest.raises(StepFailed, match=r"does not take the version's inputs.*4") as caught:
        converted(asked, tmp_path)
    assert caught.value.reason is Reason.SHAPE_MISMATCH


def test_a_program_with_a_fixed_batch_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"image has shape \[2, 1, 28, 28\]; export it with a dynamic first") as caught:
        converted(program_request(tmp_path, LeNet5(), None), tmp_path)
    assert caught.value.reason is Reason.SHAPE_MISMATCH


def test_a_program_of_two_inputs_does_not_fit_a_version_of_one(tmp_path: Path) -> None:
    class Sum(torch.nn.Module):  # type: ignore[misc]
        def forward(self, a: Any, b: Any) -> Any:
            return a + b

    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Sum(), (torch.randn(2, 3), torch.randn(2, 3)), dynamic_shapes=(batch, batch))
    torch.export.save(program, tmp_path / "v1.pt2")
    with pytest.raises(StepFailed, match="names 1 inputs and the program takes 2 tensors"):
        converted(asked_for(tmp_path, tmp_path / "v1.pt2", "TorchExport"), tmp_path)


def test_torchscript_is_not_exported_with_an_opset_that_its_exporter_does_not_write(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="opset 21 is not written for TorchScript; 18 to 20 are") as caught:
        converted(script_request(tmp_path, scripted(LeNet5()), conversion__opset=21), tmp_path)
    assert caught.value.reason is Reason.EXPORT_FAILED


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


BROKEN: list[tuple[str, str, Callable[[Path], object]]] = [
    ("an empty file", "TorchScript", _bytes(b"")),
    ("no archive", "TorchScript", _bytes(b"not an archive" * 100)),
    ("a state dict", "TorchScript", lambda path: torch.save(LeNet5().state_dict(), path)),
    ("an empty file", "TorchExport", _bytes(b"")),
    ("no archive", "TorchExport", _bytes(b"not an archive" * 100)),
    ("a state dict", "TorchExport", lambda path: torch.save(LeNet5().state_dict(), path)),
    ("TorchScript", "TorchExport", lambda path: scripted(LeNet5()).save(str(path))),
]


@pytest.mark.parametrize(("form", "write"), [case[1:] for case in BROKEN], ids=[f"{case[0]} called {case[1]}" for case in BROKEN])
def test_a_program_is_refused_that_is(form: str, write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "v1.pt")
    with pytest.raises(StepFailed, match=f"cannot be read as {form}") as caught:
        converted(asked_for(tmp_path, tmp_path / "v1.pt", form), tmp_path)
    assert caught.value.reason is Reason.CHECKPOINT_UNREADABLE
    assert len(caught.value.message) < 1000
