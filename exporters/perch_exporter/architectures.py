"""Architectures by name: what `convert` builds before the checkpoint's weights go in. Needs torch.

`lenet5` and `zfnet` are ours; `torchvision:<name>` is any classification model of torchvision, always with weights=None:
nothing is ever downloaded here. Detection models are built in `perch_exporter.detectors`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from perch_exporter.contract import DETECTORS, Architecture, Reason
from perch_exporter.failure import StepFailed

TORCHVISION = "torchvision:"
_OURS_TO_SET = {"weights", "progress", "init_weights"}
_TRANSFORMING = (TORCHVISION + "googlenet", TORCHVISION + "inception_v3")
"""Networks that may shift and scale what they are given: it changes every answer and stands in no checkpoint."""


class LeNet5(nn.Module):  # type: ignore[misc]  # torch is not where types are checked
    """LeNet-5 for 28x28 grey images: float32 [N, 1, 28, 28] to logits [N, num_classes].

    LeCun, Bottou, Bengio, Haffner: "Gradient-Based Learning Applied to Document Recognition", Proceedings of the IEEE
    86(11), 1998, section II.B. As is usual since, C3 sees all of S2's maps, S2 and S4 average without weights of their
    own, and the output is linear in place of radial basis functions. C1 pads by 2: the paper's inputs are 32x32.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, kernel_size=5, padding=2)
        self.c3 = nn.Conv2d(6, 16, kernel_size=5)
        self.c5 = nn.Conv2d(16, 120, kernel_size=5)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, num_classes)
        self.pool = nn.AvgPool2d(2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        s2 = self.pool(torch.tanh(self.c1(image)))
        s4 = self.pool(torch.tanh(self.c3(s2)))
        c5 = torch.tanh(self.c5(s4)).flatten(1)
        logits: torch.Tensor = self.output(torch.tanh(self.f6(c5)))
        return logits


class ZFNet(nn.Module):  # type: ignore[misc]  # torch is not where types are checked
    """ZFNet for 224x224 colour images: float32 [N, 3, 224, 224] to logits [N, num_classes].

    Zeiler, Fergus: "Visualizing and Understanding Convolutional Networks", ECCV 2014, figure 3. The paper's contrast
    normalization across feature maps is AlexNet's local response normalization, with AlexNet's constants.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=7, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.Conv2d(96, 256, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0),
            nn.Conv2d(256, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.features(image).flatten(1))
        return logits


_OURS: dict[str, type[nn.Module]] = {"lenet5": LeNet5, "zfnet": ZFNet}


def cut(model: nn.Module, layer: str) -> nn.Module:
    """A module that gives what `layer` gives, and ends there. Raises InvalidParameters, naming the layers that there are."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    try:
        names = get_graph_node_names(model)[1]
    except Exception as error:  # whatever a network does that cannot be traced
        raise StepFailed(
            Reason.INVALID_PARAMETERS,
            f"architecture.layer cannot be served: torchvision cannot trace the network: {type(error).__name__}: {error}",
        ) from error
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=3) or names[-8:]
        raise StepFailed(
            Reason.INVALID_PARAMETERS, f"architecture.layer {layer} is no layer of the network; there are {', '.join(near)}"
        )
    extractor = create_feature_extractor(model, [layer]).eval()
    (output,) = (node for node in extractor.graph.nodes if node.op == "output")
    output.args = tuple(output.args[0].values())  # the layer's, without the dict around it
    extractor.recompile()
    return extractor


def build_model(architecture: Architecture, checkpoint_keys: Collection[str]) -> nn.Module:
    """The module in eval mode, with weights of no meaning. Raises UnknownArchitecture or InvalidParameters.

    `checkpoint_keys` settle what both forms of one model differ in and nobody wants to state by hand: GoogLeNet's and
    Inception's auxiliary heads serve training only, so a checkpoint may have them or not.
    """
    if architecture.name is None:
        raise ValueError("an architecture without a name is built by its own code")
    factory = _factory(architecture.name)
    arguments = {snake(name): value for name, value in architecture.parameters.items()}
    _refuse_unknown(architecture, factory, arguments)
    if architecture.name in _TRANSFORMING:
        if "transform_input" not in arguments:
            raise StepFailed(
                Reason.INVALID_PARAMETERS,
                f"architecture {architecture.name} needs parameters.transformInput, since the checkpoint does not say it and "
                'every answer depends on it: "true" if the training began from ImageNet\'s weights (torchvision sets it '
                'then), "false" if not',
            )
        arguments.setdefault("aux_logits", any(key.lower().startswith("aux") for key in checkpoint_keys))
        # Their own initialization takes half a minute on the CPU, for numbers that the checkpoint replaces.
        arguments["init_weights"] = False
    try:
        return factory(**arguments).eval()
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in architecture.parameters.items()) or "none"
        raise StepFailed(
            Reason.INVALID_PARAMETERS,
            f"architecture {architecture.name} does not take its parameters ({given}): {type(error).__name__}: {error}",
        ) from error


def _factory(name: str) -> Callable[..., nn.Module]:
    if name in _OURS:
        return _OURS[name]
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    short = name.removeprefix(TORCHVISION)
    if short not in known and short in torchvision.models.list_models():
        raise StepFailed(
            Reason.UNKNOWN_ARCHITECTURE,
            f"{short} of torchvision is no classification model, and of its others these are served: {', '.join(DETECTORS)}; "
            "what answers with masks, keypoints, or lists of any length in two stages is not",
        )
    if short not in known:
        near = difflib.get_close_matches(short, [*known, *(name.removeprefix(TORCHVISION) for name in DETECTORS)], n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_OURS)} and torchvision:<{', '.join(known)}>"
        )
        raise StepFailed(
            Reason.UNKNOWN_ARCHITECTURE,
            f"torchvision {torchvision.__version__} has no classification model named {short}; {hint}",
        )
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(short)
    if short.startswith("regnet"):
        builder = _reckoning_on_cpu(builder)
    return lambda **arguments: builder(weights=None, progress=False, **arguments)


def _reckoning_on_cpu(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """RegNet reckons its widths with tensors, which hold no numbers where a network is built without memory."""
    from torchvision.models.regnet import BlockParams

    theirs, reckon = vars(BlockParams)["from_init_params"], BlockParams.from_init_params

    def reckon_on_cpu(**given: Any) -> BlockParams:
        with torch.device("cpu"):
            return reckon(**given)

    def build(**arguments: Any) -> nn.Module:
        BlockParams.from_init_params = reckon_on_cpu
        try:
            return builder(**arguments)
        finally:
            BlockParams.from_init_params = theirs

    return build


def _refuse_unknown(architecture: Architecture, factory: Callable[..., Any], arguments: Collection[str]) -> None:
    """torchvision's builders end in **kwargs: some swallow what they do not know, so nothing odd may reach them."""
    refused = sorted(_OURS_TO_SET.intersection(arguments))
    if factory in _OURS.values():
        refused += sorted(set(arguments) - set(inspect.signature(factory).parameters))
    if refused:
        raise StepFailed(
            Reason.INVALID_PARAMETERS,
            f"architecture {architecture.name} has no parameter {', '.join(camel(name) for name in refused)}; "
            "numClasses is the usual one",
        )


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)
