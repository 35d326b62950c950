"""The table of what selection saw: raw rewards, the same on 1..10 for show, and the fronts."""

from __future__ import annotations

from collections.abc import Sequence

from magicid import recipe
from magicid.rewards.scale import scaled_rewards
from magicid.schema import RewardRow, ScoredClip, from_row, to_row
from magicid.selection import Selection


def reward_rows(scored: Sequence[ScoredClip], selected: Selection, settings: recipe.Rewards) -> list[RewardRow]:
    """One row for each clip of one identity, `identity_reward` filled (`selection.with_identity_reward`)."""
    upper, lower = set(selected.upper), set(selected.lower)
    rows = []
    for clip in scored:
        raw = {"identity": clip.identity_reward, "motion": clip.motion_reward, "semantics": clip.semantics_reward}
        shown = {f"{name}_scaled": value for name, value in scaled_rewards(**raw, settings=settings).items()}
        fronts = {"upper_front": clip.clip_id in upper, "lower_front": clip.clip_id in lower}
        rows.append(from_row(RewardRow, {**to_row(clip), **raw, **shown, **fronts}))
    return rows
