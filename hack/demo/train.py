"""Makes the demo's two checkpoints: version 1 after one epoch, version 2 trained to the end. Needs torch; the demo does not.

    pip install ./exporters[convert] scikit-learn
    PYTHONPATH=exporters:hack python -m demo.train            # writes hack/demo/checkpoints
    PYTHONPATH=exporters:hack python -m demo.train --check    # trains again and compares with what is there

Everything is seeded and runs on one CPU thread: with the same torch on the same kind of CPU the files come out bit for bit.
metrics.json keeps what the training printed, and what each checkpoint itself says about every held-out image: the demo holds
the answers that come back through the gateway against that. The recipe's strength of distortion was chosen among three by the
held-out accuracy (97.3, 97.6 and 98.0 %), so version 2's figure flatters it a little.
"""

import hashlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from demo import digits
from demo.checkpoints import FOLDER, METRICS, path
from demo.digits import Labels, Pixels
from perch_exporter.architectures import LeNet5

EPOCHS = {1: 1, 2: 40}
"""Epochs by version: the same recipe, stopped early and not."""
SEED = 1998
LEARNING_RATE = 3e-3
BATCH = 32
TOLERATED = 0.02
"""Another CPU or torch rounds otherwise, and training carries that on; its accuracy may differ by so much."""


def train(epochs: int) -> LeNet5:
    torch.manual_seed(SEED)
    model = LeNet5(num_classes=10)
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    pixels, labels = map(torch.from_numpy, digits.training())
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for batch in torch.randperm(len(pixels), generator=random).split(BATCH):
            loss = functional.cross_entropy(model(distort(pixels[batch], random)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    return model


def distort(images: Tensor, random: torch.Generator) -> Tensor:
    """Every image turned, scaled, slanted and moved a little, as other hands would have written it. [N, 1, 28, 28]."""

    def draw(most: float) -> Tensor:
        return (2 * torch.rand(len(images), generator=random) - 1) * most

    angle, scale, slant = draw(math.radians(15)), 1 + draw(0.2), draw(0.3)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    rows = [torch.stack([cosine, slant - sine, draw(0.15)], dim=1), torch.stack([sine, cosine, draw(0.15)], dim=1)]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def predict(model: nn.Module, pixels: Pixels) -> list[int]:
    with torch.no_grad():
        answers: list[int] = model(torch.from_numpy(pixels)).argmax(dim=1).tolist()
    return answers


def accuracy(model: nn.Module, pixels: Pixels, labels: Labels) -> float:
    return float((labels == predict(model, pixels)).mean())


def to_bytes(model: LeNet5) -> bytes:
    # Through a buffer, because torch writes a file's own name into it.
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def measure(version: int, model: LeNet5) -> dict[str, Any]:
    return {
        "version": version,
        "epochs": EPOCHS[version],
        "sha256": hashlib.sha256(to_bytes(model)).hexdigest(),
        "trainingAccuracy": round(accuracy(model, *digits.training()), 4),
        "heldOutAccuracy": round(accuracy(model, *digits.held_out()), 4),
        "heldOutPredictions": "".join(map(str, predict(model, digits.held_out()[0]))),
    }


def check(version: int, retrained: LeNet5) -> bool:
    """Compares a checkpoint of the checkout with what training gives here and now; says how near they are."""
    if path(version).read_bytes() == to_bytes(retrained):
        print(f"version {version}: the same, bit for bit")
        return True
    kept = LeNet5(num_classes=10)
    kept.load_state_dict(torch.load(path(version), weights_only=True))
    apart = max(float((kept.state_dict()[key] - weight).abs().max()) for key, weight in retrained.state_dict().items())
    before, now = (accuracy(model, *digits.held_out()) for model in (kept.eval(), retrained))
    near = abs(before - now) <= TOLERATED
    print(
        f"version {version}: not bit for bit; weights differ by up to {apart:.3g}, accuracy on held-out images {before:.4f} "
        f"in the checkout and {now:.4f} retrained, {'within' if near else 'NOT within'} {TOLERATED}"
    )
    return near


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    compare: Annotated[bool, typer.Option("--check", help="Compare with the checkout's files and write nothing.")] = False,
    folder: Annotated[Path, typer.Option(help="Where the files go.")] = FOLDER,
) -> None:
    """Train both versions."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    models = {version: train(epochs) for version, epochs in EPOCHS.items()}
    if compare:
        near = [check(version, model) for version, model in models.items()]
        sys.exit(0 if all(near) else 1)
    for version, model in models.items():
        (folder / path(version).name).write_bytes(to_bytes(model))
    counts = {"training": len(digits.training()[1]), "heldOut": len(digits.held_out()[1])}
    versions = [measure(version, model) for version, model in models.items()]
    text = json.dumps({"torch": torch.__version__, "images": counts, "versions": versions}, indent=2) + "\n"
    (folder / METRICS.name).write_text(text)
    print(text)


if __name__ == "__main__":
    app()
