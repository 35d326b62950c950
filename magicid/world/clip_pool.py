"""Rendered clips of many people, each with one action in one place, kept in memory for training and measuring."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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


PARALLEL_FROM = 30  # chunks; below that, starting processes takes longer than they save


@contextmanager
def renderers(several: bool = True) -> Iterator[ProcessPoolExecutor | None]:
    """One process for each core, to render in; None when ``several`` is false."""
    if not several:
        yield None
        return
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield pool


def clip_pool(clips: int, seed: int, *, with_flow: bool = False, chunk: int = 100) -> ClipPool:
    """Render ``clips`` clips of as many people, actions and places drawn evenly from ``seed``."""
    rng = np.random.default_rng(seed)
    people = sample_people(clips, seed)
    actions = rng.permutation(np.arange(clips) % len(ACTIONS))
    places = rng.permutation(np.arange(clips) % len(PLACES))
    seeds = rng.integers(0, 2**31, clips)
    frames, pose, flow, valid = [], [], [], []
    parts = [slice(start, start + chunk) for start in range(0, clips, chunk)]
    with renderers(len(parts) > PARALLEL_FROM) as pool:
        columns = ([values[part] for part in parts] for values in (people, actions, places, seeds))
        for rendered in (pool.map if pool else map)(render_clips, *columns):
            frames.append(rendered.frames)
            pose.append(rendered.pose)
            if with_flow:
                flow.append(rendered.flow.astype(np.float16))
                valid.append(rendered.flow_valid)
    nothing = np.zeros((0, 0, 0, 0, 2), dtype=np.float16), np.zeros((0, 0, 0, 0), dtype=np.bool_)
    flows, valids = (np.concatenate(flow), np.concatenate(valid)) if with_flow else nothing
    return ClipPool(np.concatenate(frames), actions, places, np.concatenate(pose), flows, valids)
