"""Clips survive MP4, at their true rate; photos become static clips; broken files are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from magicid.clips import decode_mp4, encode_mp4, inflate_photo, pan_photo, read_clip
from magicid.errors import StorageError
from magicid.storage import write_bytes


def moving_square(frames: int = 13, size: int = 48) -> np.ndarray:
    """A smooth coloured background with an orange square that moves 2 px per frame."""
    y, x = np.mgrid[:size, :size] / size
    background = np.stack([80 + 90 * x, 90 + 100 * y, 160 - 60 * x], -1)
    clip = np.repeat(background[None], frames, axis=0)
    for t in range(frames):
        clip[t, 16:32, 2 * t : 2 * t + 16] = (230, 140, 40)
    return clip.astype(np.uint8)


@pytest.mark.parametrize("fps", [8, 24])
def test_a_small_clip_survives(fps: int) -> None:
    frames = moving_square()
    decoded, decoded_fps = decode_mp4(encode_mp4(frames, fps))
    assert decoded_fps == fps
    assert decoded.shape == frames.shape
    assert decoded.dtype == np.uint8
    error = np.abs(decoded.astype(int) - frames)
    assert error.mean() < 2.0
    assert np.abs(decoded.mean((0, 1, 2)) - frames.mean((0, 1, 2))).max() < 1.0  # no colour shift


def test_flat_colours_come_back_exactly_to_two_levels() -> None:
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 250, 250), (12, 12, 12)]:
        frames = np.full((5, 32, 32, 3), colour, np.uint8)
        decoded, _ = decode_mp4(encode_mp4(frames, 8))
        assert np.abs(decoded.astype(int) - frames).max() <= 3


def test_the_same_frames_give_the_same_bytes_and_back_in_every_process() -> None:
    """Also where fresh memory holds something else: what an encoder reads before it writes shows here (glibc)."""
    code = (
        "from hashlib import sha256; from magicid.clips import *; from tests.test_clips import moving_square\n"
        "for size in (48, 64, 96):\n"
        "    data = encode_mp4(moving_square(13, size), 8)\n"
        "    print(sha256(data).hexdigest(), sha256(decode_mp4(data)[0].tobytes()).hexdigest())"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MALLOC_PERTURB_": str(perturb)},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for perturb in (0, 85, 170, 255)
    ]
    assert len(printed[0].split()) == 6
    assert len(set(printed)) == 1


def test_one_frame_is_a_clip() -> None:
    decoded, fps = decode_mp4(encode_mp4(moving_square(1), 24))
    assert (len(decoded), fps) == (1, 24)


@pytest.mark.parametrize("shape", [(0, 16, 16, 3), (5, 15, 16, 3), (5, 16, 16, 4), (16, 16, 3)])
def test_impossible_frames_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        encode_mp4(np.zeros(shape, np.uint8), 8)


@pytest.mark.parametrize("keep", [0, 100, 1500])
def test_a_truncated_clip_is_an_error_that_names_the_file(tmp_path, keep: int) -> None:
    data = encode_mp4(moving_square(), 8)
    assert len(data) > 2000
    write_bytes(tmp_path / "clip.mp4", data[:keep])
    with pytest.raises(StorageError, match=r"clip\.mp4"):
        read_clip(str(tmp_path / "clip.mp4"))


def test_text_is_not_a_clip() -> None:
    with pytest.raises(StorageError, match="cannot decode"):
        decode_mp4(b"this is a text" * 100)


def test_read_clip_reads_what_was_written(tmp_path) -> None:
    write_bytes(tmp_path / "clip.mp4", encode_mp4(moving_square(), 8))
    frames, fps = read_clip(str(tmp_path / "clip.mp4"))
    assert frames.shape == (13, 48, 48, 3)
    assert fps == 8


def test_a_photo_is_cropped_at_the_centre_and_repeated() -> None:
    photo = np.zeros((40, 80, 3), np.uint8)
    photo[:, 20:60] = (10, 200, 30)  # the centre square
    clip = inflate_photo(photo, 5, 40, 40)
    assert clip.shape == (5, 40, 40, 3)
    assert (clip == (10, 200, 30)).all()


def test_resizing_is_antialiased() -> None:
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    clip = inflate_photo(np.repeat(checkerboard[..., None], 3, -1), 1, 16, 16)
    assert np.abs(clip.astype(int) - 127).max() <= 24


def test_a_panned_photo_wanders_smoothly_and_comes_from_its_seed() -> None:
    photo = np.zeros((96, 96, 3), np.uint8)
    photo[40:56, 40:56] = (250, 120, 30)  # 8 px of 48, in the middle
    clip = pan_photo(photo, 25, 48, 48, seed=3)
    assert clip.shape == (25, 48, 48, 3)
    assert clip.dtype == np.uint8
    weight = clip[..., 0].astype(float)
    y, x = np.mgrid[:48, :48]
    centres = np.array([[(w * x).sum(), (w * y).sum()] / w.sum() for w in weight])
    away = np.abs(centres - 23.5)
    assert away.max(0) == pytest.approx([0.1 * 48, 0.083 * 48], abs=0.8), "by up to a tenth to each side, and no more"
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    assert 0 < steps.max() < 3 * 0.15 * 48 / 8, "no jumps"
    assert np.array_equal(clip, pan_photo(photo, 25, 48, 48, seed=3))
    assert not np.array_equal(clip, pan_photo(photo, 25, 48, 48, seed=4))
