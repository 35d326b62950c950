"""Raw rewards on the scale 1..10, for people to read. Selection never uses it: rounding and clamping make ties."""

from __future__ import annotations

import math

from magicid.recipe import Rewards

LOWEST, HIGHEST = 1.0, 10.0


def to_scale(raw: float | None, limits: tuple[float, float]) -> float | None:
    """A raw reward on 1..10, linear between `limits` (the raw values shown as 1 and as 10) and clamped.

    None and NaN give None. Raises ValueError when the limits are equal or not finite. `limits` may be descending.
    """
    low, high = limits
    if low == high or not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"no scale between {low} and {high}")
    if raw is None or math.isnan(raw):
        return None
    return min(HIGHEST, max(LOWEST, LOWEST + (HIGHEST - LOWEST) * (raw - low) / (high - low)))


def scaled_rewards(
    identity: float | None, motion: float | None, semantics: float | None, settings: Rewards
) -> dict[str, float | None]:
    """The three raw rewards of a clip on 1..10, by their names in `magicid.schema.REWARD_NAMES`; missing: None.

    Args:
        identity: mean cosine, -1..1; shown by `settings.identity_range`.
        motion: px per frame; shown by `settings.motion_range`.
        semantics: the expected rating, 1..10 as it stands.
    """
    rating = None if semantics is None or math.isnan(semantics) else min(HIGHEST, max(LOWEST, semantics))
    return {
        "identity": to_scale(identity, settings.identity_range),
        "motion": to_scale(motion, settings.motion_range),
        "semantics": rating,
    }
