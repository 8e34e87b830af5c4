"""Served pictures against torchvision's own transforms, on photographs; and convert's gate on pictures."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter_builders import file_request, wheel_folder

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the exporter image's environment: torch is not installed here")
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # as the command line does, before onnxruntime is imported

from PIL import Image  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.models import ResNet18_Weights  # noqa: E402

from perch_exporter.architectures import LeNet5  # noqa: E402
from perch_exporter.convert import convert  # noqa: E402
from perch_exporter.fetch import fetch  # noqa: E402
from perch_exporter.picture_samples import load_pictures  # noqa: E402
from perch_exporter.pictures import Recipe, prepare  # noqa: E402
from perch_exporter.samples import load_golden  # noqa: E402
from perch_exporter.workspace import GOLDEN, PICTURES, Workspace  # noqa: E402

MEAN, STD = ["0.485", "0.456", "0.406"], ["0.229", "0.224", "0.225"]
FIELDS = {"decode": "RGB", "interpolation": "Bilinear", "layout": "CHW", "mean": MEAN, "std": STD}
NORMALIZE = transforms.Normalize([float(m) for m in MEAN], [float(s) for s in STD])


def photographs() -> list[Path]:
    """scikit-learn ships two: china.jpg and flower.jpg, of 640 by 427 pixels."""
    found = importlib.util.find_spec("sklearn")
    assert found is not None
    assert found.origin is not None
    return sorted((Path(found.origin).parent / "datasets" / "images").glob("*.jpg"))


def variants() -> list[tuple[str, bytes]]:
    """The photographs as they are, upright, small, grey, as PNG, and of odd sizes."""
    out = []
    for path in photographs():
        image = Image.open(path).convert("RGB")
        changes = {
            "upright": image.transpose(Image.Transpose.ROTATE_90),
            "small": image.resize((111, 80)),
            "narrow": image.crop((0, 0, 41, 400)),
            "odd": image.crop((1, 1, 400, 226)),
            "grey": image.convert("L"),
        }
        out.append((path.stem, path.read_bytes()))
        for name, changed in changes.items():
            for form in ("JPEG", "PNG"):
                packed = io.BytesIO()
                changed.save(packed, form)
                out.append((f"{path.stem}, {name}, {form}", packed.getvalue()))
    return out


BICUBIC = transforms.InterpolationMode.BICUBIC
RECIPES: list[tuple[str, dict[str, Any], tuple[int, int, int], Any]] = [
    ("ImageNet's usual", {"resize": [256], "centerCrop": [224]}, (3, 224, 224),
     [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), NORMALIZE]),
    ("both sides", {"resize": [96, 128]}, (3, 96, 128), [transforms.Resize((96, 128)), transforms.ToTensor(), NORMALIZE]),
    ("bicubic", {"resize": [233], "centerCrop": [223, 199], "interpolation": "Bicubic"}, (3, 223, 199),
     [transforms.Resize(233, BICUBIC), transforms.CenterCrop((223, 199)), transforms.ToTensor(), NORMALIZE]),
    ("a crop that is larger than some", {"centerCrop": [301]}, (3, 301, 301),
     [transforms.CenterCrop(301), transforms.ToTensor(), NORMALIZE]),
    ("enlarged", {"resize": [299], "centerCrop": [299]}, (3, 299, 299),
     [transforms.Resize(299), transforms.CenterCrop(299), transforms.ToTensor(), NORMALIZE]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "shape", "steps"), [case[1:] for case in RECIPES], ids=[case[0] for case in RECIPES])
def test_photographs_become_the_tensors_of_training_to_the_last_bit(
    fields: dict[str, Any], shape: tuple[int, ...], steps: list[Any]
) -> None:
    recipe = Recipe.from_fields(FIELDS | fields, list(shape))
    pictures = variants()
    assert len(pictures) == 22
    for name, content in pictures:
        expected = transforms.Compose(steps)(Image.open(io.BytesIO(content)).convert("RGB")).numpy()
        assert np.array_equal(prepare(content, recipe), expected), name


def test_grey_pictures_too() -> None:
    recipe = Recipe.from_fields({"decode": "L", "interpolation": "Bilinear", "layout": "CHW", "resize": [28, 28]}, [1, 28, 28])
    steps = transforms.Compose([transforms.Grayscale(), transforms.Resize((28, 28)), transforms.ToTensor()])
    for name, content in variants():
        expected = steps(Image.open(io.BytesIO(content)).convert("RGB")).numpy()
        assert np.allclose(prepare(content, recipe), expected, atol=0), name


def test_torchvisions_newer_transforms_of_its_own_weights_agree() -> None:
    """They resize by the same Pillow; only the place of the division differs."""
    recipe = Recipe.from_fields(FIELDS | {"resize": [256], "centerCrop": [224]}, [3, 224, 224])
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms()
    for path in photographs():
        assert np.allclose(prepare(path.read_bytes(), recipe), preset(Image.open(path)).numpy(), atol=1e-6)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCH_PILLOW_WHEELS", str(wheel_folder(tmp_path / "wheels")))


def converted(root: Path) -> Workspace:
    torch.manual_seed(0)
    torch.save(LeNet5().state_dict(), root / "v1.pt")
    picture = {"decode": "L", "resize": [32], "centerCrop": [28], "mean": ["0.5"], "std": ["0.25"]}
    asked = file_request(root, root / "v1.pt", preprocessing=picture)
    workspace = Workspace(root / "work")
    fetch(asked, workspace, {})
    convert(asked, workspace)
    return workspace


@pytest.mark.usefixtures("wheels")
def test_the_gate_is_passed_on_pictures_which_are_handed_over_with_the_checkpoints_answers(tmp_path: Path) -> None:
    workspace = converted(tmp_path)
    golden = load_golden(workspace.output / GOLDEN)
    pictures = load_pictures(workspace.output / PICTURES, golden.samples)
    assert {Image.open(io.BytesIO(picture)).format for picture in pictures} == {"JPEG", "PNG"}
    assert len({Image.open(io.BytesIO(picture)).size for picture in pictures}) > 2
    steps = [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(), transforms.Normalize([0.5], [0.25])]
    tensors = torch.stack([transforms.Compose(steps)(Image.open(io.BytesIO(picture)).convert("L")) for picture in pictures])
    assert np.array_equal(tensors.numpy(), golden.inputs["image"])
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = LeNet5().eval()(tensors).numpy()
    assert np.allclose(golden.outputs["logits"], expected, atol=1e-6)


@pytest.mark.usefixtures("wheels")
def test_two_exports_hand_over_the_same_pictures(tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        contents.append((converted(tmp_path / name).output / PICTURES).read_bytes())
    assert contents[0] == contents[1]
