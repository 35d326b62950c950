"""The finding, held small: still copies keep people moving where the paper's letter lets them freeze.

One development person, one training: what is compared shares person, adapter, prompts and noise, so that a few clips
tell the order. The numbers themselves are in docs/results.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from magicid import recipe
from magicid.laboratory.measuring import measuring
from magicid.laboratory.methods import LETTER, Plan, Variant
from magicid.laboratory.study import Study

PLAN = Plan(
    group="dev", people=1, prompts=8, train_seeds=(0,), sft_steps=(60, 120), frames_steps=(),
    variants=(Variant("hpo"), Variant("paper", overrides={**LETTER, "selection.static_prompt": "loser"}, named=False)),
    hpo_steps=(60,),
)  # fmt: skip


@pytest.mark.timeout(1500)
def test_still_copies_keep_motion_at_equal_identity(tmp_path: Path) -> None:
    settings = recipe.load("face-world", {"repository.trained_clips": 40, "selection.still_pairs": 20})
    with measuring(settings, 1) as pool:
        rows = Study(PLAN, settings, pool, tmp_path / "rows").run()

    def mean(method: str, step: int, measure: str) -> float:
        values = [getattr(row, measure) for row in rows if (row.method, row.step) == (method, step)]
        assert len(values) == PLAN.prompts
        return float(np.mean([value for value in values if value is not None]))

    moved = {
        name: mean(*name, "dynamic_magnitude") for name in (("sft", 60), ("sft", 120), ("hpo", 180), ("paper", 180))
    }
    likeness = {name: mean(*name, "face_sim") for name in moved}
    heads = {name: mean(*name, "head_motion") for name in moved}
    print(moved, likeness, heads)
    assert moved["sft", 120] < moved["sft", 60], "self-reconstruction loses motion with its steps"
    assert likeness["sft", 120] > likeness["sft", 60]
    assert moved["hpo", 180] > 1.15 * moved["paper", 180]
    assert heads["hpo", 180] > heads["paper", 180]
    assert likeness["hpo", 180] > likeness["paper", 180] - 0.05
