"""Makes checkpoints, and what torch answers to some inputs. Needs torch: `made` runs this file by the exporter image's Python.

Weights are random, or those of a file. Batch statistics are those of a batch, as training leaves them: with torch's own 0 and 1
the answers of a deep network are all alike, and agreement about them would say nothing. A detector's head is made to see things.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CHECKPOINT, ANSWERS, CALIBRATION, PICTURE = "checkpoint", "answers.npz", "calibration.npz", "picture.jpg"
SAMPLES = 4
_CALIBRATION = 32
_DYNAMIC = (96, 160)
"""What stands for a -1 in a shape, by its place among them."""
_CLASSES_OF_TWO_HEADS = 5


@dataclass(frozen=True)
class Order:
    """A network, and the form of its checkpoint."""

    folder: str
    """Gets CHECKPOINT, CALIBRATION, and ANSWERS: arrays inputs/<name> and outputs/<name>. If it holds a PICTURE, that is the
    input, as ImageNet's usual transforms make it; if it holds a CALIBRATION, its first samples are."""
    network: str
    """As architecture.name has it, or two_heads."""
    form: str
    """StateDict, Training (an epoch's dict, of a DataParallel's keys), SafeTensors, TorchScript, TorchExport or ONNX."""
    inputs: Sequence[dict[str, Any]]
    """As the version's: name, dataType, shape."""
    outputs: Sequence[str]
    weights: str | None = None
    """A state dict to take in place of random weights."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """The constructor's."""
    layer: str | None = None
    """Answers are this layer's."""


