"""How much does the head move? The path length of its smoothed pose, which neither flicker nor jitter lengthens.

A pose is position, turn and size of the head, here as six lengths in half head heights, so that each is about as far as
a point of the face moves: x, y, 0.37 yaw, 0.23 pitch, 0.6 roll, 0.6 log size. Frames are thinned to about 8 per second,
the path is smoothed by (1, 2, 1) / 4, which removes what changes sign with every frame, and its length is per second.
The face world's regressor (`magicid.world.pose`) learned poses from the renderer, which knows them; elsewhere the face
detector's five landmarks give one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from magicid.evaluation.metrics.motion import MOTION_FPS, thinned
from magicid.evaluation.metrics.sample import Columns, Sample, by_shape

if TYPE_CHECKING:
    from magicid.rewards.identity import IdentityReward

LENGTHS = np.array([1.0, 1.0, 0.37, 0.23, 0.6, 0.6])
LEAST_FRAMES = 5


class PoseEstimator(Protocol):
    """A network that sees where the head is."""

    def poses(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Poses (B, F, 6) of clips (B, F, H, W, 3): x, y, yaw, pitch, roll, log size; NaN where there is no head.

        x and y in half head heights of the clip, yaw and pitch in -1..1, roll in radians.
        """


class PoseMetrics:
    """head_motion."""

    columns = ("head_motion",)

    def __init__(self, estimator: PoseEstimator) -> None:
        self.estimator = estimator

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        rows: list[Columns] = [{} for _ in samples]
        for positions in by_shape(samples):
            for position, poses in zip(positions, self._poses([samples[p] for p in positions])):
                rate = samples[position].fps / max(1, round(samples[position].fps / MOTION_FPS))
                rows[position] = head_motion_columns(poses, rate)
        return rows

    def _poses(self, samples: Sequence[Sample]) -> list[NDArray[np.float32]]:
        few = [thinned(sample.frames, sample.fps) for sample in samples]
        if len({len(frames) for frames in few}) == 1:
            return list(self.estimator.poses(np.stack(few)))
        return [self.estimator.poses(frames[None])[0] for frames in few]


def head_motion_columns(poses: NDArray[Any], rate: float) -> Columns:
    """head_motion of poses (F, 6), or why there is none; up to half of the frames may have no head."""
    seen = ~np.isnan(poses).any(1)
    if len(poses) < LEAST_FRAMES or seen.sum() * 2 < len(poses):
        return {"error": f"head_motion: a head is seen in {int(seen.sum())} of {len(poses)} frames"}
    times = np.arange(len(poses))
    whole = np.stack([np.interp(times, times[seen], column[seen]) for column in np.asarray(poses, np.float64).T], 1)
    return {"head_motion": head_motion(whole, rate)}


def head_motion(poses: NDArray[Any], rate: float) -> float:
    """Path length per second of poses (F, 6), half head heights, F >= 5, at `rate` frames per second.

    The ends, which have one neighbour only, are left out.
    """
    path = np.asarray(poses, dtype=np.float64) * LENGTHS
    smooth = (path[:-2] + 2 * path[1:-1] + path[2:]) / 4
    steps = np.linalg.norm(np.diff(smooth, axis=0), axis=1)
    return float(steps.mean() * rate)


class LandmarkPose:
    """Poses from the five landmarks of the largest face, for worlds without a trained regressor.

    The distance of eyes and mouth is two thirds of half a head; the nose tells the turn by where it lies between them.
    """

    def __init__(self, faces: IdentityReward) -> None:
        self.faces = faces

    def poses(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack([self._clip(clip) for clip in frames])

    def _clip(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = [self.faces.detect(frame)[:1] for frame in frames]
        rows = np.full((len(frames), 6), np.nan, np.float32)
        for row, faces in zip(rows, found):
            if faces:
                row[:] = landmark_pose(faces[0].landmarks)
        rows[:, :2] /= np.exp(np.nanmean(rows[:, 5])) if not np.isnan(rows[:, 5]).all() else 1
        return rows


def landmark_pose(landmarks: NDArray[Any]) -> NDArray[np.float64]:
    """One pose (6,) from landmarks (5, 2) in px: left eye, right eye, nose, left and right corner of the mouth.

    x, y in px (of the middle between eyes and mouth), and the log of half a head in px.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    eyes, nose, mouth = points[:2].mean(0), points[2], points[3:].mean(0)
    across = points[1] - points[0]
    roll = float(np.arctan2(across[1], across[0]))
    turn = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    down = turn @ (mouth - eyes)
    middle = (eyes + mouth) / 2
    unit = 1.5 * max(float(np.hypot(*(mouth - eyes))), float(np.hypot(*across)), 1e-6)
    offset = turn @ (nose - middle) / unit
    yaw = (offset[0] - 0.0) / 0.37
    pitch = (offset[1] + 0.02 * np.sign(down[1])) / 0.23
    return np.array([*middle, np.clip(yaw, -2, 2), np.clip(pitch, -2, 2), roll, np.log(unit)])
