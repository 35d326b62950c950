"""What a study compares: methods, settings and training steps, as data.

`DEV` and then `DEV_MOVING` chose the settings, on people of the group `dev` and the first half of the held-out prompts.
They are the recipe's now. `TEST` is what is reported: other people, the other prompts, three training seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# MagicMe: as many tokens as its paper's concept has at least, at a rate that fits vectors instead of matrices.
TOKENS_COUNT, TOKENS_RATE = 4, 0.1
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
        twice: repository and selection again after half of the steps, from the adapter as it is then.
    """

    method: str
    pairs: str = BOTH
    overrides: Mapping[str, Any] = field(default_factory=dict)
    readings: frozenset[str] = frozenset()
    named: bool = True
    twice: bool = False

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
        tokens_steps: likewise for extended tokens, MagicMe.
        true_steps: likewise for the renderer's clips of the person, which nobody has: what the base model allows.
        variants: what is trained by preferences.
        hpo_steps: measured after these, beyond the SFT.
        lengths: frames of the clips for the paper's figure 2a, beside the recipe's own.
        sft_rates: learning rates of the self-reconstruction; empty: the recipe's.
        overrides: dotted recipe keys in which all of the plan differs from the recipe.
    """

    group: str
    people: int
    prompts: int
    train_seeds: tuple[int, ...]
    sft_steps: tuple[int, ...]
    frames_steps: tuple[int, ...]
    variants: tuple[Variant, ...]
    hpo_steps: tuple[int, ...]
    tokens_steps: tuple[int, ...] = ()
    true_steps: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    sft_rates: tuple[float, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)


LOW, HIGH = 1.5e-3, 4e-3
ALL = "by-motion others"
STILL = 30  # half of V_t


def _dev(
    readings: str, static_prompt: str = "own", still: int = 0, steps: int = 120, rate: float = LOW, moving: int = 0,
    **hpo: float,
) -> Variant:  # fmt: skip
    values = {"learning_rate": 3e-4, "beta": 600.0, "anchor": 0.0, **hpo}
    overrides: dict[str, Any] = {"sft.steps": steps, "sft.learning_rate": rate, "sft.moving": moving}
    overrides |= {"selection.static_prompt": static_prompt, "selection.still_pairs": still}
    return Variant(
        "hpo", overrides={**overrides, **{f"hpo.{key}": value for key, value in values.items()}},
        readings=frozenset(readings.split()),
    )  # fmt: skip


DEV = Plan(
    group="dev",
    people=4,
    prompts=12,
    train_seeds=(0,),
    sft_steps=(60, 120, 180, 360),
    frames_steps=(),
    variants=(
        *(_dev(readings, "loser") for readings in ("", "dominates", "by-motion", "others")),
        _dev("", "loser", STILL),
        *(_dev(readings) for readings in ("", "dominates", ALL)),
        *(_dev(readings, still=STILL) for readings in ("", "others", "by-motion", ALL)),
        _dev("", still=STILL, beta=150.0),
        _dev("", still=STILL, beta=150.0, moving=2),
        _dev("", still=STILL, beta=150.0, moving=2, rate=HIGH),
        _dev("", beta=150.0, moving=2),
        _dev(ALL, still=STILL, beta=150.0),
        _dev(ALL, still=STILL, beta=2000.0),
        _dev("", beta=150.0),
        _dev("", anchor=0.3),
        _dev("", learning_rate=1e-3),
        _dev(ALL, still=STILL, learning_rate=1e-3),
        _dev("", steps=60),
        _dev("", steps=180, rate=HIGH),
        _dev(ALL, still=STILL, steps=180, rate=HIGH),
    ),
    hpo_steps=(100, 200),
    sft_rates=(LOW, HIGH),
    overrides={"lora.layers": "attention", "sft.captions": False},
)


def _after_moving(
    readings: str = "", still: int = STILL, rate: float = 1e-4, static_prompt: str = "own", twice: bool = False,
    **hpo: float,
) -> Variant:  # fmt: skip
    values = {"learning_rate": rate, "beta": 150.0, "anchor": 0.0, **hpo}
    overrides: dict[str, Any] = {"sft.moving": 2, "selection.still_pairs": still}
    overrides |= {f"hpo.{key}": value for key, value in values.items()}
    if static_prompt != "own":
        overrides["selection.static_prompt"] = static_prompt
    return Variant("two_rounds" if twice else "hpo", BOTH, overrides, frozenset(readings.split()), twice=twice)


DEV_MOVING = Plan(
    group="dev",
    people=4,
    prompts=8,
    train_seeds=(0,),
    sft_steps=(20, 40, 60, 120),
    frames_steps=(),
    variants=(
        _after_moving(),
        _after_moving(rate=3e-5),
        _after_moving(rate=3e-4),
        _after_moving(beta=50.0),
        _after_moving(beta=500.0),
        _after_moving(anchor=1.0),
        _after_moving(static_prompt="loser"),
        _after_moving("base-reference"),
        _after_moving("floor"),
        _after_moving("dominates"),
        _after_moving("reencoded"),
        _after_moving("panned"),
        _after_moving(still=0),
        _after_moving(twice=True),
    ),
    hpo_steps=(25, 50, 100),
    overrides={"sft.captions": False},
)


def _captioned(steps: int, moving: int = 0, readings: str = "", **hpo: float) -> Variant:
    overrides: dict[str, Any] = {
        "sft.captions": True,
        "sft.moving": moving,
        "sft.steps": steps,
        "selection.still_pairs": STILL,
    }
    overrides |= {f"hpo.{key}": value for key, value in hpo.items()}
    return Variant("hpo", overrides=overrides, readings=frozenset(readings.split()))


NO_COPIES: Mapping[str, Any] = {"selection.still_pairs": 0}
LOSERS: Mapping[str, Any] = {**NO_COPIES, "selection.static_prompt": "loser"}

DEV_CAPTIONS = Plan(
    group="dev",
    people=4,
    prompts=12,
    train_seeds=(0,),
    sft_steps=(20, 40, 60, 120, 170, 240, 360),
    frames_steps=(),
    true_steps=(120, 240, 480),
    variants=(
        _captioned(60),
        _captioned(120),
        _captioned(120, moving=2),
        _captioned(240),
        *(_captioned(240, readings=readings) for readings in ("dominates", "others", ALL)),
        _captioned(240, learning_rate=3e-4),
        _captioned(240, beta=50.0),
        _captioned(240, anchor=1.0),
        Variant("no_copies", overrides=NO_COPIES, named=False),
        Variant("no_copies", overrides=LOSERS),
        Variant("p_id", ONLY_STATIC, NO_COPIES, named=False),
        Variant("p_id", ONLY_STATIC, LOSERS),
    ),
    hpo_steps=(25, 50, 100),
)

LETTER: Mapping[str, Any] = {"sft.moving": 0, "sft.captions": False, **NO_COPIES, "hpo.beta": 600.0}
"""The paper's: photos held still, all under one caption, P_id and P_dy alone, at the strength that suited them on the
development people."""

# Tables 2 and 3 take away from the method as it is used; the paper's letter stands beside it.
METHODS = (
    Variant("hpo"),
    Variant("no_copies", overrides=NO_COPIES, named=False),
    Variant("p_id", ONLY_STATIC, NO_COPIES, named=False),
    Variant("p_dy", ONLY_DYNAMIC, NO_COPIES, named=False),
    Variant("rewards_id", overrides={**NO_COPIES, "selection.rewards": "id"}, named=False),
    Variant("rewards_id_dy", overrides={**NO_COPIES, "selection.rewards": "id+dy"}, named=False),
    Variant("paper", overrides={**LETTER, "selection.static_prompt": "loser"}, named=False),
    Variant("own_prompt", overrides=LETTER, named=False),
    Variant("beyond", readings=frozenset(ALL.split()), named=False),
    Variant("two_rounds", twice=True),
    Variant("still_photos", overrides={"sft.moving": 0, "sft.captions": False}, named=False),
    Variant("moving_photos", overrides={"sft.moving": 2, "sft.captions": False}, named=False),
)

TEST = Plan(
    group="test",
    people=8,
    prompts=20,
    train_seeds=(0, 1, 2),
    sft_steps=(20, 40, 60, 120, 170),
    frames_steps=(120, 170),
    tokens_steps=(120, 170),
    true_steps=(120, 240, 480),
    variants=METHODS,
    hpo_steps=(25, 50),
    lengths=(9, 17, 25),
)

SMALL = Plan(
    group="test",
    people=2,
    prompts=10,
    train_seeds=(0,),
    sft_steps=(20, 40, 60, 120, 170),
    frames_steps=(),
    variants=tuple(variant for variant in METHODS if variant.method in ("hpo", "paper")),
    hpo_steps=(50,),
)

PLANS = {"small": SMALL, "dev": DEV, "dev-moving": DEV_MOVING, "dev-captions": DEV_CAPTIONS, "full": TEST}


def only(plan: Plan, methods: Sequence[str] | None, seeds: Sequence[int] | None) -> Plan:
    """A part of a plan, so that what matters most is measured first.

    Args:
        methods: of its variants, and `dreambooth`, `magicme` and `true_clips`; None keeps all.
        seeds: of its trainings; None keeps all.

    Raises:
        ValueError: the plan does not have one of them; named.
    """
    if methods is not None:
        others = {"dreambooth": plan.frames_steps, "magicme": plan.tokens_steps, "true_clips": plan.true_steps}
        have = {variant.method for variant in plan.variants} | {name for name, steps in others.items() if steps}
        if unknown := sorted(set(methods) - have):
            raise ValueError(f"method {', '.join(unknown)}; it has {', '.join(sorted(have))}")
        plan = dataclasses.replace(
            plan,
            variants=tuple(variant for variant in plan.variants if variant.method in methods),
            frames_steps=plan.frames_steps if "dreambooth" in methods else (),
            tokens_steps=plan.tokens_steps if "magicme" in methods else (),
            true_steps=plan.true_steps if "true_clips" in methods else (),
        )
    if seeds is not None:
        if wrong := sorted(set(seeds) - set(plan.train_seeds)):
            raise ValueError(
                f"training seed {', '.join(map(str, wrong))}; it has {', '.join(map(str, plan.train_seeds))}"
            )
        plan = dataclasses.replace(plan, train_seeds=tuple(seeds))
    return plan
