"""The finding, held small: preferences after photos with captions lie beyond the curve of self-reconstruction.

One development person, one training: what is compared shares person, prompts and noise, so that a few clips tell the
order. The numbers themselves are in docs/results.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from magicid import recipe
from magicid.evaluation import headline
from magicid.laboratory.measuring import measuring
from magicid.laboratory.methods import LETTER, Plan, Variant
from magicid.laboratory.study import Study

PLAN = Plan(
    group="dev", people=1, prompts=8, train_seeds=(0,), sft_steps=(30, 60, 120), frames_steps=(),
    variants=(Variant("hpo"), Variant("paper", overrides={**LETTER, "selection.static_prompt": "loser"}, named=False)),
    hpo_steps=(50,),
)  # fmt: skip


@pytest.mark.timeout(1500)
def test_more_motion_at_equal_identity_and_more_identity_at_equal_motion(tmp_path: Path) -> None:
    smaller = {"repository.trained_clips": 40, "selection.still_pairs": 20}
    settings = recipe.load("face-world", smaller)
    with measuring(settings, 1) as pool:
        rows = Study(PLAN, settings, pool, tmp_path / "rows").run()

    def mean(method: str, step: int, measure: str) -> float:
        values = [getattr(row, measure) for row in rows if (row.method, row.step) == (method, step)]
        assert len(values) == PLAN.prompts
        return float(np.mean([value for value in values if value is not None]))

    assert mean("sft", 30, "dynamic_magnitude") > 1.2 * mean("sft", 120, "dynamic_magnitude"), "the paper's problem"
    assert mean("sft", 30, "face_sim") < mean("sft", 120, "face_sim")
    found = {(one.method, one.measure): one for one in headline.beyond(rows) if one.curve == ("sft", "")}
    for (method, measure), one in found.items():
        print(method, measure, one.motion, one.identity)
    flow, head = found["hpo", "dynamic_magnitude"], found["hpo", "head_motion"]
    assert flow.motion.mean > 1.3
    assert head.motion.mean > 1.1
    assert flow.identity.mean > 0.1
    assert flow.motion.mean > found["paper", "dynamic_magnitude"].motion.mean, "the paper's letter stays on the curve"
    assert head.motion.mean > found["paper", "head_motion"].motion.mean
