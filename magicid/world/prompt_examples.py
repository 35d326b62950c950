"""What the rating model learns from: clips, questions about them, and a teacher's answers.

Teacher: action and place as asked 10; one of the two 4; neither 1; an action that stops half way 7. A clip in which
nobody acts has the wrong action for every prompt that names one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicid.rewards.semantics import RATING_QUESTION
from magicid.world.clip_pool import ClipPool
from magicid.world.degradation import degrade, fold_frames, unfold_frames
from magicid.world.language import ACTIONS, CLASS_WORDS, PLACES, STILL, VARIANTS, caption
from magicid.world.prompt_batches import IGNORE
from magicid.world.prompt_model import DESCRIBE

STILL_CLASS = len(ACTIONS)
# Mean and spread of x, y, yaw, pitch, roll, scale and mouth over many clips.
POSE_MEAN = np.array([24.0, 23.2, 0.0, 0.0, 0.0, 1.0, 0.1], dtype=np.float32)
POSE_SPREAD = np.array([3.5, 2.2, 0.39, 0.23, 0.11, 0.1, 0.21], dtype=np.float32)


@dataclass
class Examples:
    """A batch: clips (B, F, H, W, 3), for each three user texts and answers, and what the clips really show.

    ``pose`` is (B, F, 7), in units of its spread. ``asked`` (B, 3, 2) are the action and place of each question, with
    STILL_CLASS for no action and IGNORE for a description.
    """

    frames: NDArray[np.uint8]
    texts: list[list[str]]
    answers: list[list[str]]
    actions: NDArray[np.int64]
    places: NDArray[np.int64]
    pose: NDArray[np.float32]
    asked: NDArray[np.int64]


def question(prompt: str) -> str:
    """The text of the user's turn."""
    return RATING_QUESTION.format(prompt=prompt)


def rating(shown: tuple[int, int], asked: tuple[int, int], *, stops: bool = False) -> int:
    """Teacher's rating 1..10 of a clip that shows (action, place) for a prompt that asks for (action, place).

    An action of -1 means none: nobody acts, or the prompt names no action (then any action is nearly as good as none).
    ``stops`` marks clips that freeze half way.
    """
    if asked[0] == STILL:
        return (10 if shown[0] == STILL else 8) if shown[1] == asked[1] else 2
    if shown == asked:
        return 7 if stops else 10
    return 4 if shown[0] == asked[0] or shown[1] == asked[1] else 1


def other_than(value: int, count: int, rng: np.random.Generator) -> int:
    """An index below ``count`` that is not ``value``."""
    return int((value + rng.integers(1, count)) % count)


def draw_examples(pool: ClipPool, batch: int, rng: np.random.Generator, amount: float = 1.0) -> Examples:
    """Clips with three questions each; some clips stand still or stop half way, most are degraded."""
    rows = rng.integers(0, len(pool.frames), batch)
    frames, actions, places = pool.frames[rows].copy(), pool.actions[rows].copy(), pool.places[rows]
    pose = (pool.pose[rows, :, : len(POSE_SPREAD)] - POSE_MEAN) / POSE_SPREAD
    named = np.full((batch, 3, 2), IGNORE, dtype=np.int64)
    texts: list[list[str]] = []
    answers: list[list[str]] = []
    for i in range(batch):
        stops = False
        chance = rng.random()
        if chance < 0.08:  # a photo held still
            time = int(rng.integers(frames.shape[1]))
            frames[i], pose[i] = frames[i, time].copy(), pose[i, time].copy()
            actions[i] = STILL
        elif chance < 0.13:
            frames[i, 6:], pose[i, 6:] = frames[i, 5], pose[i, 5]
            stops = True
        shown = (int(actions[i]), int(places[i]))
        action = shown[0] if shown[0] != STILL else int(rng.integers(len(ACTIONS)))
        other = other_than(action, len(ACTIONS), rng), other_than(shown[1], len(PLACES), rng)
        half_right = [(other[0], shown[1]), (action, other[1])]
        if rng.random() < 0.5:
            half_right.reverse()
        asked: list[tuple[int, int] | None] = [
            (action, shown[1]),
            half_right[0],
            (half_right[1], other, None)[rng.integers(3)],
        ]
        if rng.random() < 0.15:  # now and then a prompt without an action
            asked[0] = (STILL, shown[1] if rng.random() < 0.6 else other[1])
        texts.append([])
        answers.append([])
        for number, pair in enumerate(asked):
            if pair is None:
                texts[i].append(DESCRIBE)
                answers[i].append(caption(*shown))
                continue
            named[i, number] = STILL_CLASS if pair[0] == STILL else pair[0], pair[1]
            word, variant = str(rng.choice(CLASS_WORDS)), int(rng.integers(VARIANTS))
            texts[i].append(question(caption(*pair, class_word=word, variant=variant)))
            answers[i].append(str(rating(shown, pair, stops=stops)))
    frames = unfold_frames(degrade(fold_frames(frames), rng, amount=amount))
    return Examples(frames, texts, answers, actions, places, pose, named)
