"""What is measured, and what a metric is: some columns for each of several clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One clip and what it is compared with.

    Args:
        frames: uint8 RGB (F, H, W, 3).
        fps: of the file.
        prompt: what the clip was asked to show.
        references: unit embeddings (N, D) of the person by the metric recogniser; None: no face_sim.
        photos: the person's reference photos, uint8 RGB (H, W, 3) each; empty: no clip_i.
    """

    frames: NDArray[np.uint8]
    fps: float
    prompt: str = ""
    references: NDArray[np.floating[Any]] | None = None
    photos: Sequence[NDArray[np.uint8]] = field(default=())


class Metric(Protocol):
    """One network or rule: some columns of a clip."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values; those of a clip that fails are null."""

    def measure(self, samples: Sequence[Sample]) -> list[Columns]:
        """The columns of each clip; `error` among them says why one is null. May raise for all of them together."""


def each(function: Callable[[Sample], T], samples: Sequence[Sample], threads: int) -> list[T]:
    """The function of each clip in order, on several threads where its work lets go of the interpreter's lock."""
    if threads <= 1 or len(samples) <= 1:
        return [function(sample) for sample in samples]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, samples))


def by_shape(samples: Sequence[Sample]) -> list[list[int]]:
    """Positions of the clips that can be one batch: equal frames, height and width."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, sample in enumerate(samples):
        groups.setdefault(sample.frames.shape, []).append(position)
    return list(groups.values())
