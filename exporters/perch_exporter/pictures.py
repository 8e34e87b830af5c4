"""A picture's bytes to the network's tensor, as torchvision's usual transforms of training do it.

Open, convert, Resize, CenterCrop, ToTensor, Normalize: with Pillow, which is what torchvision uses on pictures, in the same order
and with the same rounding, so that a served picture is the very tensor that training would have seen. Like torchvision's own
loader it takes no notice of EXIF's rotation and drops transparency.

This file is used twice: convert proves the network on pictures with it, and its text is published beside the network as the
code of Triton's preprocessing model. So it knows nothing but Pillow and numpy, and keeps to Python 3.10. The pictures are
anybody's: each ends in a tensor or a PictureError with a sentence, within bounded memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 25_000_000
"""Of the picture as it comes and as it is resized: 100 MB at four bytes each."""
MAX_SCANS = 64
"""Of a JPEG. A progressive one has some ten, and each is a pass over all pixels, though it may take no bytes."""

MAX_SEGMENTS, MAX_CHUNKS = 4096, 65_536
"""Of a JPEG, of a PNG. Pillow reads them one by one in Python; a camera's JPEG has some hundred at most."""
FREE_PIXELS = 1_000_000
PIXELS_PER_BYTE = 16
UNFOLDED_PER_SECOND = 25_000_000
"""For each thread that prepares pictures. Of a PNG of one colour, 25 million take up to half a second of a core."""
UNFOLDED_SECONDS = 30
"""What is saved up while nobody asks, in seconds: the golden check asks for all its pictures at once."""

_INTERPOLATIONS = {"Bilinear": Image.Resampling.BILINEAR, "Bicubic": Image.Resampling.BICUBIC}
_START_OF_SCAN = b"\xff\xda"
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_MARKERS = np.array([0 < kind < 0xD0 or 0xD7 < kind < 0xFF for kind in range(256)])
"""Of a JPEG, but for restarts, which stand within a scan and have no length."""
_LOOKED_AT = 2**20
_BARE, _END = b"\x01\xd8", 0xD9
"""Markers without a length; the end of the picture."""
_BASE64_STARTS = (b"/9j/", b"iVBORw0KGgo")
"""How the text of a JPEG and of a PNG begins in base64: JSON carries no bytes."""


class PictureError(ValueError):
    """What is wrong with the picture, for who sent it."""


@dataclass(frozen=True)
class Recipe:
    """`resize`: () as it is, (s,) the shorter side, (h, w) both. `crop`: () or (h, w). `height`, `width`: of the result."""

    mode: str
    resize: tuple[int, ...]
    crop: tuple[int, ...]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool
    height: int
    width: int

    @classmethod
    def from_fields(cls, fields: dict[str, Any], shape: list[int]) -> Recipe:
        """`fields` as the export request has them in JSON, `shape` of the network's input."""
        channels_last = fields["layout"] == "HWC"
        height, width = shape[:2] if channels_last else shape[1:]
        crop = tuple(fields.get("centerCrop", ()))
        return cls(
            mode=fields["decode"],
            resize=tuple(fields.get("resize", ())),
            crop=crop * 2 if len(crop) == 1 else crop,
            interpolation=fields["interpolation"],
            mean=tuple(float(text) for text in fields.get("mean", ("0",))),
            std=tuple(float(text) for text in fields.get("std", ("1",))),
            channels_last=channels_last,
            height=height,
            width=width,
        )


