"""What needs no cluster: blocks, and which rows of a growing table count."""

from __future__ import annotations

import dataclasses

from magicid.schema import ScoredClip
from ray_jobs.pipeline import CLIPS_PER_BLOCK, best, blocks


def clip(name: str, **values: object) -> ScoredClip:
    return dataclasses.replace(ScoredClip(name, "V_t", "ada", "sft", "p", "a person nods", 0), **values)


def test_blocks_keep_the_order_and_are_small() -> None:
    wanted = [clip(f"c{i}") for i in range(10)]
    made = blocks(wanted)
    assert [c.clip_id for block in made for c in block] == [c.clip_id for c in wanted]
    assert [len(block) for block in made] == [CLIPS_PER_BLOCK, CLIPS_PER_BLOCK, 2]


def test_a_good_row_wins_whatever_the_order() -> None:
    good, bad = clip("c", video_uri="v"), clip("c", error="out of luck")
    assert best([good, bad]) == best([bad, good]) == {"c": good}


def test_a_model_that_failed_is_asked_again_and_a_missing_face_is_not() -> None:
    scored, failed = clip("c", motion_reward=1.0), clip("c", motion_error="crash")
    assert best([failed, scored]) == {"c": scored}
    faceless = clip("d", identity_error="no face was found")
    assert best([faceless, clip("d", video_uri="later")]) == {"d": faceless}
