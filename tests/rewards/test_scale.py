"""Raw rewards on 1..10, and which frames a model is shown."""

from __future__ import annotations

import math

import pytest

from magicid import recipe
from magicid.rewards.frames import evenly_spaced
from magicid.rewards.scale import scaled_rewards, to_scale
from magicid.schema import REWARD_NAMES


def test_scale_by_hand() -> None:
    assert [to_scale(x, (0.0, 20.0)) for x in (0.0, 10.0, 20.0)] == [1.0, 5.5, 10.0]
    assert [to_scale(x, (0.0, 20.0)) for x in (-3.0, 99.0, math.inf)] == [1.0, 10.0, 10.0]
    assert to_scale(0.25, (1.0, 0.0)) == pytest.approx(7.75)


def test_a_missing_reward_stays_missing() -> None:
    assert to_scale(None, (0.0, 1.0)) is None
    assert to_scale(math.nan, (0.0, 1.0)) is None


def test_each_reward_has_its_own_limits() -> None:
    settings = recipe.load("face-world", {"rewards.identity_range": [0.2, 0.8], "rewards.motion_range": [0, 4]}).rewards
    expected = {"identity": 5.5, "motion": 3.25, "semantics": 7.3}
    assert scaled_rewards(0.5, 1.0, 7.3, settings) == pytest.approx(expected)
    assert list(expected) == list(REWARD_NAMES)
    assert scaled_rewards(None, 9.0, math.nan, settings) == {"identity": None, "motion": 10.0, "semantics": None}


@pytest.mark.parametrize("limits", [(1.0, 1.0), (0.0, math.inf)])
def test_no_scale(limits) -> None:
    with pytest.raises(ValueError, match="no scale"):
        to_scale(0.5, limits)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(13, 4, [0, 4, 8, 12]), (5, 8, [0, 1, 2, 3, 4]), (5, 5, [0, 1, 2, 3, 4]), (61, 1, [30]), (6, 3, [0, 2, 5])],
)
def test_evenly_spaced_frames(total, count, expected) -> None:
    assert evenly_spaced(total, count).tolist() == expected
