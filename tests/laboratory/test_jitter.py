"""A shaking photo earns the paper's R_dy as a person does who acts, and less of one that averages flow."""

from __future__ import annotations

import numpy as np

from magicid import recipe
from magicid.laboratory.jitter import WINDOWS, Row, markdown, measure, shaken


def test_a_window_of_three_pays_less_for_shaking_than_for_acting() -> None:
    rows = {row.name: row.rewards.mean(1) for row in measure(recipe.load("face-world"), count=1, prompts=6)}
    acting, shaking = rows["the renderer's clips"], rows["photos that shake"]
    one, three = WINDOWS.index(1), WINDOWS.index(3)
    assert shaking[one] > 1.2 * acting[one], "the paper's R_dy pays for jitter"
    assert shaking[three] / acting[three] < 0.75 * shaking[one] / acting[one]
    wandering = rows["photos that wander"]
    assert wandering[three] > 0.9 * wandering[one], "what goes on in one way is not averaged away"
    assert (rows["photos held still"] < 0.1 * acting).all()


def test_shaken_frames_are_displaced_each_on_its_own() -> None:
    frames = np.zeros((5, 9, 9, 3), np.uint8)
    frames[:, 4, 4] = 255
    made = shaken(frames, np.random.default_rng(0))
    centres = [np.argwhere(frame[..., 0] == frame[..., 0].max())[0].tolist() for frame in made]
    assert len({tuple(centre) for centre in centres}) > 1
    assert np.array_equal(shaken(frames, np.random.default_rng(0), deviation=0.0), frames)


def test_each_kind_is_told_as_a_share_of_the_first() -> None:
    rows = [
        Row(name, np.tile([[float(k)], [1.0], [1.0], [2.0]], 2), [0, 1]) for name, k in (("true", 2), ("shaken", 3))
    ]
    lines = markdown(rows, [0.1, 0.2, 0.3, 0.4]).splitlines()
    assert lines[0] == "| R_dy, of the renderer's | clips | window 1 | window 2 | window 3 | window 4 |"
    assert lines[3].split(" | ")[:3] == ["| shaken", "2", "1.50 [1.50, 1.50]"]
    assert lines[4].endswith("| 0.10 | 0.20 | 0.30 | 0.40 |")
