"""What a study compares: methods, settings and training steps, as data.

`DEV` chooses the settings, on people of the group `dev` and the first half of the held-out prompts. `TEST` is what is
reported: other people, the other prompts, three training seeds, with the settings of the recipe `face-world`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BOTH, ONLY_STATIC, ONLY_DYNAMIC = "both", "P_id", "P_dy"


@dataclass(frozen=True)
class Variant:
    """One way to train from the SFT adapter by preferences.

    Attributes:
        method: its name in the tables.
        pairs: `both`, `P_id` or `P_dy`.
        overrides: dotted recipe keys of the sections sft, hpo and selection that differ from the recipe.
        readings: how pairs are made where it is not the paper's letter; see `pairs.py`.
        named: whether results name what differs; not where `method` alone says it.
    """

    method: str
    pairs: str = BOTH
    overrides: Mapping[str, Any] = field(default_factory=dict)
    readings: frozenset[str] = frozenset()
    named: bool = True

    @property
    def setting(self) -> str:
        """What differs, as the results name it."""
        if not self.named:
            return ""
        values = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                  for key, value in self.overrides.items()]  # fmt: skip
        return ", ".join([*values, *sorted(self.readings)])


@dataclass(frozen=True)
class Plan:
    """One study.

    Attributes:
        group: `dev` or `test`: who, and which half of the held-out prompts.
        people, prompts: how many.
        train_seeds: trainings of each person.
        sft_steps: self-reconstruction is measured after these steps; so the curve goes on as long as any method trains.
        frames_steps: likewise for training on single frames, DreamBooth; empty: without it.
        variants: what is trained by preferences.
        hpo_steps: measured after these, beyond the SFT.
        lengths: frames of the clips for the paper's figure 2a, beside the recipe's own.
        sft_rates: learning rates of the self-reconstruction; empty: the recipe's.
    """

    group: str
    people: int
    prompts: int
    train_seeds: tuple[int, ...]
    sft_steps: tuple[int, ...]
    frames_steps: tuple[int, ...]
    variants: tuple[Variant, ...]
    hpo_steps: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    sft_rates: tuple[float, ...] = ()


def _grid() -> tuple[Variant, ...]:
    variants = [
        Variant("hpo", overrides={"sft.steps": s, "hpo.learning_rate": lr, "hpo.beta": beta, "hpo.anchor": anchor})
        for s in (60, 120)
        for lr in (3e-4, 1e-3)
        for beta in (150.0, 600.0)
        for anchor in (0.0, 0.3)
    ]
    middle = {"sft.steps": 60, "hpo.learning_rate": 3e-4, "hpo.beta": 600.0, "hpo.anchor": 0.3}
    others: list[dict[str, Any]] = [
        {"hpo.learning_rate": 1e-4},
        {"hpo.beta": 2000.0},
        {"hpo.anchor": 1.0},
        {"hpo.static_share": 0.1},
        {"hpo.static_share": 0.6},
        {"selection.min_identity_gap": 0.1},
        {"selection.dynamic_pairs": 15},
    ]
    return (*variants, *(Variant("hpo", overrides={**middle, **other}) for other in others))


DEV = Plan(
    group="dev",
    people=4,
    prompts=16,
    train_seeds=(0,),
    sft_steps=(30, 60, 90, 120, 180, 260, 360),
    frames_steps=(),
    variants=_grid(),
    hpo_steps=(100, 200),
)

METHODS = (
    Variant("hpo"),
    Variant("p_id", ONLY_STATIC),
    Variant("p_dy", ONLY_DYNAMIC),
    Variant("rewards_id", overrides={"selection.rewards": "id"}),
    Variant("rewards_id_dy", overrides={"selection.rewards": "id+dy"}),
)

TEST = Plan(
    group="test",
    people=8,
    prompts=20,
    train_seeds=(0, 1, 2),
    sft_steps=(30, 60, 90, 120, 180, 260, 360),
    frames_steps=(120, 360),
    variants=METHODS,
    hpo_steps=(50, 100, 200, 300),
    lengths=(9, 17, 25),
)

SMALL = Plan(
    group="test",
    people=2,
    prompts=6,
    train_seeds=(0,),
    sft_steps=(60, 120, 180),
    frames_steps=(),
    variants=METHODS[:1],
    hpo_steps=(60, 120),
)

PLANS = {"small": SMALL, "dev": DEV, "full": TEST}
