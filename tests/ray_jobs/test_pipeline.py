"""What needs no cluster: blocks, and which rows of a growing table count."""

from __future__ import annotations

import dataclasses

from magicid.schema import ScoredClip
from ray_jobs.pipeline import ROWS_PER_BLOCK, best, blocks


def clip(name: str, **values: object) -> ScoredClip:
    return dataclasses.replace(ScoredClip(name, "V_t", "ada", "sft", "p", "a person nods", 0), **values)


def test_rows_of_one_clip_share_a_block() -> None:
    wanted = [clip(f"c{i % 6}", identity_id=f"person{i}") for i in range(18)]
    made = blocks(wanted)
    assert sorted(c.identity_id for block in made for c in block) == sorted(c.identity_id for c in wanted)
    homes: dict[str, set[int]] = {}
    for number, block in enumerate(made):
        for each in block:
            homes.setdefault(each.clip_id, set()).add(number)
    assert all(len(home) == 1 for home in homes.values())
    assert all(len(block) < ROWS_PER_BLOCK + 3 for block in made)


def test_a_good_row_wins_whatever_the_order() -> None:
    good, bad = clip("c", video_uri="v"), clip("c", error="out of luck")
    assert best([good, bad]) == best([bad, good]) == {"c": good}


def test_a_model_that_failed_is_asked_again_and_a_missing_face_is_not() -> None:
    scored, failed = clip("c", motion_reward=1.0), clip("c", motion_error="crash")
    assert best([failed, scored]) == {"c": scored}
    faceless = clip("d", identity_error="no face was found")
    assert best([faceless, clip("d", video_uri="later")]) == {"d": faceless}
