"""Pictures that anybody sends: what is read as training reads it, and that everything else is refused by a sentence.

The comparison with torchvision itself stands in test_exporter_torchvision.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perch_exporter import pictures
from perch_exporter.pictures import MAX_BYTES, MAX_PIXELS, PictureError, Recipe, prepare

RGB = {"decode": "RGB", "interpolation": "Bilinear", "layout": "CHW"}


def recipe(shape: tuple[int, ...] = (3, 8, 6), **fields: Any) -> Recipe:
    return Recipe.from_fields({**RGB, **fields}, list(shape))


def packed(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def noise(height: int = 8, width: int = 6, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[:, :, 0])


def png(width: int, height: int, *, bits: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    """A PNG whose header says what no file of its size can hold."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_a_picture_as_it_is_becomes_its_pixels_from_0_to_1() -> None:
    image = noise()
    tensor = prepare(packed(image), recipe())
    assert tensor.dtype == np.float32
    assert tensor.flags["C_CONTIGUOUS"]
    assert np.array_equal(tensor, np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255))


def test_layout_mean_and_std_are_each_applied_to_their_channel() -> None:
    image = noise()
    plain = prepare(packed(image), recipe())
    told = recipe((8, 6, 3), layout="HWC", mean=["0.1", "0.2", "-0.3"], std=["0.5", "2", "4"])
    expected = (plain.transpose(1, 2, 0) - np.float32([0.1, 0.2, -0.3])) / np.float32([0.5, 2, 4])
    assert np.array_equal(prepare(packed(image), told), expected)


def test_base64_text_is_taken_for_the_picture_that_it_stands_for() -> None:
    for form in ("PNG", "JPEG"):
        content = packed(noise(), form)
        assert np.array_equal(prepare(base64.b64encode(content), recipe()), prepare(content, recipe()))
    with pytest.raises(PictureError, match="base64"):
        prepare(base64.b64encode(packed(noise()))[:-3] + b"*", recipe())


