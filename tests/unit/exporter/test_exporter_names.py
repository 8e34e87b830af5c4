"""Names of two worlds: what the version calls its tensors, and what torch calls the values within. And sizes, and opsets."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import convert_and_prove, file_request, packed

from perch_exporter.contract import ExportRequest, Outcome, Reason
from perch_exporter.failure import StepFailed
from perch_exporter.workspace import GOLDEN, MODEL, OTHER, Workspace

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.publish import publish  # noqa: E402
from perch_exporter.samples import load_golden  # noqa: E402

NETWORKS = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1]))
        self.head = nn.Linear(784, 10)

    def forward(self, x):
        return torch.sigmoid(self.head((x - self.mean).flatten(1)))


class Echo(Plain):
    def forward(self, x):
        y = super().forward(x)
        return y, x, y


class Patches(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.patch, self.head = nn.Conv2d(1, 8, size, size), nn.Linear(8, 10)

    def forward(self, x):
        assert x.shape[-1] % self.size == 0 and x.shape[-2] % self.size == 0, f"sizes must be multiples of {self.size}"
        return self.head(self.patch(x).mean([2, 3]))


class Deformed(nn.Module):
    def __init__(self):
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.offset, self.conv = nn.Conv2d(1, 18, 3, padding=1), DeformConv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.conv(x, self.offset(x)).relu().mean([2, 3]))
"""


def built(name: str, **parameters: Any) -> Any:
    space: dict[str, Any] = {}
    exec(NETWORKS, space)
    torch.manual_seed(0)
    return space[name](**parameters).eval()


def asked_for(root: Path, name: str, parameters: dict[str, Any] | None = None, **changes: Any) -> ExportRequest:
    archive = packed(root / "nets.zip", {"nets/__init__.py": "", "nets/model.py": NETWORKS})
    torch.save(built(name, **(parameters or {})).state_dict(), root / "v1.pt")
    source = {"uri": archive.as_uri(), "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    architecture = {"entryPoint": f"nets.model:{name}", "source": source, "parameters": parameters or {}}
    return file_request(root, root / "v1.pt", architecture=architecture, **changes)


def exported(asked: ExportRequest, root: Path) -> Workspace:
    workspace = Workspace(root / "work")
    fetch(asked, workspace, {})
    convert_and_prove(asked, workspace)
    assert publish(asked, workspace, {}).outcome is Outcome.PUBLISHED
    return workspace


def tensor(name: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "dataType": "FP32", "shape": list(shape)}


TAKEN = ["sigmoid", "mean", "head.weight", "linear", "sub", "x", "val_0", "495", "images:0", "/fc/Gemm_output_0"]


@pytest.mark.parametrize("form", ["StateDict", "TorchScript"])
@pytest.mark.parametrize("name", TAKEN)
def test_what_torch_calls_its_values_is_free_for_inputs_and_outputs(name: str, form: str, tmp_path: Path) -> None:
    ends = [([tensor(name, 1, 28, 28)], [tensor("y", 10)]), ([tensor("y", 1, 28, 28)], [tensor(name, 10)])]
    for place, (inputs, outputs) in enumerate(ends):
        root = tmp_path / str(place)
        root.mkdir()
        asked = asked_for(root, "Plain", inputs=inputs, outputs=outputs)
        if form == "TorchScript":
            torch.jit.save(torch.jit.trace(built("Plain"), torch.zeros(2, 1, 28, 28)), root / "v1.pt")
            ends_of_it = {"inputs": inputs, "outputs": outputs}
            asked = file_request(root, root / "v1.pt", architecture=None, checkpoint__format=form, **ends_of_it)
        session = onnxruntime.InferenceSession(exported(asked, root).output / MODEL)
        images = np.random.default_rng(5).standard_normal((3, 1, 28, 28)).astype(np.float32)
        with torch.inference_mode():
            expected = built("Plain")(torch.from_numpy(images)).numpy()
        assert np.allclose(session.run([outputs[0]["name"]], {inputs[0]["name"]: images})[0], expected, atol=1e-5)


def test_an_output_that_is_the_input_or_another_output_has_a_name_of_its_own(tmp_path: Path) -> None:
    outputs = [tensor("x", 10), tensor("echo", 1, 28, 28), tensor("again", 10)]
    workspace = exported(asked_for(tmp_path, "Echo", inputs=[tensor("sigmoid", 1, 28, 28)], outputs=outputs), tmp_path)
    session = onnxruntime.InferenceSession(workspace.output / MODEL)
    images = np.ones((2, 1, 28, 28), np.float32)
    scores, echo, again = session.run(["x", "echo", "again"], {"sigmoid": images})
    assert np.array_equal(echo, images)
    assert np.array_equal(scores, again)


@pytest.mark.parametrize(("multiple", "sizes"), [(1, (224, 256)), (14, (224, 280)), (48, (240, 288)), (64, (256, 384))])
def test_sizes_that_a_network_takes_are_found(multiple: int, sizes: tuple[int, int], tmp_path: Path) -> None:
    asked = asked_for(tmp_path, "Patches", {"size": multiple}, inputs=[tensor("image", 1, -1, -1)])
    output = exported(asked, tmp_path).output
    shapes = [load_golden(output / file).inputs["image"].shape[-2:] for file in (GOLDEN, OTHER)]
    assert shapes == [(size, size) for size in sizes]


def test_a_network_that_takes_no_two_of_the_sizes_is_refused_with_the_way_out(tmp_path: Path) -> None:
    asked = asked_for(tmp_path, "Patches", {"size": 500}, inputs=[tensor("image", 1, -1, -1)])
    with pytest.raises(StepFailed, match=r"multiples of 500.*it takes none of them.*state the sizes") as failed:
        exported(asked, tmp_path)
    assert failed.value.reason is Reason.SHAPE_MISMATCH


def test_an_operator_of_a_later_opset_is_written_in_the_first_that_has_it(tmp_path: Path) -> None:
    workspace = exported(asked_for(tmp_path, "Deformed"), tmp_path)
    assert [entry.version for entry in onnx.load(workspace.output / MODEL).opset_import] == [19]


def test_an_opset_that_was_asked_for_and_lacks_an_operator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match=r"DeformConv came with opset 19; leave conversion\.opset out, or let it be 19 or more"):
        exported(asked_for(tmp_path, "Deformed", conversion={"opset": 18}), tmp_path)


def test_an_input_that_a_program_does_not_use_is_named(tmp_path: Path) -> None:
    class Two(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(784, 10)

        def forward(self, image: Any, mask: Any) -> Any:
            return self.head(image.flatten(1))

    torch.jit.save(torch.jit.trace(Two().eval(), (torch.zeros(2, 1, 28, 28), torch.zeros(2, 28, 28))), tmp_path / "v1.pt")
    inputs = [tensor("image", 1, 28, 28), tensor("mask", 28, 28)]
    asked = file_request(tmp_path, tmp_path / "v1.pt", architecture=None, checkpoint__format="TorchScript", inputs=inputs)
    with pytest.raises(StepFailed, match="computes nothing of its input mask: save one that does not take it"):
        exported(asked, tmp_path)
