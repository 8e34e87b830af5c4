"""What is exported, served and asked: one row for each architecture, format of checkpoint, precision and extra."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from demo.checkpoints import path as digits_checkpoint

Answer = Literal["tensors", "classes", "pictures", "features", "detections"]


@dataclass(frozen=True)
class Case:
    """A ModelDeployment of one version."""

    name: str
    network: str
    """As architecture.name has it, or two_heads, which is code of one's own."""
    form: str = "StateDict"
    """As exports.make has it."""
    shape: Sequence[int] = (3, 224, 224)
    classes: int = 1000
    precision: str = "FP32"
    parameters: dict[str, int | str] = field(default_factory=dict)
    """As the version writes them, in camelCase; true and false as text."""
    layer: str | None = None
    weights: str | None = None
    """A state dict that the demo trained on digits; else they are random."""
    asked: Answer = "tensors"
    """`classes` by Triton's classification extension, `pictures` and `features` (of pictures) as JPEG."""
    detections: int = 0
    """Rows of a detector's answer."""
    more: dict[str, Any] = field(default_factory=dict)
    """Fields of the version's entry."""

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def own(self) -> bool:
        return self.network == "two_heads"

    @property
    def inputs(self) -> list[dict[str, Any]]:
        camera = [{"name": "camera", "dataType": "INT64", "shape": [1]}] if self.own else []
        return [{"name": "image", "dataType": "FP32", "shape": list(self.shape)}, *camera]

    @property
    def outputs(self) -> list[dict[str, Any]]:
        if self.asked == "detections":
            columns: list[tuple[str, str, list[int]]] = [("boxes", "FP32", [4]), ("labels", "INT64", []), ("scores", "FP32", [])]
            return [{"name": name, "dataType": kind, "shape": [self.detections, *rest]} for name, kind, rest in columns]
        number = [{"name": "class", "dataType": "INT64", "shape": [1]}] if self.own else []
        return [{"name": "features" if self.layer else "logits", "dataType": "FP32", "shape": [self.classes]}, *number]

    def entry(self, put: Any) -> dict[str, Any]:
        """The version's entry. `put` is called with a name and a file's path or bytes, and gives {uri, sha256} of an object."""
        triton = {"maxBatchSize": 8, "dynamicBatching": {"maxQueueDelayMicroseconds": 500}} | self.more.get("triton", {})
        content: dict[str, Any] = {"version": 1, "inputs": self.inputs, "outputs": self.outputs, **self.more, "triton": triton}
        form = "StateDict" if self.form == "Training" else self.form
        content["checkpoint"] = {"format": form, **({"stateDictKey": "model"} if self.form == "Training" else {})}
        content["conversion"] = {"precision": self.precision}
        if self.own:
            content["architecture"] = {
                "entryPoint": "nets.two_heads:build",
                "source": put("nets.zip", _packed()),
                "parameters": {"classes": self.classes},
            }
        elif form in ("StateDict", "SafeTensors"):
            architecture: dict[str, Any] = {"name": self.network}
            architecture |= {"parameters": self.parameters} if self.parameters else {}
            content["architecture"] = architecture | ({"layer": self.layer} if self.layer else {})
        return content


def _packed() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(Path(__file__).with_name("two_heads.py"), "nets/two_heads.py")
    return packed.getvalue()


_DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TUNED = {
    "labels": _DIGIT_NAMES,
    "warmup": True,
    "responseCache": True,
    "configOverrides": 'parameters { key: "intra_op_thread_count" value { string_value: "2" } }',
}
PICTURES = {
    "preprocessing": {
        "resize": [256],
        "centerCrop": [224],
        "mean": ["0.485", "0.456", "0.406"],
        "std": ["0.229", "0.224", "0.225"],
    },
    "postprocessing": {"softmax": True, "topK": 5},
}
DIGITS: dict[str, Any] = {"shape": (1, 28, 28), "classes": 10, "weights": str(digits_checkpoint(2))}
_BY_NAME = (
    *("alexnet", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "squeezenet1_1"),
    *("mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "mnasnet1_0", "efficientnet_b0", "regnet_y_400mf"),
    *("resnext50_32x4d", "convnext_tiny", "vit_b_16", "swin_t"),
)
# Without training the first classes lie so near each other that INT8 changes their order: 0.615 agreed.
UNTRAINED = {"verification": {"parity": {"minimumTop1Agreement": "0"}}}
_RESNET = "torchvision:resnet18"
_SMALL = {"minSize": 128, "maxSize": 150}  # the default of 800 takes minutes for a picture
_DETECTORS: tuple[tuple[str, tuple[int, int], int, dict[str, int]], ...] = (
    ("ssd300_vgg16", (300, 400), 200, {}),
    ("ssdlite320_mobilenet_v3_large", (320, 320), 300, {}),
    ("retinanet_resnet50_fpn", (60, 100), 300, _SMALL),
    ("retinanet_resnet50_fpn_v2", (60, 100), 300, _SMALL),
    ("fcos_resnet50_fpn", (60, 100), 100, _SMALL),
)
_TRANSFORMED: dict[str, int | str] = {"transformInput": "true"}
CASES = (
    Case("LeNet-5", "lenet5", **DIGITS),
    Case("ZFNet", "zfnet"),
    *(Case(name, f"torchvision:{name}") for name in _BY_NAME),
    Case("googlenet", "torchvision:googlenet", parameters=_TRANSFORMED),
    Case("inception_v3", "torchvision:inception_v3", shape=(3, 299, 299), parameters=_TRANSFORMED),
    *(
        Case(
            name,
            f"torchvision:{name}",
            shape=(3, *size),
            parameters={"numClasses": 7, **more},
            asked="detections",
            detections=most,
        )
        for name, size, most, more in _DETECTORS
    ),
    Case("a head of 37 classes", _RESNET, classes=37, parameters={"numClasses": 37}),
    Case("features of a layer", _RESNET, layer="flatten", classes=512),
    Case("height and width of any size", _RESNET, shape=(3, -1, -1)),
    Case("own code, two inputs and outputs", "two_heads", shape=(3, 32, 32), classes=5),
    Case("a training's dict of module. keys", _RESNET, "Training"),
    Case("SafeTensors", _RESNET, "SafeTensors"),
    Case("TorchScript", _RESNET, "TorchScript"),
    Case("TorchExport", _RESNET, "TorchExport"),
    Case("ONNX", _RESNET, "ONNX"),
    Case("FP16", "torchvision:resnet50", precision="FP16"),
    Case("INT8, LeNet-5 on digits", "lenet5", precision="INT8", **DIGITS),
    Case("INT8, resnet18", _RESNET, precision="INT8", more=UNTRAINED),
    Case("INT8, features of a layer", _RESNET, layer="flatten", classes=512, precision="INT8"),
    Case("labels, warm-up, cache, overrides", "lenet5", asked="classes", more={"triton": _TUNED}, **DIGITS),
    Case("pictures in, labels out", _RESNET, asked="pictures", more=PICTURES),
    Case(
        "pictures in, features out",
        _RESNET,
        layer="flatten",
        classes=512,
        asked="features",
        more={"preprocessing": PICTURES["preprocessing"]},
    ),
)
