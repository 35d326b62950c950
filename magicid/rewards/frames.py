"""What every reward does with the frames of a clip before its model sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid.errors import RewardError


def checked_frames(frames: NDArray[Any], least: int = 1) -> NDArray[np.uint8]:
    """The frames, contiguous, when they are uint8 RGB (F, H, W, 3) with at least `least` frames; else RewardError."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise RewardError(
            f"frames are {frames.dtype} of shape {frames.shape}", "give uint8 RGB frames of shape (F, H, W, 3)"
        )
    if len(frames) < least:
        raise RewardError(f"the clip has {len(frames)} frames", f"give at least {least}")
    return np.ascontiguousarray(frames)


def evenly_spaced(total: int, count: int) -> NDArray[np.int64]:
    """Indices (n,) of n = min(count, total) frames, from the first to the last; the middle one for n = 1."""
    if count >= total:
        return np.arange(total)
    if count == 1:
        return np.array([total // 2])
    return np.round(np.linspace(0, total - 1, count)).astype(np.int64)
