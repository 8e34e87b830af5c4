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

_INTERPOLATIONS = {"Bilinear": Image.Resampling.BILINEAR, "Bicubic": Image.Resampling.BICUBIC}
_START_OF_SCAN = b"\xff\xda"
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


def prepare(content: bytes, recipe: Recipe) -> npt.NDArray[np.float32]:
    """The tensor of one picture, float32 [C, H, W] or [H, W, C]. Raises PictureError."""
    image = _decoded(content, recipe.mode)
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


def _decoded(content: bytes, mode: str) -> Image.Image:
    if content.startswith(_BASE64_STARTS):
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error as error:
            raise PictureError(f"it begins as a picture in base64 and does not go on as one: {error}") from error
    if len(content) > MAX_BYTES:
        raise PictureError(f"it has {len(content):,} bytes, more than {MAX_BYTES:,}")
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            _refuse(image)  # nothing but the header is read yet
            if image.format != "PNG" and content.count(_START_OF_SCAN) > MAX_SCANS:
                raise PictureError(f"it has more than {MAX_SCANS} scans")
            return image.convert(mode)
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("it is neither a JPEG nor a PNG") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow raises whatever the broken bytes lead it to
        raise PictureError(f"it cannot be read: {error}") from error


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
