"""Rewards and metrics of clips in worker processes, so that the GPU goes on while faces are looked for."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid.evaluation.metrics import Metrics, Sample
from magicid.recipe import Recipe
from magicid.rewards.identity import IdentityReward
from magicid.rewards.semantics import SemanticsReward
from magicid.weights import resolve

Frames = NDArray[np.uint8]
_BATCH = 16  # clips of one task

_recipe: Recipe | None = None
_identity: IdentityReward | None = None
_semantics: SemanticsReward | None = None
_metrics: Metrics | None = None


@dataclass(frozen=True)
class Rewarded:
    """Rewards of one clip but R_dy: face embeddings (F, D) with NaN rows, and R_sem."""

    embeddings: NDArray[np.float32]
    semantics: float


class Measuring:
    """A pool of processes that each hold the reward networks and the metric networks. Make it with `measuring`."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def references(self, photos: Sequence[Frames]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """For each person's photos the unit embeddings (P, D) by the reward's and by the metric's recogniser."""
        return list(self._pool.map(_references, photos))

    def rewards(self, frames: Frames, prompts: Sequence[str], fps: float) -> list[Future[list[Rewarded]]]:
        """Begin to reward clips (N, F, H, W, 3); each future has the next few."""
        return [self._pool.submit(_rewards, frames[p], prompts[p], fps) for p in _parts(len(frames))]

    def metrics(self, samples: Sequence[Sample]) -> list[Future[list[dict[str, Any]]]]:
        """Begin to measure clips; each future has the columns of the next few."""
        return [self._pool.submit(_measure, samples[p]) for p in _parts(len(samples))]


@contextmanager
def measuring(recipe: Recipe, workers: int | None = None) -> Iterator[Measuring]:
    """Start the processes, by default one for each core but one, and at least one."""
    count = workers or max(1, (os.cpu_count() or 1) - 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _load, (recipe,)) as pool:
        yield Measuring(pool)


def _parts(count: int) -> list[slice]:
    return [slice(start, start + _BATCH) for start in range(0, count, _BATCH)]


def _load(recipe: Recipe) -> None:
    global _recipe, _identity, _semantics, _metrics
    import torch

    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _recipe = recipe
    _identity = IdentityReward.from_pretrained(
        resolve(recipe.rewards.identity),
        detection_size=recipe.rewards.detection_size,
        detection_threshold=recipe.identities.detection_threshold,
    )
    _semantics = SemanticsReward.from_pretrained(
        resolve(recipe.rewards.semantics), frames=recipe.rewards.semantics_frames
    )
    _metrics = Metrics.from_recipe(recipe)


def _references(photos: Frames) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    assert _identity is not None
    assert _metrics is not None
    assert _metrics.faces is not None
    found = [faces.embed(photos) for faces in (_identity, _metrics.faces)]
    kept = [rows[~np.isnan(rows).any(1)] for rows in found]
    return kept[0], kept[1]


def _rewards(frames: Frames, prompts: Sequence[str], fps: float) -> list[Rewarded]:
    assert _identity is not None
    assert _semantics is not None
    return [Rewarded(_identity.embed(c), _semantics.score(c, p, fps)) for c, p in zip(frames, prompts)]


def _measure(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    assert _metrics is not None
    return _metrics.measure_many(samples)
