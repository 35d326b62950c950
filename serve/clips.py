"""Finished videos on storage: their bytes in parts, a thumbnail, a spritesheet, and their removal.

Pictures are made from the video when they are asked for and kept nowhere, so a deleted video leaves nothing behind.
They carry the video's own claim of where it comes from, signed again.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from magicid import provenance
from magicid.errors import StorageError
from magicid.provenance import Signer
from magicid.storage import file_size, join, open_fs, public_name, remove, remove_partials
from serve.schema import Job

MEDIA_TYPES = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
_CHUNK = 256 << 10
_TILES = 16  # of a spritesheet, row by row in the order of time
_COLUMNS = 4
_TILE_PX = 240  # longer side of a tile
_THUMBNAIL_PX = 640
_DECODING = threading.BoundedSemaphore(2)  # decoders in one process: each takes a core and holds frames


def clip_uri(job_id: str, fence: int) -> str:
    """Where an attempt's clip lies; two workers that both believe to hold a job never write one file."""
    return f"{job_id[-2:]}/{job_id}-{fence}.mp4"


def remove_all(location: str, job: Job) -> None:
    """Remove what any attempt at a job has stored: one that died before it told the record left a clip no record names.

    Args:
        location: of all clips.

    Raises:
        StorageError: a file cannot be removed.
    """
    uris = {clip_uri(job.id, fence) for fence in range(1, job.fence + 1)}
    for uri in sorted(uris | ({job.video_uri} if job.video_uri is not None else set())):
        remove(join(location, uri))
        remove_partials(join(location, uri))


class Clips:
    """The videos under one location, by the URIs of their records. Raises StorageError where storage fails.

    Args:
        signer: signs pictures.
    """

    def __init__(self, location: str, signer: Signer) -> None:
        self._location, self._signer = location, signer

    def size(self, uri: str) -> int:
        """Bytes of a video."""
        return file_size(join(self._location, uri))

    def read(self, uri: str, start: int, stop: int) -> Iterator[bytes]:
        """The bytes [start, stop) in chunks. The file is opened now, so that a missing one is known before."""
        location = join(self._location, uri)
        fs, path = open_fs(location)
        try:
            file = fs.open(path, "rb")
        except Exception as error:  # each object store has its own
            raise StorageError(
                f"cannot read {public_name(location)}: {type(error).__name__}", "check that it exists and is readable"
            ) from error

        def chunks() -> Iterator[bytes]:
            with file:
                file.seek(start)
                left = stop - start
                while left > 0 and (data := file.read(min(_CHUNK, left))):
                    left -= len(data)
                    yield data

        return chunks()

    def thumbnail(self, uri: str) -> bytes:
        """The middle frame as WebP, at most 640 px on its longer side."""
        data = self._whole(uri)
        return self._signed(_encoded(_frames(uri, data, 1, _THUMBNAIL_PX)[0], "WEBP"), data)

    def spritesheet(self, uri: str) -> bytes:
        """16 frames over the whole length, fewer where there are fewer, four in a row, as one JPEG."""
        data = self._whole(uri)
        tiles = _frames(uri, data, _TILES, _TILE_PX)
        width, height = tiles[0].size
        sheet = Image.new("RGB", (width * min(_COLUMNS, len(tiles)), height * math.ceil(len(tiles) / _COLUMNS)))
        for number, tile in enumerate(tiles):
            sheet.paste(tile, (width * (number % _COLUMNS), height * (number // _COLUMNS)))
        return self._signed(_encoded(sheet, "JPEG"), data)

    def remove_all(self, job: Job) -> None:
        """Remove the clips of a job, as `remove_all`."""
        remove_all(self._location, job)

    def _whole(self, uri: str) -> bytes:
        return b"".join(self.read(uri, 0, self.size(uri)))

    def _signed(self, picture: bytes, video: bytes) -> bytes:
        """The picture with the video's claim; as it is where the video makes none."""
        claim = provenance.read(video).claim
        return picture if claim is None else provenance.sign(picture, claim, self._signer)


def _frames(uri: str, data: bytes, wanted: int, longest_px: int) -> list[Image.Image]:
    """Up to `wanted` frames from the middles of equal parts of the video, scaled down to `longest_px`."""
    try:
        with _DECODING, av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            count = stream.frames
            wanted = min(wanted, count)
            chosen = {int((number + 0.5) * count / wanted) for number in range(wanted)}
            return [
                _scaled(frame, longest_px) for number, frame in enumerate(container.decode(stream)) if number in chosen
            ]
    except (av.FFmpegError, IndexError, ZeroDivisionError) as error:
        raise StorageError(f"the video {uri} cannot be decoded: {type(error).__name__}", "make it again") from error


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """The byte range [start, stop) that a Range header asks of `size` bytes.

    None: the whole, because the header is none of `bytes`, is malformed, or asks for several ranges (RFC 9110 lets a
    server ignore these). Raises ValueError: a range outside the file.
    """
    unit, _, value = header.partition("=")
    first, dash, last = value.strip().partition("-")
    digits = first + last
    if unit.strip().lower() != "bytes" or not dash or not digits.isascii() or not digits.isdigit() or len(digits) > 36:
        return None
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= size or start >= stop:
        raise ValueError(f"bytes {start}-{stop} of {size}")
    return start, stop


def _scaled(frame: av.VideoFrame, longest_px: int) -> Image.Image:
    image = Image.fromarray(np.asarray(frame.to_ndarray(format="rgb24")))
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    return image


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return buffer.getvalue()