class Budget:
    """Bounds what the pictures of all senders cost that unfold to far more pixels than their bytes would fill.

    A photo has a few pixels for each byte, so its sender pays about what it costs; 73 KB of one colour may be 25 million pixels.
    Counted are a picture's pixels beyond FREE_PIXELS and PIXELS_PER_BYTE for each byte, at most UNFOLDED_PER_SECOND for each
    thread. Others are never refused for it.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = threads * UNFOLDED_PER_SECOND
        self._most = self._left = float(self._rate * UNFOLDED_SECONDS)
        self._clock, self._at = clock, clock()
        self._lock = threading.Lock()

    def take(self, pixels: int, size: int) -> None:
        """For a picture of so many pixels in `size` bytes, before it is decoded. Raises PictureError."""
        unfolded = pixels - FREE_PIXELS - PIXELS_PER_BYTE * size
        if unfolded <= 0:
            return
        with self._lock:
            now = self._clock()
            self._left, self._at = min(self._most, self._left + (now - self._at) * self._rate), now
            if unfolded > self._left:
                raise PictureError(
                    f"its {size:,} bytes unfold to {pixels:,} pixels, and {self._rate:,} of such pixels are taken in a second: "
                    "send it again later, or make it smaller"
                )
            self._left -= unfolded


def prepare(content: bytes, recipe: Recipe, budget: Budget | None = None) -> npt.NDArray[np.float32]:
    """The tensor of one picture, float32 [C, H, W] or [H, W, C]. Raises PictureError."""
    image = _decoded(content, recipe.mode, budget)
    if recipe.resize:
        image = _resized(image, recipe.resize, _INTERPOLATIONS[recipe.interpolation])
    if recipe.crop:
        image = _cropped(image, *recipe.crop)
    if (image.height, image.width) != (recipe.height, recipe.width):
        raise PictureError(
            f"it is {image.width} pixels wide and {image.height} high, this model takes {recipe.width} and {recipe.height}"
        )
    pixels = np.asarray(image, np.float32).reshape(recipe.height, recipe.width, -1)
    tensor = (pixels / np.float32(255) - np.asarray(recipe.mean, np.float32)) / np.asarray(recipe.std, np.float32)
    return np.ascontiguousarray(tensor if recipe.channels_last else tensor.transpose(2, 0, 1))


def _decoded(content: bytes, mode: str, budget: Budget | None) -> Image.Image:
    if content.startswith(_BASE64_STARTS):
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise PictureError(f"it begins as a picture in base64 and does not go on as one: {error}") from error
    if len(content) > MAX_BYTES:
        raise PictureError(f"it has {len(content):,} bytes, more than {MAX_BYTES:,}")
    content = _alone(content)
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            _refuse(image)  # nothing but the header is read yet
            if image.format != "PNG" and content.count(_START_OF_SCAN) > MAX_SCANS:
                raise PictureError(f"it has more than {MAX_SCANS} scans")
            if budget is not None:
                budget.take(image.width * image.height, len(content))
            if image.mode != mode:
                return image.convert(mode)
            image.load()
            return image  # convert would make a copy: another 100 MB of the largest
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("it is neither a JPEG nor a PNG") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow raises whatever the broken bytes lead it to
        raise PictureError(f"it cannot be read: {error}") from error


def _alone(content: bytes) -> bytes:
    """Up to the picture's own end. A phone's motion photo has a video behind it, others have a second picture there."""
    if content.startswith(_JPEG):
        return content[: _end_of_jpeg(content)]
    return content[: _end_of_png(content)] if content.startswith(_PNG) else content


def _end_of_jpeg(content: bytes) -> int:
    """From marker to marker; those that stand within a segment (a thumbnail has its own) are passed over with it."""
    place, numbers = 0, np.frombuffer(content, np.uint8)
    for _ in range(MAX_SEGMENTS):
        place = _next_marker(numbers, place) + 2
        if place > len(content):
            return len(content)
        kind = content[place - 1]
        if kind == _END:
            return place
        if kind not in _BARE:
            place += int.from_bytes(content[place : place + 2], "big")
    raise PictureError(f"it has more than {MAX_SEGMENTS:,} segments")


def _next_marker(numbers: npt.NDArray[np.uint8], place: int) -> int:
    """The end where there is none. In numpy, since each second byte of a scan may look like a marker's beginning."""
    size = 64
    while place < len(numbers) - 1:
        part = numbers[place : place + size + 1]
        found = (part[:-1] == 0xFF) & _MARKERS[part[1:]]
        if found.any():
            return place + int(found.argmax())
        place, size = place + size, min(2 * size, _LOOKED_AT)
    return len(numbers)


def _end_of_png(content: bytes) -> int:
    place = len(_PNG)
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(content):
            return len(content)
        length, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        place += length + 12
        if kind == b"IEND":
            return place
    raise PictureError(f"it has more than {MAX_CHUNKS:,} chunks")


def _refuse(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise PictureError(f"it has {image.width} by {image.height} pixels, more than {MAX_PIXELS:,}")
    if image.mode.startswith(("I", "F")):
        raise PictureError("it has more than 8 bits for a pixel's grey; save it with 8")
    if image.format == "PNG" and getattr(image, "is_animated", False):
        raise PictureError("it is animated; send one picture")


def _resized(image: Image.Image, sizes: tuple[int, ...], interpolation: Image.Resampling) -> Image.Image:
    if len(sizes) == 1:
        short, long = sorted((image.width, image.height))
        longer = int(sizes[0] * long / short)
        width, height = (sizes[0], longer) if image.width <= image.height else (longer, sizes[0])
    else:
        height, width = sizes
    if width * height > MAX_PIXELS:
        raise PictureError(f"with {image.width} by {image.height} pixels it would be resized to more than {MAX_PIXELS:,}")
    return image if (width, height) == image.size else image.resize((width, height), interpolation)


def _cropped(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle; where the picture is smaller, black around it. Python rounds to even, and so does torchvision."""
    left, top = _start(image.width, width), _start(image.height, height)
    return image.crop((left, top, left + width, top + height))


def _start(size: int, wanted: int) -> int:
    return -((wanted - size) // 2) if wanted > size else round((size - wanted) / 2)
