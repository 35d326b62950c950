"""What needs no cluster: blocks, and which rows of a growing table count."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from magicid.run import Run
from magicid.schema import Made, ScoredClip
from ray_jobs.pipeline import CLIPS_PER_BLOCK, Pipeline, best, blocks


def clip(name: str, **values: object) -> ScoredClip:
    return dataclasses.replace(ScoredClip(name, "V_t", "ada", "sft", "p", "a person nods", 0), **values)


def test_blocks_keep_the_order_and_are_small() -> None:
    wanted = [clip(f"c{i}") for i in range(10)]
    made = blocks(wanted)
    assert [c.clip_id for block in made for c in block] == [c.clip_id for c in wanted]
    assert [len(block) for block in made] == [CLIPS_PER_BLOCK, CLIPS_PER_BLOCK, 2]


class Recorder:
    """Stands for the actor with the queues: notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.put = self.call = SimpleNamespace(remote=lambda *words: self.told.append(words))


def test_rows_of_a_block_that_is_no_more_do_not_end_the_block_that_has_some_of_its_clips(tmp_path: Path) -> None:
    """Cancelled and asked for again, clips may come in other blocks than those that are still on their way."""
    wanted = [clip(f"c{i}", latents_uri=f"l{i}") for i in range(CLIPS_PER_BLOCK - 1)]
    wanted.append(clip("shared", latents_uri="l", method="base"))  # of everybody, and compared with ada
    rows = [Made(c.clip_id, c.kind, c.identity_id, c.latents_uri, "text") for c in wanted]

    async def ask() -> list[Made]:
        work = Recorder()
        pipeline = Pipeline(Run(str(tmp_path)), work, SimpleNamespace(begin=lambda _: None))
        asked = asyncio.create_task(pipeline.score("a", 0.0, wanted, lambda made: None))
        while not pipeline.open_blocks:
            await asyncio.sleep(0.01)
        pipeline.received(rows[:2])
        await asyncio.sleep(0.05)
        assert (asked.done(), pipeline.open_blocks) == (False, 1)
        assert pipeline.in_hand("ada") == [c.clip_id for c in wanted if c.method != "base"]
        assert not [words for words in work.told if "finish" in words]
        pipeline.received(rows)
        return await asyncio.wait_for(asked, 5)

    assert asyncio.run(ask()) == rows


def test_a_good_row_wins_whatever_the_order() -> None:
    good, bad = clip("c", video_uri="v"), clip("c", error="out of luck")
    assert best([good, bad]) == best([bad, good]) == {"c": good}


def test_a_model_that_failed_is_asked_again_and_a_missing_face_is_not() -> None:
    scored, failed = clip("c", motion_reward=1.0), clip("c", motion_error="crash")
    assert best([failed, scored]) == {"c": scored}
    faceless = clip("d", identity_error="no face was found")
    assert best([faceless, clip("d", video_uri="later")]) == {"d": faceless}
