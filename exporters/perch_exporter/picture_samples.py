"""Golden pictures: bytes that go through the whole ensemble, as a client's do. convert makes them, publish and golden read them.

Synthetic, of several sizes and of both formats, so that resizing, cropping and decoding have something to do.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from perch_exporter.contract import Preprocessing, Reason, TensorSpec
from perch_exporter.failure import StepFailed
from perch_exporter.samples import Array, make_inputs

PICTURES_LIMIT = 32 * 2**20
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_STRETCHES = ((1.0, 1.0), (1.3, 1.6), (1.5, 1.2), (0.8, 0.9))
"""Height and width of the pictures, in the network's own."""


def make_pictures(asked: Preprocessing, spec: TensorSpec, seed: str, count: int) -> list[bytes]:
    """The same for the same seed and the same Pillow, which only convert's image has to have."""
    from PIL import Image

    height, width = asked.size(spec.shape)
    channels = 3 if asked.decode == "RGB" else 1
    stretches = _STRETCHES if asked.resize or asked.center_crop else _STRETCHES[:1]
    sizes = [(round(height * tall), round(width * wide)) for tall, wide in stretches]
    largest = TensorSpec(name="image", data_type="FP32", shape=(channels, max(h for h, _ in sizes), max(w for _, w in sizes)))
    fields = make_inputs([largest], seed, count)["image"]
    pictures = []
    for index, field in enumerate(fields):
        tall, wide = sizes[index % len(sizes)]
        pixels = np.clip(127.5 + 64 * field[:, :tall, :wide], 0, 255).astype(np.uint8).transpose(1, 2, 0)
        image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        packed = io.BytesIO()
        if index % 2:
            image.save(packed, "PNG")
        else:
            image.save(packed, "JPEG", quality=90)
        pictures.append(packed.getvalue())
    return pictures


def prepare_pictures(pictures: Sequence[bytes], asked: Preprocessing, spec: TensorSpec) -> dict[str, Array]:
    """The network's input for them, by the very code that serves. Needs Pillow."""
    from perch_exporter.pictures import Recipe, prepare

    recipe = Recipe.from_fields(json.loads(asked.to_json()), list(spec.shape))
    return {spec.name: np.stack([prepare(picture, recipe) for picture in pictures])}


def save_pictures(pictures: Sequence[bytes], path: Path) -> None:
    np.savez(path, allow_pickle=False, **{str(place): np.frombuffer(p, np.uint8) for place, p in enumerate(pictures)})
    if path.stat().st_size > PICTURES_LIMIT:
        raise StepFailed(
            Reason.SHAPE_MISMATCH, f"golden pictures take {path.stat().st_size:,} bytes, more than {PICTURES_LIMIT:,}"
        )


def load_pictures(path: Path, count: int) -> list[bytes]:
    """Raises OutputRejected where the file is anything else than so many JPEGs and PNGs, stored plainly."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise _rejected("an entry is compressed")
        with np.load(path, allow_pickle=False) as file:
            if sorted(file.files) != sorted(str(place) for place in range(count)):
                raise _rejected(f"it holds {len(file.files)} entries, and there are {count} golden samples")
            arrays = [file[str(place)] for place in range(count)]
    except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, NotImplementedError) as error:
        raise _rejected(f"{type(error).__name__}: {error}") from error
    # A member that does not begin as an array comes back as bytes.
    if not all(isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 1 for array in arrays):
        raise _rejected("an entry is not a row of bytes")
    pictures = [array.tobytes() for array in arrays]
    if not all(picture.startswith(_MAGIC) for picture in pictures):
        raise _rejected("an entry is neither a JPEG nor a PNG")
    return pictures


def _rejected(why: str) -> StepFailed:
    return StepFailed(Reason.OUTPUT_REJECTED, f"pictures.npz cannot be used: {why}")
