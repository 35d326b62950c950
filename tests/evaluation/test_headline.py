"""A method against the curve of self-reconstruction, on numbers that can be checked by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from magicid.evaluation import document, headline, results
from magicid.schema import MetricRow
from tests.evaluation.test_results import row

PEOPLE = ("ann", "bob", "cem")


def clips(method: str, step: int, face: float, motion: float, noise: float = 0.0, seed: int = 0) -> list[MetricRow]:
    rng = np.random.default_rng(seed)
    return [
        dataclasses.replace(
            row(str(number), person, method, face + noise * rng.normal(), dynamic_magnitude=motion, step=step),
            clip_id=f"{method}-{step}-{number}", head_motion=motion / 10, action=1.0,
        )
        for person in PEOPLE for number in range(6)
    ]  # fmt: skip


CURVE = [*clips("base", 0, 0.0, 10), *clips("sft", 50, 0.2, 6), *clips("sft", 100, 0.4, 4)]


def test_motion_is_compared_at_equal_identity_and_identity_at_equal_motion() -> None:
    found = {one.measure: one for one in headline.beyond([*CURVE, *clips("hpo", 100, 0.3, 8)])}
    flow, head = found["dynamic_magnitude"], found["head_motion"]
    assert (flow.method, flow.step, flow.curve) == ("hpo", 100, ("sft", ""))
    assert flow.motion.mean == pytest.approx(8 / 5)  # halfway between 6 and 4
    assert flow.reached == (True, True)
    assert flow.identity.mean == pytest.approx(0.3 - 0.1)  # at a motion of 8, halfway from the base to step 50
    assert head.motion.mean == pytest.approx(8 / 5)
    assert (flow.motion.clips, flow.motion.people) == (18, 3)


def test_beyond_the_ends_of_the_curve_its_nearest_end_counts() -> None:
    (flow, _) = headline.beyond([*CURVE, *clips("hpo", 100, 0.6, 12)])
    assert flow.motion.mean == pytest.approx(12 / 4)
    assert flow.identity.mean == pytest.approx(0.6 - 0.0)
    assert flow.reached == (False, False)
    text = document.to_markdown([*CURVE, *clips("hpo", 100, 0.6, 8)])
    line = next(line for line in text.splitlines() if line.startswith("| HPO | 100 | SFT only |"))
    assert [cell.strip()[-1] for cell in line.split("|")[5:9]] == ["*", "*", "]", "]"]


def test_whether_the_curve_has_the_like_is_asked_of_the_means_that_are_shown() -> None:
    """Six clips of ann at 0.3 and one of bob at 0.6: each person counts half, 0.45, and the curve ends at 0.4."""
    kept = {("ann", n) for n in range(6)} | {("bob", 0)}
    own = [dataclasses.replace(r, face_sim=0.3 if r.identity_id == "ann" else 0.6) for r in clips("hpo", 100, 0, 8)]
    rows = [r for r in [*CURVE, *own] if (r.identity_id, r.seed) in kept]
    flow = headline.beyond(rows)[0]
    assert flow.motion.mean == pytest.approx(8 / 4)
    assert flow.reached[0] is False


def test_a_method_on_the_curve_is_not_beyond_it() -> None:
    noisy = [*clips("base", 0, 0.0, 10), *clips("sft", 50, 0.2, 6, 0.05), *clips("sft", 100, 0.4, 4, 0.05, 1)]
    flow = headline.beyond([*noisy, *clips("hpo", 100, 0.3, 5, 0.05, 2)])[0]
    assert flow.motion.low < 1 < flow.motion.high
    assert flow.identity.low < 0 < flow.identity.high


def test_what_hangs_on_the_choice_of_prompts_shows_where_these_are_drawn() -> None:
    easy = [dataclasses.replace(r, dynamic_magnitude=5.5 + r.seed) for r in clips("hpo", 100, 0.3, 8)]
    by_person, by_prompt = (headline.beyond([*CURVE, *easy], whole)[0].motion for whole in ("identity_id", "prompt"))
    assert by_person.mean == pytest.approx(8 / 5)
    assert by_prompt.mean == pytest.approx(8 / 5)
    assert (by_person.people, by_prompt.people) == (3, 6)
    widths = [one.high - one.low for one in (by_prompt, by_person)]
    assert 1.3 < widths[0] / widths[1] < 2.2  # six prompts drawn, not eighteen clips: the root of 3


def test_clips_of_another_length_take_no_part() -> None:
    long = [dataclasses.replace(r, frames=25, face_sim=0.9, clip_id=r.clip_id + "-25") for r in clips("hpo", 100, 0, 1)]
    rows = [*CURVE, *clips("hpo", 100, 0.3, 8), *long[:5]]
    assert headline.beyond(rows)[0].motion.mean == pytest.approx(8 / 5)
    assert {r.frames for r in results.last_steps(rows)} == {13}
    assert {r.step for r in results.last_steps([*rows, *clips("sft", 300, 0.5, 1)])} == {0, 100}, "at equal cost"


def test_the_document_tells_it() -> None:
    text = document.to_markdown([*CURVE, *clips("hpo", 100, 0.3, 8)], threshold=0.25)
    line = next(line for line in text.splitlines() if line.startswith("| HPO | 100 | SFT only |"))
    assert [cell.strip().split()[0] for cell in line.split("|")[5:11]] == [
        "1.60",
        "1.60",
        "0.200",
        "0.200",
        "1.00",
        "1.00",
    ]
    assert line.split("|")[4].strip() == "18 of 1"
    again = next(line for line in text.splitlines() if line.startswith("| the same, prompts drawn"))
    assert [cell.strip().split()[0] for cell in again.split("|")[5:9]] == ["1.60", "1.60", "0.200", "0.200"]
    assert "Against self-reconstruction" not in document.to_markdown(CURVE)
