"""Does it flicker? Both figures are reported beside motion, because optical flow alone takes flicker for motion."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magicid.evaluation.metrics.sample import Columns, Sample


class FlickerMetrics:
    """temporal_flickering."""

    columns = ("temporal_flickering",)

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        return [
            {"temporal_flickering": temporal_flickering(s.frames)}
            if len(s.frames) > 1
            else {"error": "temporal_flickering: the clip has one frame"}
            for s in samples
        ]


def temporal_flickering(frames: NDArray[np.uint8]) -> float:
    """VBench's: 1 - mean absolute difference of consecutive frames / 255; 1 is a frozen clip.

    Huang et al., VBench, CVPR 2024. True motion lowers it as well.

    Args:
        frames: uint8 RGB (F, H, W, 3), F > 1.
    """
    differences = [cv2.absdiff(a, b).mean() for a, b in itertools.pairwise(frames)]
    return 1 - float(np.mean(differences)) / 255


def warp_error(frames: NDArray[np.uint8], flow: NDArray[np.floating[Any]]) -> float:
    """Mean absolute difference, grey levels 0..255, of each frame and the next one brought back along the flow.

    What motion explains is taken out, as in Lai et al., Learning Blind Video Temporal Consistency, ECCV 2018; pixels
    whose target lies outside the frame are left out.

    Args:
        frames: uint8 RGB (F, H, W, 3).
        flow: (F-1, H, W, 2), x and y in px.
    """
    height, width = frames.shape[1:3]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    errors = []
    for first, second, motion in zip(frames[:-1], frames[1:], flow.astype(np.float32)):
        x, y = columns + motion[..., 0], rows + motion[..., 1]
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        back = cv2.remap(second.astype(np.float32), x, y, cv2.INTER_LINEAR)
        difference = np.abs(back - first).mean(-1)
        errors.append(float(difference[inside].mean()) if inside.any() else float(difference.mean()))
    return float(np.mean(errors))