def made(orders: Sequence[Order]) -> None:
    """Carries them out. Their folders must be below /tmp, which the exporter image's environment shares with the machine."""
    from devcluster import images

    command = [*images.exporter_python(), Path(__file__), json.dumps([asdict(order) for order in orders])]
    environment = {**os.environ, "HOME": "/tmp"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the checkpoints were not made: {(done.stdout + done.stderr)[-3000:]}")


def snake(name: str) -> str:
    """A parameter as a constructor calls it: num_classes for numClasses."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


# --- with torch


def carry_out(orders: str) -> None:
    for order in json.loads(orders):
        _carry_out(Order(**order))


def _carry_out(order: Order) -> None:
    import numpy as np
    import torch

    from perch_exporter.contract import TensorSpec
    from perch_exporter.samples import make_inputs

    folder = Path(order.folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if (folder / CALIBRATION).exists():
        with np.load(folder / CALIBRATION) as file:
            inputs = {name: torch.from_numpy(file[name][:SAMPLES]) for name in file.files}
    else:
        np.savez(folder / CALIBRATION, **{spec["name"]: _make_input(spec, _CALIBRATION).numpy() for spec in order.inputs})
        inputs = {spec["name"]: _make_input(spec, SAMPLES) for spec in order.inputs}
    if _detects(order):
        # Its weights are made for what it sees: that is to be like what the Job will ask.
        specs = [TensorSpec(name=spec["name"], data_type=spec["dataType"], shape=spec["shape"]) for spec in order.inputs]
        inputs = {name: torch.from_numpy(array) for name, array in make_inputs(specs, "0123abcd", SAMPLES).items()}
    model = _build(order, inputs)
    if (folder / PICTURE).exists():
        inputs = {order.inputs[0]["name"]: _read_picture(folder / PICTURE)}
    with torch.inference_mode():
        answer = _detect(model, *inputs.values()) if _detects(order) else _serving(model, order.layer)(*inputs.values())
    answers = answer if isinstance(answer, tuple) else (answer,)
    found = {f"inputs/{name}": tensor.numpy() for name, tensor in inputs.items()}
    found |= {f"outputs/{name}": tensor.numpy() for name, tensor in zip(order.outputs, answers, strict=True)}
    np.savez(folder / ANSWERS, **found)
    _write(model, order, tuple(inputs.values()), folder / CHECKPOINT)


def _make_input(spec: dict[str, Any], samples: int) -> Any:
    """[samples, *shape]: pictures that differ in level and contrast, since noise alone averages out in a deep network."""
    import torch

    sizes = iter(_DYNAMIC)
    shape = [next(sizes) if size == -1 else size for size in spec["shape"]]
    if spec["dataType"] == "INT64":
        return torch.randint(0, 10, (samples, *shape))
    spread = [samples] + [1] * len(shape)
    level, contrast = torch.linspace(-1, 1, samples).reshape(spread), torch.linspace(0.5, 1.5, samples).reshape(spread)
    return level + contrast * torch.randn(samples, *shape)


def _read_picture(path: Path) -> Any:
    """[1, 3, 224, 224]."""
    from PIL import Image
    from torchvision import transforms

    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
    return transforms.Compose(steps)(Image.open(path).convert("RGB"))[None]


def _build(order: Order, inputs: dict[str, Any]) -> Any:
    import torch
    from torch import nn

    if order.network == "two_heads":
        from exports.two_heads import TwoHeads

        model: Any = TwoHeads(_CLASSES_OF_TWO_HEADS)
    elif order.network.startswith("torchvision:"):
        import torchvision

        name = order.network.removeprefix("torchvision:")
        # Their own initialization takes half a minute.
        more: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        more |= {"weights_backbone": None} if _detects(order) else {}
        model = torchvision.models.get_model(name, weights=None, **order.parameters, **more)
        if _detects(order):
            return lively(model.eval(), *inputs.values())
    else:
        from perch_exporter.architectures import LeNet5, ZFNet

        model = {"lenet5": LeNet5, "zfnet": ZFNet}[order.network](**order.parameters)
    if order.weights is not None:
        model.load_state_dict(torch.load(order.weights, weights_only=True))
        return model.eval()
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1.0
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.05)  # a vision transformer's head begins as zeros, and answers zeros
    with torch.no_grad():
        model(*inputs.values())
    return model.eval()


def _detects(order: Order) -> bool:
    return "boxes" in order.outputs


def _detect(model: Any, images: Any) -> tuple[Any, ...]:
    """torchvision's lists of any length as a server has them: as many rows for each image, the rest zeros."""
    import torch

    found = [model([image])[0] for image in images]
    rows = [model.detections_per_img - len(each["scores"]) for each in found]
    return tuple(
        torch.stack(
            [
                torch.cat([each[name], each[name].new_zeros(more, *each[name].shape[1:])])
                for each, more in zip(found, rows, strict=True)
            ]
        )
        for name in ("boxes", "labels", "scores")
    )


def lively(model: Any, images: Any) -> Any:
    """A detector whose weights nobody trained, and that sees something in these images all the same: sure scores, boxes of all
    sizes. images: float32 [N, 3, height, width]."""
    import torch

    torch.manual_seed(5)
    for part in model.head.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                torch.nn.init.zeros_(part.bias)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = None
            part.train()
    with torch.no_grad():
        pixels = model.transform(list(images))[0].tensors
        model.head(list(model.backbone(pixels).values()))
        model.eval()
        for part in (model.head.classification_head, model.head.regression_head):
            for layer in _last_layers(part):
                seen: list[Any] = []
                hook = layer.register_forward_hook(lambda _module, _given, answer, seen=seen: seen.append(answer))
                model.head(list(model.backbone(pixels).values()))
                hook.remove()
                layer.weight.mul_(2 / torch.cat([answer.flatten() for answer in seen]).std())
    return model


def _last_layers(part: Any) -> list[Any]:
    """Those that give a head's numbers."""
    from torch import nn

    if hasattr(part, "module_list"):
        return [each[-1] if isinstance(each, nn.Sequential) else each for each in part.module_list]
    return [getattr(part, name) for name in ("cls_logits", "bbox_reg", "bbox_ctrness") if hasattr(part, name)]


def _serving(model: Any, layer: str | None) -> Any:
    if layer is None:
        return model
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(model, [layer])
    return lambda *inputs: extractor(*inputs)[layer]


def _write(model: Any, order: Order, inputs: tuple[Any, ...], path: Path) -> None:
    import torch

    weights = model.state_dict()
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    match order.form:
        case "StateDict":
            torch.save(weights, path)
        case "Training":
            content = {f"module.{key}": value for key, value in weights.items()}
            torch.save({"epoch": 3, "model": content, "optimizer": {"lr": 0.1}}, path)
        case "SafeTensors":
            from safetensors.torch import save_file

            save_file(weights, path)
        case "TorchScript":
            torch.jit.script(model).save(path)
        case "TorchExport":
            program = path.with_suffix(".pt2")  # torch insists on it
            torch.export.save(torch.export.export(model, inputs, dynamic_shapes=batch), program)
            program.rename(path)
        case "ONNX":
            names = {"input_names": [spec["name"] for spec in order.inputs], "output_names": list(order.outputs)}
            written = torch.onnx.export(
                model, inputs, dynamo=True, dynamic_shapes=batch, opset_version=18, verbose=False, **names
            )
            written.save(path, external_data=False)
        case other:
            raise ValueError(f"no form {other}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    carry_out(sys.argv[1])
