"""How much moves? VBench's dynamic degree from its definition, and the value behind it.

Huang et al., VBench, CVPR 2024: frames are thinned to about 8 per second by the file's own rate, RAFT (things weights,
20 updates) finds the flow of each consecutive pair, a pair moves when the mean of its largest 5 % of flow magnitudes is
above 6 px at a shorter side of 256 px, and a clip is dynamic when a quarter of its frames' number of pairs move.

The flow is any network's that is no reward. In the face world RAFT is what is optimised against, so OpenCV's DIS stands
in: another algorithm, without a network.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from magicid.evaluation.metrics.flicker import warp_error
from magicid.evaluation.metrics.sample import Columns, Sample, each
from magicid.rewards.frames import checked_frames

MOTION_FPS = 8
TOP_SHARE = 0.05
REFERENCE_SIDE = 256  # px: magnitudes are given for frames of this shorter side
THRESHOLD = 6.0  # px at that size
PAIRS_OF_FRAMES = 4 / 16
RAFT_UPDATES = 20
_FLOW_SIDE = 128  # px: DIS finds nothing in its coarser levels on smaller frames

Flow = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Frames uint8 RGB (F, H, W, 3) to flow float32 (F-1, H, W, 2), x and y in px of these frames."""


class MotionMetrics:
    """dynamic_degree, dynamic_magnitude and warp_error.

    Args:
        flow: `dis_flow`, or `raft_flow` of a folder.
        threads: clips looked at at the same time.
    """

    columns = ("dynamic_degree", "dynamic_magnitude", "warp_error")

    def __init__(self, flow: Flow | None = None, threads: int = 1) -> None:
        self.flow = flow or dis_flow
        self.threads = threads

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        return each(self._one, samples, self.threads)

    def _one(self, sample: Sample) -> Columns:
        try:
            frames = checked_frames(thinned(sample.frames, sample.fps), least=2)
            flow = self.flow(frames)
            tops, side = top_magnitudes(flow), min(frames.shape[1:3])
            return {
                "dynamic_degree": float(is_dynamic(tops, len(frames), side)),
                "dynamic_magnitude": float(tops.mean()) * REFERENCE_SIDE / side,
                "warp_error": warp_error(frames, flow),
            }
        except Exception as error:
            return {"error": f"dynamic_magnitude: {error}"}


def thinned(frames: NDArray[np.uint8], fps: float) -> NDArray[np.uint8]:
    """Every round(fps / 8)-th frame."""
    return frames[:: max(1, round(fps / MOTION_FPS))]


def top_magnitudes(flow: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(F-1,): for each pair the mean of the largest 5 % (at least one) of its flow magnitudes, px."""
    return np.array([top_mean(np.linalg.norm(pair, axis=-1)) for pair in flow], dtype=np.float64)


def top_mean(magnitudes: NDArray[np.floating[Any]]) -> float:
    """Mean of the largest 5 % (at least one) of the values."""
    count = max(1, int(magnitudes.size * TOP_SHARE))
    return float(np.partition(magnitudes.ravel().astype(np.float64), -count)[-count:].mean())


def is_dynamic(tops: NDArray[np.floating[Any]], frames: int, side: int) -> bool:
    """VBench's verdict on one clip.

    Args:
        tops: (F-1,) top magnitudes of its pairs, px.
        frames: number of thinned frames F.
        side: shorter side, px.

    61 frames of 24 fps at 720 px: 5 of 20 pairs above 16.875 px. Where VBench would ask for no pair at all (fewer than
    three frames), one is asked for.
    """
    wanted = max(1, round(PAIRS_OF_FRAMES * frames))
    return int((tops > THRESHOLD * side / REFERENCE_SIDE).sum()) >= wanted


def dynamic_magnitude(frames: NDArray[np.uint8], fps: float, flow: Flow | None = None) -> float:
    """Mean over pairs of the top-5 % magnitude, px per thinned frame at a shorter side of 256 px.

    Raises:
        RewardError: fewer than two frames are left.
    """
    few = checked_frames(thinned(frames, fps), least=2)
    return float(top_magnitudes((flow or dis_flow)(few)).mean()) * REFERENCE_SIDE / min(frames.shape[1:3])


def raft_flow(folder: str | Path, device: str = "cpu", updates: int = RAFT_UPDATES) -> Flow:
    """The flow of a RAFT folder (`config.json`, `model.safetensors`). Raises RewardError when it cannot be loaded."""
    from magicid.rewards.dynamics import MotionReward

    model = MotionReward.from_pretrained(folder, device=device)
    model.updates = updates
    return lambda frames: np.ascontiguousarray(model.flow(frames).transpose(0, 2, 3, 1))


def dis_flow(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """OpenCV's DIS flow (medium preset) float32 (F-1, H, W, 2), x and y in px of the given frames.

    Frames with a shorter side below 128 px are resized up for it, and the flow is scaled back.
    """
    height, width = frames.shape[1:3]
    scale = max(1.0, _FLOW_SIDE / min(height, width))
    size = (round(width * scale), round(height * scale))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    if scale > 1:
        grey = [cv2.resize(image, size, interpolation=cv2.INTER_LINEAR) for image in grey]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = []
    for first, second in itertools.pairwise(grey):
        flow = dis.calc(first, second, None)  # type: ignore[call-overload]
        if scale > 1:
            flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA)
            flow = flow / np.array([size[0] / width, size[1] / height], dtype=np.float32)
        flows.append(flow)
    return np.stack(flows).astype(np.float32)
