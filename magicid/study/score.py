"""What the answers of a study come to: how often each method was chosen, and Bradley-Terry strengths, with intervals.

Choosing one clip of a set counts as preferring it to each of the others. The strength p of a method is such that it is
preferred to another with probability p / (p + p'); Bradley and Terry, 1952, fitted by the MM algorithm (Hunter, 2004),
with half a win for each side of every pair of methods, so that a method that never lost keeps a finite strength.
Strengths sum to 1. Intervals: people are drawn, then their answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid import storage
from magicid.errors import StorageError
from magicid.markdown import table

LEVEL, RESAMPLES, PRIOR = 0.95, 1000, 0.5


@dataclass(frozen=True)
class Answer:
    """One choice: the method chosen, and all that were shown."""

    participant: str
    question: str
    chosen: str
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Preference:
    """One method under one question; (low, high) are 95 % intervals."""

    question: str
    method: str
    rate: float  # share of the answers in which it was chosen
    rate_interval: tuple[float, float]
    strength: float
    strength_interval: tuple[float, float]
    answers: int
    people: int


def read(key: str, files: Sequence[str]) -> list[Answer]:
    """The answers of several people; a person's last file counts where there are two.

    Raises:
        StorageError: a file of another study, or one that is damaged.
    """
    known = storage.read_json(key)
    answers: dict[tuple[str, str, str], Answer] = {}
    for file in files:
        try:
            content = json.loads(storage.read_bytes(file))
            if content["study"] != known["study"]:
                raise StorageError(f"{file} answers another study", "give the key of that study: --key")
            for row in content["answers"]:
                shown = tuple(known["clips"][clip] for clip in row["shown"])
                answer = Answer(str(content["participant"]), row["question"], known["clips"][row["choice"]], shown)
                answers[answer.participant, row["set"], answer.question] = answer
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{file} is no answers file: {type(error).__name__}: {error}"
            raise StorageError(problem, "ask for the file that the page saved, unchanged") from error
    return list(answers.values())


def score(answers: Sequence[Answer], *, seed: int = 0, resamples: int = RESAMPLES) -> list[Preference]:
    """Every method under every question, the most preferred first."""
    found = []
    for question in dict.fromkeys(answer.question for answer in answers):
        own = [answer for answer in answers if answer.question == question]
        methods = sorted({method for answer in own for method in answer.shown})
        tables = np.stack([_tables(answer, methods) for answer in own])  # (N, M + 1, M)
        people = [answer.participant for answer in own]
        rates, strengths = _figures(tables.sum(0))
        drawn = [_figures(tables[rows].sum(0)) for rows in _draws(people, seed, resamples)]
        low, high = (np.quantile(np.array(drawn), q, axis=0) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        rows = [
            Preference(
                question, method, float(rates[i]), (float(low[0, i]), float(high[0, i])), float(strengths[i]),
                (float(low[1, i]), float(high[1, i])), len(own), len(set(people)),
            )
            for i, method in enumerate(methods)
        ]  # fmt: skip
        found += sorted(rows, key=lambda row: -row.strength)
    return found


def bradley_terry(wins: NDArray[Any], iterations: int = 1000, tolerance: float = 1e-9) -> NDArray[np.float64]:
    """Strengths (M,) that sum to 1 from wins (M, M): wins[i, j] is how often i was preferred to j."""
    counts = np.asarray(wins, dtype=np.float64) + PRIOR * (1 - np.eye(len(wins)))
    games, won = counts + counts.T, counts.sum(1)
    strength = np.full(len(counts), 1 / len(counts))
    for _ in range(iterations):
        share = games / (strength[:, None] + strength[None, :])
        np.fill_diagonal(share, 0)
        updated = won / share.sum(1)
        updated /= updated.sum()
        if np.abs(updated - strength).max() < tolerance:
            return np.asarray(updated)
        strength = updated
    return strength


def markdown(preferences: Sequence[Preference]) -> str:
    """A table, ending with a new line."""
    lines = []
    for row in preferences:
        chosen = f"{row.rate:.2f} [{row.rate_interval[0]:.2f}, {row.rate_interval[1]:.2f}]"
        strength = f"{row.strength:.2f} [{row.strength_interval[0]:.2f}, {row.strength_interval[1]:.2f}]"
        lines.append([row.question, row.method, chosen, strength, str(row.answers), str(row.people)])
    return table(["question", "method", "chosen", "Bradley-Terry strength", "answers", "people"], lines, left=2)


def _tables(answer: Answer, methods: Sequence[str]) -> NDArray[np.float64]:
    """Of one answer: wins (M, M), and below them how often each method was chosen (M,)."""
    table = np.zeros((len(methods) + 1, len(methods)))
    chosen = methods.index(answer.chosen)
    table[-1, chosen] = 1
    for other in answer.shown:
        if other != answer.chosen:
            table[chosen, methods.index(other)] += 1
    return table


def _figures(table: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(rates, strengths), both (M,), of summed tables."""
    chosen = table[-1]
    return chosen / max(chosen.sum(), 1), bradley_terry(table[:-1])


def _draws(people: Sequence[str], seed: int, resamples: int) -> list[NDArray[np.int64]]:
    """Rows of each resample: people with replacement, then of each as many of their answers."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(np.array(people) == person) for person in sorted(set(people))]
    return [
        np.concatenate([rng.choice(rows[i], len(rows[i])) for i in rng.integers(0, len(rows), len(rows))])
        for _ in range(resamples)
    ]
