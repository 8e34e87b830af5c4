"""Torchvision's detection models: what `convert` builds, asks and exports. Needs torch.

As torchvision has them they take a list of pictures and answer with lists of any length, which no server can batch. So there are
two forms of one model, with the same weights:

- `Detector` asks torchvision's model itself, picture by picture, and is what the artefact is compared with.
- `BatchedDetector` is what is exported: the network over the whole batch, and after it the choice of boxes in operations of fixed
  sizes, with one ONNX NonMaxSuppression over all pictures and classes.

Both answer with exactly D = detections_per_img rows, the surest first, filled up with zeros: boxes float32 [N, D, 4] as x1, y1,
x2, y2 in pixels of the input, labels int64 [N, D], scores float32 [N, D].

A trace of torchvision's own code, by the older exporter, answers the same, but holds one picture alone, and a part of its own for
each of the classes, with sizes that depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
import torchvision
from onnxscript import opset18 as op
from torch import nn
from torch.nn import functional
from torchvision.models.detection import fcos, ssd, ssdlite
from torchvision.ops import clip_boxes_to_image, nms

from perch_exporter.architectures import TORCHVISION, camel, snake
from perch_exporter.contract import Architecture, Reason
from perch_exporter.failure import StepFailed

_COMMON = frozenset({"num_classes", "score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"})
_SIZES = frozenset({"min_size", "max_size"})
_TAIL = "backbone.features."


def build_detector(architecture: Architecture, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Torchvision's model in eval mode, with weights of no meaning. Raises InvalidParameters.

    `weights` settle whether ssdlite's backbone has MobileNet's full tail: torchvision builds it so for training from ImageNet's
    weights, and halves its channels where it is told of none.
    """
    name = str(architecture.name).removeprefix(TORCHVISION)
    arguments = {snake(key): value for key, value in architecture.parameters.items()}
    known = _COMMON if name.startswith("ssd") else _COMMON | _SIZES
    # torchvision's constructors swallow what they do not know.
    if strange := sorted(camel(key) for key in arguments.keys() - known):
        raise StepFailed(
            Reason.INVALID_PARAMETERS,
            f"architecture {architecture} has no parameter {', '.join(strange)}; there are "
            f"{', '.join(sorted(camel(key) for key in known))}",
        )
    if odd := [camel(key) for key, value in arguments.items() if isinstance(value, bool | str)]:
        raise StepFailed(Reason.INVALID_PARAMETERS, f"architecture {architecture} takes numbers, and {', '.join(odd)} is none")
    builder = torchvision.models.get_model_builder(name)
    try:
        model = builder(weights=None, weights_backbone=None, progress=False, **arguments)
        if name.startswith("ssdlite") and not _same_backbone(model, weights):
            with mock.patch.object(ssdlite, "mobilenet_v3_large", _full_tail):
                model = builder(weights=None, weights_backbone=None, progress=False, **arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in architecture.parameters.items()) or "none"
        raise StepFailed(
            Reason.INVALID_PARAMETERS,
            f"architecture {architecture} does not take its parameters ({given}): {type(error).__name__}: {error}",
        ) from error
    return model.eval()


