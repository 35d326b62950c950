"""Rendered clips of many people, each with one action in one place, kept in memory for training and measuring."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicid.world.language import ACTIONS, PLACES
from magicid.world.renderer import render_clips, sample_people


@dataclass(frozen=True)
class ClipPool:
    """Clips of 13 frames of 48 x 48 pixels.

    frames (N, F, H, W, 3) uint8; actions and places (N,); pose (N, F, K), columns as in `motion_paths.POSE`;
    flow (N, F-1, H, W, 2) float16 in pixels and flow_valid (N, F-1, H, W), both empty when they were not asked for.
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.int64]
    places: NDArray[np.int64]
    pose: NDArray[np.float32]
    flow: NDArray[np.float16]
    flow_valid: NDArray[np.bool_]


def clip_pool(clips: int, seed: int, *, with_flow: bool = False, chunk: int = 100) -> ClipPool:
    """Render ``clips`` clips of as many people, actions and places drawn evenly from ``seed``."""
    rng = np.random.default_rng(seed)
    people = sample_people(clips, seed)
    actions = rng.permutation(np.arange(clips) % len(ACTIONS))
    places = rng.permutation(np.arange(clips) % len(PLACES))
    seeds = rng.integers(0, 2**31, clips)
    frames, pose, flow, valid = [], [], [], []
    for start in range(0, clips, chunk):
        part = slice(start, start + chunk)
        rendered = render_clips(people[part], actions[part], places[part], seeds[part])
        frames.append(rendered.frames)
        pose.append(rendered.pose)
        if with_flow:
            flow.append(rendered.flow.astype(np.float16))
            valid.append(rendered.flow_valid)
    nothing = np.zeros((0, 0, 0, 0, 2), dtype=np.float16), np.zeros((0, 0, 0, 0), dtype=np.bool_)
    flows, valids = (np.concatenate(flow), np.concatenate(valid)) if with_flow else nothing
    return ClipPool(np.concatenate(frames), actions, places, np.concatenate(pose), flows, valids)
