"""A network of one's own with two inputs and two outputs: what `architecture.entryPoint` names, packed by `exports.cases`.

Pure torch, importable anywhere: it travels to the export Job in a zip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):  # type: ignore[misc]  # torch is not where types are checked
    """A picture [N, 3, 32, 32] and the number of the camera that took it [N, 1] to logits [N, classes] and the class [N, 1]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.camera = nn.Embedding(10, 16)
        self.head = nn.Linear(16 * 4 * 4 + 16, classes)

    def forward(self, image: Tensor, camera: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.features(image).flatten(1), self.camera(camera).flatten(1)], dim=1)
        logits = self.head(both)
        return logits, logits.argmax(dim=1, keepdim=True)


def build(classes: int) -> TwoHeads:
    return TwoHeads(classes)
