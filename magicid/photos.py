"""Reference photos from outside, decoded safely: every limit is checked on the file's header before pixels are made."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from magicid import recipe
from magicid.errors import PhotoError
from magicid.storage import read_bytes

# Only these decoders are given the bytes. GIF is here to be told that it is animated.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_NAMES = "JPEG, PNG, WebP, TIFF or BMP"


def decode_photo(data: bytes, name: str, limits: recipe.Identities) -> NDArray[np.uint8]:
    """A photo's pixels uint8 RGB (H, W, 3), upright (EXIF orientation applied), transparency on white.

    Args:
        data: the bytes of the file; its name's ending is not trusted.
        name: what the photo is called in errors.

    Raises:
        PhotoError: empty, too large in bytes or pixels, text, another format, animated, truncated or corrupt.
    """
    check_size(len(data), name, limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; whatever matters is an error here
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_header(image, name, limits)
                image.load()
                return _upright_rgb(image)
        except PhotoError:
            raise
        except UnidentifiedImageError as error:
            kind = "is text, not an image" if _is_text(data) else "is not an image that can be read"
            raise PhotoError(f"{name} {kind}", f"give a photo as {_NAMES}") from error
        except Image.DecompressionBombError as error:
            raise _too_many_pixels(name, limits) from error
        except Exception as error:  # decoders of broken files raise a dozen different types
            raise PhotoError(f"{name} is truncated or corrupt: {error}", "give the whole file again") from error


def check_size(size: int, name: str, limits: recipe.Identities) -> None:
    """Refuse a file by its size in bytes alone. Raises PhotoError: empty, or over `max_megabytes`."""
    if size == 0:
        raise PhotoError(f"{name} is empty", "give the whole file again")
    if size > limits.max_megabytes * 1e6:
        raise PhotoError(
            f"{name} has {size / 1e6:.1f} MB, more than {limits.max_megabytes:g}",
            "give a smaller file, or raise identities.max_megabytes",
        )


def _check_header(image: Image.Image, name: str, limits: recipe.Identities) -> None:
    """Limits that the header alone shows: nothing has been decompressed yet."""
    if image.width * image.height > limits.max_megapixels * 1e6:
        raise _too_many_pixels(name, limits, f" ({image.width}x{image.height})")
    still = image.format == "MPO"  # a phone's JPEG with a preview or depth map behind the photo
    if not still and getattr(image, "n_frames", 1) > 1:
        raise PhotoError(f"{name} is animated, or has several pages", "give one still photo per file")


def _too_many_pixels(name: str, limits: recipe.Identities, size: str = "") -> PhotoError:
    return PhotoError(
        f"{name}{size} has more than {limits.max_megapixels:g} megapixels",
        "give a smaller photo, or raise identities.max_megapixels",
    )


def _upright_rgb(image: Image.Image) -> NDArray[np.uint8]:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        grey = np.asarray(upright).astype(np.float64)
        scale = 255 / 65535 if upright.mode != "F" else 1  # Pillow keeps 16-bit grey as I;16 or I
        pixels = np.clip(np.round(grey * scale), 0, 255).astype(np.uint8)
        return np.repeat(pixels[..., None], 3, axis=-1)
    if upright.has_transparency_data:
        opaque = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(opaque, upright.convert("RGBA"))
    return np.array(upright.convert("RGB"))


def _is_text(data: bytes) -> bool:
    try:
        text = data[:4096].decode("utf-8", errors="strict" if len(data) <= 4096 else "ignore")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def read_image(location: str) -> NDArray[np.uint8]:
    """An image that a run made itself, RGB (H, W, 3). Raises StorageError when it is not there."""
    return np.asarray(Image.open(io.BytesIO(read_bytes(location))).convert("RGB"))
