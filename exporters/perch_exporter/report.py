"""report.html: what an export made and what its gates saw, in one file that needs nothing beside it. Needs jinja2 and Pillow.

Every text in it is escaped by the template, and its own content policy lets it load nothing and run nothing: names and messages
come from other people's files.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from perch_exporter.contract import ExportRequest, Figures, Target
from perch_exporter.onnx_file import GraphFacts
from perch_exporter.samples import Array

_POINTS = 1500
_PICTURE = 112
_WIDTH, _HEIGHT, _MARGIN = 640, 300, 48


@dataclass(frozen=True)
class Seen:
    """A sample worth a look: the first input's array, channels first or last, and what is odd about it."""

    sample: Array
    caption: str


@dataclass(frozen=True)
class ClassRow:
    name: str
    samples: int
    correct: int

    @property
    def recall(self) -> float:
        return self.correct / self.samples


@dataclass(frozen=True)
class Timing:
    """Seconds for the golden samples in one batch, one run each: a hint and no benchmark."""

    samples: int
    checkpoint: float | None
    artifact: float


@dataclass(frozen=True)
class Content:
    request: ExportRequest
    figures: Figures
    graph: GraphFacts
    checkpoint_bytes: int
    artifact_bytes: int
    timing: Timing
    answers: Sequence[tuple[str, Array, Array]]
    """By output: its name, the checkpoint's answers and the artefact's, of one shape."""
    classes: Sequence[ClassRow] = ()
    """The least well recognized first."""
    seen: Sequence[Seen] = ()

    @property
    def for_a_plan(self) -> bool:
        """Whether what is judged here is not what serves: build makes a TensorRT plan of it, and judges that one's parity."""
        return self.request.conversion.target is Target.TENSOR_RT

    def class_name(self, number: int) -> str:
        return class_name(self.request, number)


def class_name(request: ExportRequest, number: int) -> str:
    names = request.triton.labels
    return names[number] if names else str(number)


def render(content: Content) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("perch_exporter"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text: str = environment.get_template("report.html.j2").render(
        content=content,
        request=content.request,
        figures=content.figures,
        plots=[_plot(name, reference, actual) for name, reference, actual in content.answers],
        pictures=[(uri, seen.caption) for seen in content.seen if (uri := _picture(seen.sample)) is not None],
    )
    return text


@dataclass(frozen=True)
class _Plot:
    """Difference over answer, in pixels of the drawing, with the ends of both axes."""

    name: str
    points: list[tuple[float, float]]
    low: str
    high: str
    most: str
    shown: int
    of: int
    width: int = _WIDTH
    height: int = _HEIGHT
    margin: int = _MARGIN


def _plot(name: str, reference: Array, actual: Array) -> _Plot:
    wide = np.asarray(reference, np.float64).ravel()
    difference = np.asarray(actual, np.float64).ravel() - wide
    every = max(1, -(-len(wide) // _POINTS))
    # The largest differences are what one looks for: they are never thinned out.
    chosen = np.unique(np.concatenate([np.arange(0, len(wide), every), np.argsort(-np.abs(difference))[:50]]))
    low, high = float(wide.min(initial=0)), float(wide.max(initial=0))
    most = float(np.abs(difference).max(initial=0))
    across = _scaled(wide[chosen], low, high, _MARGIN, _WIDTH - _MARGIN)
    up = _scaled(-difference[chosen], -most, most, _MARGIN, _HEIGHT - _MARGIN)
    points = [(round(x, 1), round(y, 1)) for x, y in zip(across, up, strict=True)]
    return _Plot(name, points, f"{low:.4g}", f"{high:.4g}", f"{most:.2g}", len(chosen), len(wide))


def _scaled(values: npt.NDArray[np.float64], low: float, high: float, start: int, end: int) -> list[float]:
    extent = high - low
    where = (values - low) / extent if extent > 0 else np.full(len(values), 0.5)
    result: list[float] = (start + where * (end - start)).tolist()
    return result


def _picture(sample: Array) -> str | None:
    """A data URI; None for what is no picture. Contrast is stretched: nobody knows how the sample was normalized."""
    if sample.ndim != 3:
        return None
    if sample.shape[0] in (1, 3):
        sample = sample.transpose(1, 2, 0)
    if sample.shape[2] not in (1, 3) or min(sample.shape[:2]) < 4:
        return None
    low, high = float(sample.min()), float(sample.max())
    grey = np.zeros_like(sample) if high <= low else (sample - low) / (high - low)
    pixels = (255 * grey).round().astype(np.uint8)
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    scale = _PICTURE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
