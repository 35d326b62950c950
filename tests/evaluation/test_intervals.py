"""Intervals: the mean of means, wide when people differ, narrow when methods are compared clip by clip."""

from __future__ import annotations

import numpy as np
import pytest

from magicid.evaluation.intervals import bootstrap, difference, hierarchical, ratio


def test_people_and_trainings_count_alike_however_many_clips_they_have() -> None:
    values = [1, 1, 1, 1, 4, 0, 2]
    people = ["a", "a", "a", "a", "a", "b", "b"]
    seeds = [0, 0, 0, 0, 1, 0, 0]
    found = hierarchical(values, people, seeds)
    assert found is not None
    assert found.mean == pytest.approx(((1 + 4) / 2 + 1) / 2)
    assert (found.clips, found.people, found.seeds) == (7, 2, 2)


def test_clips_of_few_people_are_no_evidence_for_many() -> None:
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(4), 100)
    values = people + rng.normal(0, 0.01, 400)  # people differ, their clips do not
    found = hierarchical(values, people)
    plain = bootstrap(values)
    assert found.high - found.low > 1  # about 4 * 1.12 / sqrt(4)
    assert plain[2] - plain[1] < 0.3


def test_coverage_is_about_what_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(120):
        person = rng.normal(0, 1, 12)
        values = np.repeat(person, 5) + rng.normal(0, 1, 60)
        found = hierarchical(values, np.repeat(np.arange(12), 5), seed=trial, resamples=400)
        hits += found.low <= 0 <= found.high
    assert 0.85 <= hits / 120 <= 1


def test_pairs_of_clips_are_compared_within_the_pair() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(10, 5, 200)
    both = np.stack([base + 1, base], 1)
    gap = hierarchical(both, np.repeat(np.arange(8), 25), statistic=difference)
    assert (gap.mean, gap.low, gap.high) == (pytest.approx(1), pytest.approx(1), pytest.approx(1))
    times = hierarchical(np.stack([1.3 * base, base], 1), np.repeat(np.arange(8), 25), statistic=ratio)
    assert (times.mean, times.low) == (pytest.approx(1.3), pytest.approx(1.3))


def test_the_order_of_rows_changes_nothing() -> None:
    values, people, seeds = [1.0, 2, 3, 4], ["b", "a", "b", "a"], [1, 0, 0, 0]
    first = hierarchical(values, people, seeds)
    order = [2, 1, 0, 3]
    again = hierarchical([values[i] for i in order], [people[i] for i in order], [seeds[i] for i in order])
    assert first == again


def test_nothing_and_one_have_no_interval() -> None:
    assert hierarchical([], []) is None
    assert hierarchical([2.0], ["a"]).low is None
    assert bootstrap([]) == (None, None, None)
    assert np.isnan(ratio(np.array([1.0, 0.0])))