@pytest.mark.parametrize(
    ("what", "image", "options"),
    [
        ("grey", noise(channels=1), {}),
        ("transparent", noise(channels=4), {}),
        ("a palette", noise().quantize(7), {}),
        ("a palette with a transparent colour", noise().quantize(7), {"transparency": 0}),
        ("two colours", noise(channels=1).convert("1"), {}),
        ("grey, transparent", noise(channels=1).convert("LA"), {}),
    ],
)
def test_other_colours_are_read_as_pillow_converts_them(what: str, image: Image.Image, options: dict[str, Any]) -> None:
    content = packed(image, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(prepare(content, recipe()), expected)


def test_cmyk_is_read_and_exif_turns_nothing_as_in_torchvisions_loader() -> None:
    content = packed(noise().convert("CMYK"), "JPEG")
    assert prepare(content, recipe()).shape == (3, 8, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = packed(noise(), "JPEG", exif=exif)
    assert np.array_equal(prepare(turned, recipe()), prepare(packed(noise(), "JPEG"), recipe()))


def animation() -> bytes:
    return packed(noise(), save_all=True, append_images=[noise(channels=1).convert("RGB")])


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def text_bomb() -> bytes:
    content = b"Comment\x00\x00" + zlib.compress(bytes(2**27))
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    good = packed(noise())
    return good[:33] + chunk + good[33:]


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    content = packed(noise(64, 64), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 100 + content[-2:]


def many_segments() -> bytes:
    content = packed(noise(), "JPEG")
    return content[:2] + b"\xff\xfe\x00\x02" * 5000 + content[2:]


def many_chunks() -> bytes:
    content = packed(noise())
    return content[:33] + (bytes(4) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))) * 70_000 + content[33:]


HOSTILE: list[tuple[str, Callable[[], bytes], str]] = [
    ("nothing", lambda: b"", "neither a JPEG nor a PNG"),
    ("text", lambda: b"<svg/>", "neither a JPEG nor a PNG"),
    ("another format", lambda: packed(noise(), "GIF"), "neither a JPEG nor a PNG"),
    ("another library's format", lambda: packed(noise(), "TIFF"), "neither a JPEG nor a PNG"),
    ("PostScript, which would be run", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "neither a JPEG nor a PNG"),
    ("a truncated JPEG", lambda: packed(noise(64, 64), "JPEG")[:-200], "truncated"),
    ("a truncated PNG", lambda: packed(noise(64, 64))[:-200], "cannot be read"),
    ("a JPEG's first bytes", lambda: packed(noise(), "JPEG")[:20], "neither a JPEG nor a PNG"),
    ("a broken checksum", lambda: flipped(packed(noise(64, 64)), 5000), "cannot be read"),
    ("a PNG with no data", lambda: png(8, 6), "cannot be read"),
    ("a decompression bomb", lambda: png(30_000, 30_000, data=bytes(30_000_000)), "more than 25,000,000"),
    ("just too many pixels", lambda: png(5001, 5000), "5001 by 5000 pixels, more than 25,000,000"),
    ("a side of 2^31 - 1", lambda: png(2**31 - 1, 1), "more than 25,000,000"),
    ("no width", lambda: png(0, 8), "neither a JPEG nor a PNG|cannot be read"),
    ("a comment that unpacks to 128 MiB", text_bomb, "cannot be read|neither a JPEG nor a PNG"),
    ("16 bits", lambda: packed(Image.fromarray(np.full((8, 6), 40_000, np.uint16))), "save it with 8"),
    ("an animation", animation, "it is animated"),
    ("too many bytes", lambda: b"\xff\xd8\xff" + bytes(MAX_BYTES), "33,554,435 bytes"),
    ("a hundred scans", many_scans, "more than 64 scans"),
    ("five thousand empty segments", many_segments, "more than 4,096 segments"),
    ("seventy thousand empty chunks", many_chunks, "more than 65,536 chunks"),
    ("another size", lambda: packed(noise(6, 8)), "8 pixels wide and 6 high, this model takes 6 and 8"),
]


@pytest.mark.parametrize(("make", "says"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused_by_a_sentence(make: Callable[[], bytes], says: str) -> None:
    with pytest.raises(PictureError, match=says):
        prepare(make(), recipe())


@pytest.mark.parametrize(
    ("limit", "make", "shape"),
    [
        ("MAX_PIXELS", lambda: packed(Image.new("L", (40_000, 1))), (1, 28, 28)),
        ("MAX_SCANS", many_scans, (1, 28, 28)),
        ("MAX_BYTES", lambda: packed(noise(64, 64)) + bytes(MAX_BYTES), (1, 28, 28)),
        ("MAX_SEGMENTS", many_segments, (1, 28, 28)),
        ("MAX_CHUNKS", many_chunks, (1, 28, 28)),
    ],
)
def test_without_its_limit_the_picture_is_read(
    monkeypatch: pytest.MonkeyPatch, limit: str, make: Callable[[], bytes], shape: tuple[int, ...]
) -> None:
    told = recipe(shape, decode="L", resize=[28], centerCrop=[28])
    with pytest.raises(PictureError):
        prepare(make(), told)
    monkeypatch.setattr(pictures, limit, 2**40)
    assert prepare(make(), told).shape == shape


def test_a_progressive_picture_is_no_harm() -> None:
    assert prepare(packed(noise(), "JPEG", progressive=True), recipe()).shape == (3, 8, 6)


VIDEO = b"\x00\x00\x00\x18ftypmp42" + b"\xff\xda" * 1000 + np.random.default_rng(9).bytes(500_000)


def with_thumbnail() -> bytes:
    thumbnail = packed(noise(60, 80), "JPEG")
    segment = b"Exif\x00\x00" + thumbnail
    content = packed(noise(64, 64), "JPEG")
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:]


def two_pictures() -> bytes:
    return packed(noise(64, 64), "MPO", save_all=True, append_images=[noise(64, 64).rotate(90)])


BEFORE: list[tuple[str, Callable[[], bytes]]] = [
    ("a JPEG", lambda: packed(noise(64, 64), "JPEG")),
    ("a progressive JPEG", lambda: packed(noise(64, 64), "JPEG", progressive=True)),
    ("a JPEG with restarts", lambda: packed(noise(64, 64), "JPEG", restart_marker_blocks=1)),
    ("a JPEG with a thumbnail, which has an end of its own", with_thumbnail),
    ("two pictures in one file", two_pictures),
    ("a PNG", lambda: packed(noise(64, 64))),
]


@pytest.mark.parametrize("make", [case[1] for case in BEFORE], ids=[case[0] for case in BEFORE])
def test_what_lies_behind_a_pictures_end_is_no_part_of_it(make: Callable[[], bytes]) -> None:
    """As in a phone's motion photo, whose video may hold anything."""
    content = make()
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    for behind in (b"", VIDEO, many_scans()):
        assert np.array_equal(prepare(content + behind, recipe((3, 64, 64))), expected)


def test_pixels_beyond_a_pictures_bytes_are_taken_at_a_rate_and_others_always() -> None:
    now = [100.0]
    budget = pictures.Budget(2, lambda: now[0])
    at_once = 2 * pictures.UNFOLDED_PER_SECOND * pictures.UNFOLDED_SECONDS
    budget.take(at_once + pictures.FREE_PIXELS, 0)
    with pytest.raises(
        PictureError, match="its 73,000 bytes unfold to 25,000,000 pixels, and 50,000,000 of such pixels are taken"
    ):
        budget.take(25_000_000, 73_000)
    for photo in ((12_000_000, 3_000_000), (1_000_000, 1000), (25_000_000, 1_500_000)):
        budget.take(*photo)
    now[0] += 1
    budget.take(25_000_000, 73_000)
    budget.take(25_000_000, 73_000)
    with pytest.raises(PictureError):
        budget.take(25_000_000, 73_000)
    now[0] += 3600
    budget.take(at_once + pictures.FREE_PIXELS, 0)
    with pytest.raises(PictureError):
        budget.take(2 * pictures.FREE_PIXELS, 0)


def test_a_picture_that_is_refused_for_the_budget_is_not_decoded() -> None:
    plain = packed(Image.new("RGB", (4000, 4000)))
    budget = pictures.Budget(1, lambda: 0.0)
    told = recipe((3, 28, 28), resize=[28], centerCrop=[28])
    assert prepare(plain, told, budget).shape == (3, 28, 28)
    with pytest.raises(PictureError, match="send it again later"):
        assert all(budget.take(16_000_000, len(plain)) is None for _ in range(100))
    with pytest.raises(PictureError, match="unfold to 16,000,000 pixels"):
        prepare(plain[:200], told, budget)  # no more than its header is there
    assert prepare(packed(noise(400, 400), "JPEG"), told, budget).shape == (3, 28, 28)


def test_a_thread_of_a_picture_is_not_resized_to_more_pixels_than_are_allowed() -> None:
    thread = packed(Image.new("RGB", (20_000, 1)))
    with pytest.raises(PictureError, match="it would be resized to more than"):
        prepare(thread, recipe((3, 224, 224), resize=[256], centerCrop=[224]))
    assert MAX_PIXELS < 20_000 * 256 * 256
    assert prepare(packed(Image.new("RGB", (90, 1))), recipe((3, 224, 224), resize=[256], centerCrop=[224])).shape == (
        3,
        224,
        224,
    )


@pytest.mark.parametrize("cut", range(0, 700, 23))
def test_a_picture_that_ends_anywhere_is_refused_or_read_and_raises_nothing_else(cut: int) -> None:
    for form in ("PNG", "JPEG"):
        try:
            prepare(packed(noise(16, 16), form)[:cut], recipe((3, 16, 16)))
        except PictureError:
            continue