def _same_backbone(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    expected = {key: tensor.shape for key, tensor in model.state_dict().items() if key.startswith(_TAIL)}
    given = {_TAIL + key.partition(_TAIL)[2]: tensor.shape for key, tensor in weights.items()}
    return all(given.get(key, shape) == shape for key, shape in expected.items())


def _full_tail(**arguments: Any) -> nn.Module:
    model: nn.Module = torchvision.models.mobilenet_v3_large(**(arguments | {"reduced_tail": False}))
    return model


Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Boxes, labels, scores."""


class Detector(nn.Module):  # type: ignore[misc]  # torch is not where types are checked
    """Torchvision's own answers, filled up to D rows each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Answer:
        found = [self._filled(self.model([image])[0]) for image in images]
        boxes, labels, scores = (torch.stack(parts) for parts in zip(*found, strict=True))
        return boxes, labels, scores

    def _filled(self, answer: Mapping[str, torch.Tensor]) -> Answer:
        missing = self.model.detections_per_img - len(answer["scores"])
        boxes = functional.pad(answer["boxes"], (0, 0, 0, missing))
        return boxes, functional.pad(answer["labels"], (0, missing)), functional.pad(answer["scores"], (0, missing))


class BatchedDetector(nn.Module):  # type: ignore[misc]
    """The same in one go for pictures of one size, in operations whose sizes the batch alone decides.

    channels, height, width: of the pictures.
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.model = model
        with torch.inference_mode():
            prepared, _ = model.transform([torch.zeros(shape)])
            features = list(model.backbone(prepared.tensors).values())
            (anchors,) = model.anchor_generator(prepared, features)
        self.original = shape[1:]
        (self.resized,) = prepared.image_sizes
        self.padded = tuple(prepared.tensors.shape[-2:])
        places = [feature.shape[-2] * feature.shape[-1] for feature in features]
        self.levels = [place * (len(anchors) // sum(places)) for place in places]
        self.register_buffer("anchors", anchors.clone(), persistent=False)
        self.candidates: Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
        self.candidates = self._of_each_class if isinstance(model, ssd.SSD) else self._of_each_level
        self.first_label = 1 if isinstance(model, ssd.SSD) else 0

    def forward(self, images: torch.Tensor) -> Answer:
        images = self.model.transform.normalize(images)
        if self.resized != self.original:
            images = functional.interpolate(images, size=self.resized, mode="bilinear", align_corners=False)
        images = functional.pad(images, (0, self.padded[1] - self.resized[1], 0, self.padded[0] - self.resized[0]))
        boxes, scores = self.candidates(self.model.head(list(self.model.backbone(images).values())))
        kept = torch.ops.perch.suppress(
            boxes, scores, float(self.model.nms_thresh), float(self.model.score_thresh), self.model.detections_per_img
        )
        return self._surest(boxes, kept)

    def _surest(self, boxes: torch.Tensor, kept: torch.Tensor) -> Answer:
        """boxes [N, K, 4], kept [N, classes, K]: a box's score for a class, and 0 where it is not kept for it."""
        flat, most = kept.flatten(1), self.model.detections_per_img
        if flat.shape[1] < most:
            flat = functional.pad(flat, (0, most - flat.shape[1]))
        scores, where = flat.topk(most, dim=1)
        there = scores > 0
        labels = torch.where(there, where // boxes.shape[1] + self.first_label, 0)
        chosen = _rows(boxes, where % boxes.shape[1])
        across, down = self.original[1] / self.resized[1], self.original[0] / self.resized[0]
        chosen = chosen * torch.tensor([across, down, across, down], dtype=chosen.dtype)
        return torch.where(there[..., None], chosen, 0.0), labels, scores

    def _of_each_class(self, head: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """SSD: every anchor's box, with scores for the best anchors of each class. The first class is the background."""
        scores = functional.softmax(head["cls_logits"], dim=-1)[..., 1:].transpose(1, 2)
        best, where = scores.topk(min(self.model.topk_candidates, scores.shape[2]), dim=2)
        scores = torch.zeros_like(scores).scatter(2, where, best)
        regression = head["bbox_regression"]
        return self._boxes(regression, self.anchors.expand(regression.shape)), scores

    def _of_each_level(self, head: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """RetinaNet, FCOS: of each level of the pyramid the best pairs of anchor and class, each with a box of its own."""
        classes = head["cls_logits"].shape[2]
        every = torch.sigmoid(head["cls_logits"])
        if "bbox_ctrness" in head:
            every = torch.sqrt(every * torch.sigmoid(head["bbox_ctrness"]))
        best, anchors, labels, start = [], [], [], 0
        for size in self.levels:
            flat = every[:, start : start + size].flatten(1)
            scores, where = flat.topk(min(self.model.topk_candidates, size * classes), dim=1)
            best.append(scores)
            anchors.append(where // classes + start)
            labels.append(where % classes)
            start += size
        chosen, label, score = torch.cat(anchors, 1), torch.cat(labels, 1)[:, None], torch.cat(best, 1)[:, None]
        boxes = self._boxes(_rows(head["bbox_regression"], chosen), self.anchors[chosen])
        empty = score.new_zeros(score.shape[0], classes, score.shape[2])
        return boxes, empty.scatter(1, label, score)

    def _boxes(self, regression: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """[N, K, 4] each; within the picture as it was resized."""
        coder = self.model.box_coder
        decode = coder.decode if isinstance(self.model, fcos.FCOS) else coder.decode_single
        boxes = decode(regression.reshape(-1, 4), anchors.reshape(-1, 4))
        return clip_boxes_to_image(boxes, self.resized).reshape(regression.shape)


def _rows(boxes: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of boxes [N, K, 4] those at places [N, D]."""
    return boxes.gather(1, places[..., None].expand(-1, -1, 4))


@torch.library.custom_op("perch::suppress", mutates_args=())  # type: ignore[untyped-decorator]
def _suppress(boxes: torch.Tensor, scores: torch.Tensor, overlap: float, threshold: float, most: int) -> torch.Tensor:
    """Non-maximum suppression for each picture and class: boxes [N, K, 4], scores [N, classes, K], to the scores that are kept.

    One operation, since what it does inside has sizes that depend on the data, which `torch.export` cannot carry here.
    """
    kept = torch.zeros_like(scores)
    for picture, row in zip(range(len(boxes)), scores, strict=True):
        for label, score in enumerate(row):
            above = torch.where(score > threshold)[0]
            chosen = above[nms(boxes[picture][above], score[above], overlap)][:most]
            kept[picture, label, chosen] = score[chosen]
    return kept


@_suppress.register_fake  # type: ignore[untyped-decorator]
def _suppress_fake(boxes: torch.Tensor, scores: torch.Tensor, *_: float) -> torch.Tensor:
    del boxes
    return torch.empty_like(scores)


def _suppress_onnx(boxes: Any, scores: Any, overlap: float, threshold: float, most: int) -> Any:
    limits = (op.Constant(value_ints=[most]), op.Constant(value_floats=[overlap]), op.Constant(value_floats=[threshold]))
    chosen = op.NonMaxSuppression(boxes, scores, *limits)
    return op.ScatterND(op.Expand(op.Constant(value_float=0.0), op.Shape(scores)), chosen, op.GatherND(scores, chosen))


TRANSLATIONS: Mapping[Any, Callable[..., Any]] = {torch.ops.perch.suppress.default: _suppress_onnx}
"""For `torch.onnx.export`."""
