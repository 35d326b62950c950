"""Photos from outside: good ones come out upright and exact, bad ones as an error that names file, fault and action."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from magicid.errors import PhotoError
from magicid.photos import decode_photo
from magicid.recipe import Identities

LIMITS = Identities()
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes of compressed zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    assert np.array_equal(decode_photo(encoded(Image.fromarray(PIXELS), kind), "a.png", LIMITS), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_come_back_nearly(kind: str) -> None:
    smooth = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (1, 48, 3))
    decoded = decode_photo(encoded(Image.fromarray(smooth), kind, quality=95), "photo.png", LIMITS)  # the name lies
    assert np.abs(decoded.astype(int) - smooth).max() <= 8


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation: int, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_photo(encoded(Image.fromarray(PIXELS), "PNG", exif=exif), "a.png", LIMITS)
    assert np.array_equal(decoded, np.rot90(PIXELS, turn))


def test_other_pixel_types_become_rgb() -> None:
    grey = PIXELS[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=-1)
    assert np.array_equal(decode_photo(encoded(Image.fromarray(grey)), "a.png", LIMITS), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decode_photo(encoded(deep), "a.png", LIMITS), expected)
    clear = np.dstack([PIXELS, np.zeros((30, 20), np.uint8)])
    assert (decode_photo(encoded(Image.fromarray(clear)), "a.png", LIMITS) == 255).all()
    palette = Image.fromarray(PIXELS).quantize(16)
    assert np.array_equal(decode_photo(encoded(palette), "a.png", LIMITS), np.asarray(palette.convert("RGB")))


def test_a_phones_multi_picture_jpeg_is_its_first_picture() -> None:
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    decoded = decode_photo(encoded(first, "MPO", save_all=True, append_images=[second]), "a.jpg", LIMITS)
    assert np.abs(decoded.astype(int) - (254, 0, 0)).max() <= 2


def bad_photos() -> dict[str, tuple[bytes, str]]:
    whole_png = encoded(Image.fromarray(PIXELS))
    whole_jpeg = encoded(Image.fromarray(np.tile(PIXELS, (8, 8, 1))), "JPEG")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green")]
    animation = {"save_all": True, "append_images": frames[1:]}
    corrupt = bytearray(whole_png)
    corrupt[60:120] = bytes(60)
    return {
        "empty": (b"", "is empty"),
        "text named png": (b"I am not a picture.\n" * 10, "is text, not an image"),
        "html error page": ("<html>Forbidden – 403</html>".encode(), "is text, not an image"),
        "random bytes": (bytes(range(256)) * 4, "is not an image"),
        "truncated png": (whole_png[: len(whole_png) // 2], "truncated or corrupt"),
        "truncated jpeg": (whole_jpeg[: len(whole_jpeg) // 2], "truncated or corrupt"),
        "corrupt png": (bytes(corrupt), "truncated or corrupt"),
        "header only": (whole_png[:20], "not an image|truncated or corrupt"),
        "animated gif": (encoded(frames[0], "GIF", **animation), "animated"),
        "animated png": (encoded(frames[0], "PNG", **animation), "animated"),
        "animated webp": (encoded(frames[0], "WEBP", **animation), "animated"),
        "two-page tiff": (encoded(frames[0], "TIFF", **animation), "animated"),
        "bomb over our limit": (png_header(10_000, 6_000), r"10000x6000\) has more than 50 megapixels"),
        "bomb over Pillow's limit": (png_header(60_000, 60_000), "more than 50 megapixels"),
        "pdf": (b"%PDF-1.4\n\xff\xfe" + bytes(200), "is not an image"),
    }


@pytest.mark.parametrize("name", list(bad_photos()))
def test_bad_photos_are_named(name: str) -> None:
    data, message = bad_photos()[name]
    with pytest.raises(PhotoError, match=message) as caught:
        decode_photo(data, "ada/03.png", LIMITS)
    assert caught.value.problem.startswith("ada/03.png")
    assert caught.value.action


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(PhotoError, match="megapixels"):
        decode_photo(png_header(8_000, 7_000), "a.png", LIMITS)


def test_the_byte_limit() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise))
    with pytest.raises(PhotoError, match=r"has 0\.2 MB, more than 0\.1"):
        decode_photo(data, "a.png", Identities(max_megabytes=0.1))
    assert decode_photo(data, "a.png", LIMITS).shape == (300, 200, 3)
