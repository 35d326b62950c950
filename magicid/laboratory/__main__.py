"""``python -m magicid.laboratory OUT``: run a study and write its rows."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from magicid import recipe
from magicid.laboratory.measuring import measuring
from magicid.laboratory.methods import PLANS, only
from magicid.laboratory.study import SEEDED, Study, clock
from magicid.world.training_loop import choose_device


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the laboratory."""
    parser = argparse.ArgumentParser(prog="python -m magicid.laboratory", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the rows; what is finished there is not made again")
    parser.add_argument("--plan", choices=sorted(PLANS), default="small")
    parser.add_argument("--methods", nargs="+", default=None, help="only these of the plan's, beside its SFT")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="only these of the plan's training seeds")
    parser.add_argument("--recipe", default="face-world")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, default=None, help="processes that measure; one for each core but one")
    chosen = parser.parse_args(arguments)
    folder, say = chosen.out / chosen.plan, clock()
    try:
        plan = only(PLANS[chosen.plan], chosen.methods, chosen.seeds)
    except ValueError as error:
        parser.error(f"the plan {chosen.plan} has no {error}")
    settings = recipe.load(chosen.recipe).with_overrides(dict(plan.overrides))
    with measuring(settings, chosen.workers) as pool:
        device = choose_device(chosen.device).type
        for seed in plan.train_seeds:  # one after the other: what is interrupted has whole seeds of everybody
            own = {f"{name}.seed": getattr(settings, name).seed + 10_000 * seed for name in SEEDED}
            rows = Study(
                dataclasses.replace(plan, train_seeds=(seed,)), settings.with_overrides(own), pool, folder, device, say
            ).run()
    say(f"{len(rows)} rows in {folder}; tables and figures: magicid results {folder}")


if __name__ == "__main__":
    main()
