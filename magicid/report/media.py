"""Pictures and clips as data URIs, made small where they are large, under one budget for the whole file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import av
import numpy as np
from PIL import Image

from magicid import storage
from magicid.clips import Frames, decode_mp4
from magicid.errors import MagicIDError
from magicid.run import Run

BUDGET = 16 * 2**20  # bytes of mp4 before base64, which makes a third more of them
KEEP_BYTES = 96 * 2**10  # clips up to this size go in as they are
PREVIEW_SIDE = 320  # px, longer side of clips that are encoded again
PHOTO_SIDE = 240
POSTER_SIDE = 192


@dataclass(frozen=True)
class Video:
    """A clip in the page: `key` finds its data, `poster` is its first frame."""

    key: str
    poster: str
    frames: int
    fps: int
    width: int
    height: int


@dataclass
class Media:
    """Collects the clips of one report; each file goes in once, however often it is shown."""

    run: Run
    clips: dict[str, str] = field(default_factory=dict)  # key -> data URI
    spent: int = 0
    left_out: int = 0
    _known: dict[str, Video | str] = field(default_factory=dict)

    def video(self, uri: str | None) -> Video | str:
        """The clip at a URI of the run, or why it cannot be shown."""
        if uri is None:
            return "no clip"
        if uri not in self._known:
            self._known[uri] = self._load(uri)
        return self._known[uri]

    def photo(self, uri: str) -> str | None:
        """A reference photo as a data URI; None when it cannot be read."""
        try:
            with Image.open(io.BytesIO(storage.read_bytes(self.run.path(uri)))) as image:
                return picture(image.convert("RGB"), PHOTO_SIDE)
        except (MagicIDError, OSError, ValueError):
            return None

    def _load(self, uri: str) -> Video | str:
        try:
            data = storage.read_bytes(self.run.path(uri))
            frames, fps = decode_mp4(data)
        except MagicIDError as error:
            return error.problem
        if len(data) > KEEP_BYTES:
            data = preview(frames, fps)
        if self.spent + len(data) > BUDGET:
            self.left_out += 1
            return f"left out to keep this file small; see {uri}"
        self.spent += len(data)
        key = f"c{len(self.clips)}"
        self.clips[key] = data_uri("video/mp4", data)
        height, width = frames.shape[1:3]
        return Video(key, picture(Image.fromarray(frames[0]), POSTER_SIDE), len(frames), fps, width, height)


def data_uri(kind: str, data: bytes) -> str:
    """Bytes as a base64 data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(image: Image.Image, side: int) -> str:
    """An image as a data URI, its longer side at most `side` px: PNG where it is small, else JPEG."""
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) <= 96:
        image.save(buffer, "PNG")
        return data_uri("image/png", buffer.getvalue())
    image.save(buffer, "JPEG", quality=86)
    return data_uri("image/jpeg", buffer.getvalue())


def preview(frames_FHWC: Frames, fps: int) -> bytes:
    """A small mp4 of a large clip, for looking at: longer side at most PREVIEW_SIDE px, even sides."""
    height, width = frames_FHWC.shape[1:3]
    scale = min(1.0, PREVIEW_SIDE / max(height, width))
    new_height, new_width = (max(2, round(side * scale / 2) * 2) for side in (height, width))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "25", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = new_width, new_height, "yuv420p"
        for pixels in frames_FHWC:
            small = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.LANCZOS)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(small), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
