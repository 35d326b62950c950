"""A study that was stopped goes on where it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from magicid import recipe
from magicid.laboratory.measuring import Measuring, measuring
from magicid.laboratory.methods import Plan, Variant
from magicid.laboratory.study import Study
from magicid.recipe import Recipe
from magicid.schema import MetricRow

LETTER = {"selection.still_pairs": 0, "sft.moving": 0, "sft.captions": False}
PLAN = Plan(
    group="dev", people=2, prompts=2, train_seeds=(5,), sft_steps=(1, 3), frames_steps=(3,), tokens_steps=(2,),
    true_steps=(2,),
    variants=(Variant("hpo"), Variant("paper", overrides=LETTER, named=False),
              Variant("hpo", readings=frozenset({"base-reference"})), Variant("two_rounds", twice=True)),
    hpo_steps=(1, 2), lengths=(5,),
)  # fmt: skip
SMALLEST = {
    "repository.trained_clips": 4, "repository.base_clips": 4, "sampling.steps": 2, "sft.steps": 2,
    "sft.moving": 1, "selection.still_pairs": 2,
}  # fmt: skip


def run(settings: Recipe, pool: Measuring, out: Path) -> tuple[dict[str, MetricRow], list[str]]:
    """One start of the study: its rows by clip and method, and what it said."""
    said: list[str] = []
    rows = Study(PLAN, settings, pool, out, "cpu", said.append).run()
    return {f"{row.method} {row.step} {row.clip_id}": row for row in rows}, said


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = recipe.load("face-world", SMALLEST)
    with measuring(settings, 1) as pool:
        rows, said = run(settings, pool, tmp_path)
        assert all(row.clip_i is not None for row in rows.values())
        each = PLAN.people * PLAN.prompts
        long = PLAN.people  # a quarter of the prompts, at least one, once more in 5 frames
        expected = dict.fromkeys(
            (
                "base 0",
                "renderer 0",
                "sft 1",
                "sft 2",
                "sft_moving_captions 1",
                "sft_moving_captions 2",
                "magicme 2",
                "true_clips 2",
                "hpo 3",
                "paper 3",
                "two_rounds 3",
                "two_rounds 4",
            ),
            each,
        )
        expected |= dict.fromkeys(("sft 3", "sft_moving_captions 3", "dreambooth 3"), each + long) | {"paper 4": each}
        expected |= {"hpo 3": 2 * each, "hpo 4": 2 * each + long}  # by the SFT adapter and by the base as reference
        assert Counter(key.rsplit(" ", 1)[0] for key in rows) == expected

        assert [line.split()[0] for line in said if "loss" in line] == ["sft"] * 9 + ["hpo"] * 8
        first = [line.split("loss ")[1] for line in said if line.startswith("hpo 1:")]
        assert first[:2] == ["0.6931"] * 2, "ln 2: the policy begins as its reference"
        assert first[2] != "0.6931", "with the base as the reference it does not"

        files = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        again, said = run(settings, pool, tmp_path)
        assert again == rows
        assert said == [], "all is there: nothing is trained"
        assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == files

        (tmp_path / "paper-0004-seed5.parquet").unlink()
        again, said = run(settings, pool, tmp_path)
        assert [line.split()[0] for line in said if "loss" in line] == ["hpo"] * 2, "only this one is trained again"
        assert again.keys() == rows.keys()
        for key, row in rows.items():  # a CPU rounds by where a tensor lies in memory: the last digits may differ
            columns, others = vars(row), vars(again[key])
            if row.method != "paper":
                assert others == columns
            for name, value in columns.items():
                rounded = isinstance(value, (float, list))
                assert others[name] == (pytest.approx(value, rel=1e-3, abs=1e-3) if rounded else value), name
