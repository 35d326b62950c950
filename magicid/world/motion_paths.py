"""Poses over time: what the head does in each action of the face world."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from magicid.world.drawing import Floats
from magicid.world.language import ACTIONS, STILL

POSE: tuple[str, ...] = ("x", "y", "yaw", "pitch", "roll", "scale", "mouth", "eyes", "gaze", "smile")
"""Columns of a pose: x, y in frame widths (head centre before it tips), yaw and pitch in -1..1 (1 = far right, far down
in the picture), roll in radians, scale (1 = the usual head), mouth and eyes opening in 0..1, gaze in -1..1, smile."""

X, Y, YAW, PITCH, ROLL, SCALE, MOUTH, EYES, GAZE, SMILE = range(len(POSE))
_NAMES = {name: index for index, name in enumerate(ACTIONS)}


def _smooth(part: NDArray[np.float64]) -> NDArray[np.float64]:
    part = np.clip(part, 0, 1)
    return part * part * (3 - 2 * part)


def _one_path(action: int, rng: np.random.Generator, frames: int) -> NDArray[np.float64]:
    """Pose (F, K) of one clip. ``u`` runs over 0..1 whatever the number of frames."""
    u = np.linspace(0, 1, frames)
    side = rng.choice([-1.0, 1.0])
    phase = rng.random()
    strength = rng.random()
    speed = rng.random()
    pose = np.zeros((frames, len(POSE)))
    sway = 0.006 * np.sin(2 * np.pi * (u * rng.uniform(0.4, 0.8) + rng.random()))
    pose[:, X] = 0.5 + rng.uniform(-0.06, 0.06) + sway
    pose[:, Y] = 0.49 + rng.uniform(-0.025, 0.025)
    pose[:, YAW] = rng.uniform(-0.15, 0.15)
    pose[:, PITCH] = rng.uniform(-0.12, 0.12)
    pose[:, ROLL] = rng.uniform(-0.05, 0.05)
    pose[:, SCALE] = rng.uniform(0.94, 1.06)
    pose[:, EYES] = 1.0
    pose[:, GAZE] = rng.uniform(-0.3, 0.3)
    pose[:, SMILE] = rng.uniform(0.2, 1.0)
    if frames > 4 and rng.random() < 0.5:  # a blink
        at = int(rng.integers(2, frames - 2))
        pose[at, EYES], pose[at + 1, EYES] = 0.15, 0.55
    name = ACTIONS[action] if action != STILL else ""
    if name == "nods":
        pose[:, PITCH] += (0.7 + 0.3 * strength) * np.sin(2 * np.pi * ((1.8 + 0.9 * speed) * u + phase))
    elif name == "shakes the head":
        pose[:, YAW] = (0.7 + 0.25 * strength) * np.sin(2 * np.pi * ((1.8 + 0.9 * speed) * u + phase))
    elif name == "walks across":
        span = 0.24 + 0.06 * strength
        steps = 3.0 + 1.0 * speed
        pose[:, SCALE] *= 0.88
        pose[:, X] = 0.5 + side * (2 * u - 1) * span + rng.uniform(-0.02, 0.02)
        pose[:, Y] -= 0.022 * np.abs(np.sin(np.pi * (steps * u + phase))) - 0.01
        pose[:, YAW] = side * (0.45 + 0.2 * strength)
        pose[:, ROLL] = 0.05 * np.sin(np.pi * (steps * u + phase))
        pose[:, GAZE] = 0.5 * side
    elif name == "jumps":
        count = 1.35 + 0.9 * speed
        arc = (count * u + 0.5 * phase) % 1.0
        pose[:, SCALE] *= 0.92
        pose[:, Y] += 0.11 - (0.25 + 0.07 * strength) * 4 * arc * (1 - arc)
        pose[:, MOUTH] = 0.35 * 4 * arc * (1 - arc)
    elif name == "turns around":
        start, width = 0.12 * phase, 0.8 + 0.08 * speed
        pose[:, YAW] = side * (0.85 + 0.15 * strength) * (2 * _smooth((u - start) / width) - 1)
        pose[:, GAZE] = 0.6 * pose[:, YAW]
    elif name == "leans in":
        start, width = 0.12 * phase, 0.75 + 0.13 * speed
        grown = _smooth((u - start) / width)
        pose[:, SCALE] = pose[:, SCALE] * (0.84 + (0.44 + 0.12 * strength) * grown)
        pose[:, Y] += 0.05 * grown - 0.02
        pose[:, PITCH] += 0.2 * grown
    elif name == "talks":
        beat = np.sin(2 * np.pi * ((2.8 + 0.9 * speed) * u + phase))
        pose[:, MOUTH] = np.clip(0.5 + 0.5 * beat + rng.uniform(-0.08, 0.08, frames), 0, 1) * (0.85 + 0.25 * strength)
        pose[:, Y] += 0.018 * beat
        pose[:, PITCH] += 0.14 * beat
        pose[:, SMILE] *= 0.5
    elif name == "tilts the head":
        pose[:, ROLL] = (0.36 + 0.12 * strength) * np.sin(2 * np.pi * ((0.9 + 0.6 * speed) * u + phase))
    return pose


def clip_poses(actions: NDArray[np.int64], seeds: NDArray[np.int64], frames: int) -> Floats:
    """Poses float32 (B, F, K) of clips, columns as in ``POSE``; equal for equal (action, seed)."""
    paths = [
        _one_path(int(action), np.random.default_rng([int(seed), int(action) + 1, 202]), frames)
        for action, seed in zip(actions, seeds, strict=True)
    ]
    return np.stack(paths).astype(np.float32)


def photo_poses(n: int, rng: np.random.Generator) -> Floats:
    """Poses float32 (n, 1, K) of stills: near frontal, varied a little in pose and expression."""
    pose = np.zeros((n, 1, len(POSE)), np.float32)
    low = np.array([0.45, 0.465, -0.4, -0.3, -0.14, 0.92, 0.0, 0.85, -0.5, 0.0])
    high = np.array([0.55, 0.53, 0.4, 0.3, 0.14, 1.1, 0.0, 1.0, 0.5, 1.2])
    pose[:, 0] = rng.uniform(low, high, (n, len(POSE)))
    pose[:, 0, MOUTH] = np.where(rng.random(n) < 0.4, rng.uniform(0.2, 0.7, n), 0.0)
    return pose
