"""Bootstrap intervals. Clips of one person, and of one training, resemble each other, so these are drawn as wholes.

A resample draws people, then for each drawn person training seeds, then for each of these clips, all with replacement
(the hierarchical bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). The mean
is of means: every person counts alike, and within a person every training seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 2000

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Means (..., K) of K columns to values (...)."""


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval, null where nothing varies, and what it is of."""

    mean: float
    low: float | None
    high: float | None
    clips: int
    people: int
    seeds: int  # training seeds


def bootstrap(
    values: Sequence[float] | NDArray[Any], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float | None, float | None, float | None]:
    """(mean, low, high) of values: percentile bootstrap over clips, seeded. None where there is nothing to say.

    One value has a mean and no interval.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return None, None, None
    mean = float(array.mean())
    if array.size == 1:
        return mean, None, None
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, array.size, (resamples, array.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def hierarchical(
    values: Sequence[float] | NDArray[Any],
    people: Sequence[Any],
    seeds: Sequence[Any] | None = None,
    *,
    statistic: Statistic | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval | None:
    """The mean of values over people, training seeds and clips, with its percentile interval; None without values.

    Args:
        values: (N,), or (N, K) with a statistic: columns of the same clips under K methods.
        people: (N,) whose clip each is.
        seeds: (N,) of the training it came out of; None: one training each.
        statistic: of the K means, such as `difference` or `ratio`.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if not len(array):
        return None
    groups = _groups(people, seeds if seeds is not None else [0] * len(array))
    of = statistic or (lambda means: means[..., 0])
    clips = [[array[rows] for rows in trainings.values()] for trainings in groups.values()]
    mean, low, high = float(of(_mean_of_means(clips))), None, None
    if len(array) > 1:
        drawn = of(_resampled(clips, np.random.default_rng(seed), resamples))
        ends = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        low, high = float(ends[0]), float(ends[1])
    count = len({s for trainings in groups.values() for s in trainings})
    return Interval(mean, low, high, len(array), len(groups), count)


def means(values: NDArray[np.float64], people: Sequence[Any], seeds: Sequence[Any]) -> NDArray[np.float64]:
    """The means (K,) of columns (N, K) as `hierarchical` takes them."""
    groups = _groups(people, seeds)
    return _mean_of_means([[values[rows] for rows in trainings.values()] for trainings in groups.values()])


def difference(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first column minus the second."""
    return np.asarray(means[..., 0] - means[..., 1])


def ratio(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first column over the second; NaN where that is 0."""
    below = np.where(means[..., 1] == 0, np.nan, means[..., 1])
    return np.asarray(means[..., 0] / below)


def _groups(people: Sequence[Any], seeds: Sequence[Any]) -> dict[Any, dict[Any, list[int]]]:
    """person -> training seed -> rows, in sorted order, so that the seeded draw does not depend on the rows' order."""
    found: dict[Any, dict[Any, list[int]]] = {}
    for row, (person, training) in enumerate(zip(people, seeds, strict=True)):
        found.setdefault(person, {}).setdefault(training, []).append(row)
    return {person: {key: found[person][key] for key in sorted(found[person])} for person in sorted(found)}


def _mean_of_means(clips: list[list[NDArray[np.float64]]]) -> NDArray[np.float64]:
    """Over clips, then over a person's trainings, then over people."""
    return np.asarray(np.mean([np.mean([part.mean(0) for part in parts], axis=0) for parts in clips], axis=0))


def _resampled(clips: list[list[NDArray[np.float64]]], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Means (R, K) of R resamples; `clips` are the values (C, K) of each person's trainings."""
    total = np.zeros((resamples, clips[0][0].shape[1]))
    for _ in clips:  # one draw of a person per person there is
        chosen = rng.integers(0, len(clips), resamples)
        for person, trainings in enumerate(clips):
            here = np.flatnonzero(chosen == person)
            if len(here):
                total[here] += _resampled_person(trainings, rng, len(here))
    return np.asarray(total / len(clips))


def _resampled_person(
    trainings: list[NDArray[np.float64]], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    total = np.zeros((resamples, trainings[0].shape[1]))
    for _ in trainings:
        chosen = rng.integers(0, len(trainings), resamples)
        for index, values in enumerate(trainings):
            here = np.flatnonzero(chosen == index)
            if len(here):
                total[here] += values[rng.integers(0, len(values), (len(here), len(values)))].mean(1)
    return np.asarray(total / len(trainings))
