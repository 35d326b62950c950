"""Clips: frames <-> H.264 MP4 bytes, and a photo inflated to a static clip.

Frames are uint8 RGB (F, H, W, 3). Small clips are what rewards are measured on, so the encoding is near lossless:
CRF 8, where the chroma subsampling of yuv420p (the only format every browser plays) is the larger error.
"""

from __future__ import annotations

import io

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from numpy.typing import NDArray
from PIL import Image

from magicid.errors import StorageError
from magicid.storage import read_bytes

Frames = NDArray[np.uint8]  # (F, H, W, 3) RGB

# x264's lookahead reads memory that nobody wrote when the picture is small, and what it does depends on the number of
# threads: without it, and with one thread, the same frames are the same bytes in every process and on every machine.
_X264 = {"crf": "8", "preset": "medium", "x264-params": "mbtree=0:bframes=0:scenecut=0:rc-lookahead=0:weightp=0"}
# Without these flags each conversion between RGB and YUV darkens the picture by a level.
_EXACT = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
)
_BT709 = 1  # AVCOL_SPC_BT709, AVCOL_PRI_BT709 and AVCOL_TRC_BT709 share this number


def encode_mp4(frames_FHWC: Frames, fps: int) -> bytes:
    """Frames uint8 RGB (F, H, W, 3) as an H.264 MP4 that plays at `fps`; H and W even.

    The index comes last, so a truncated file cannot be mistaken for a whole one.

    Raises:
        ValueError: not uint8 (F, H, W, 3), no frame, an odd height or width, or fps < 1.
    """
    frames = np.asarray(frames_FHWC)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"frames must be uint8 (F, H, W, 3) with F > 0, not {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2 or fps < 1:
        raise ValueError(f"height and width must be even and fps at least 1, not {height}x{width} at {fps} fps")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=_X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        for pixels in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode_mp4(data: bytes) -> tuple[Frames, int]:
    """The frames uint8 RGB (F, H, W, 3) of a video file's first video stream, and its frames per second, rounded.

    Raises:
        StorageError: not a video, or truncated: fewer frames than its index names.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24", interpolation=_EXACT) for frame in container.decode(stream)]
            expected, rate = stream.frames, stream.average_rate
    except (av.FFmpegError, IndexError, OSError) as error:
        raise StorageError(f"cannot decode the clip: {error}", "remove the file and run again") from error
    if not frames or len(frames) < expected:
        raise StorageError(
            f"the clip is truncated: {len(frames)} of {expected} frames can be decoded", "remove the file and run again"
        )
    return np.stack(frames), round(float(rate or 1))


def read_clip(location: str) -> tuple[Frames, int]:
    """Frames and fps of a clip on storage. Raises StorageError: missing, not a video, truncated."""
    data = read_bytes(location)
    try:
        return decode_mp4(data)
    except StorageError as error:
        raise StorageError(f"{location}: {error.problem}", error.action) from error


def inflate_photo(image_HWC: NDArray[np.uint8], frames: int, height: int, width: int) -> Frames:
    """A photo as a static clip uint8 (F, height, width, 3): centre-cropped to the clip's aspect, resized with
    antialiasing, repeated (paper, section on the initial fine-tune and on V_id)."""
    photo_height, photo_width = image_HWC.shape[:2]
    scale = min(photo_height / height, photo_width / width)
    crop_height, crop_width = scale * height, scale * width
    top, left = (photo_height - crop_height) / 2, (photo_width - crop_width) / 2
    resized = Image.fromarray(image_HWC).resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, left + crop_width, top + crop_height)
    )
    return np.repeat(np.asarray(resized)[None], frames, axis=0)


def pan_photo(image_HWC: NDArray[np.uint8], frames: int, height: int, width: int, seed: int) -> Frames:
    """A photo as a clip uint8 (F, height, width, 3) in which it wanders, turns and comes nearer, smoothly.

    `inflate_photo` under a similarity that swings around none: by up to a tenth of the picture to each side, 8 degrees
    and 8 % of size, at a half to one and a half periods a clip. What lies beyond the border is its mirror image.

    Args:
        seed: of the phases and periods.
    """
    random = np.random.default_rng(seed)
    phases, periods = random.uniform(0, 2 * np.pi, 4), random.uniform(0.5, 1.5, 4)
    swings = np.sin(np.linspace(0, 2 * np.pi, frames)[:, None] * periods + phases)  # (F, 4)
    still = inflate_photo(image_HWC, 1, height, width)[0]
    made = []
    for x, y, turn, size in swings:
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), 8 * turn, 1.06 * (1 + 0.08 * size))
        matrix[:, 2] += (0.1 * width * x, 0.083 * height * y)
        made.append(
            cv2.warpAffine(still, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        )
    return np.stack(made)
