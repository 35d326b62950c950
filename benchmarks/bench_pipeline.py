"""The Ray Data path against a single-process loop over the same clips on the same cores, in one run.

    python benchmarks/bench_pipeline.py [--clips 160]

Both generate and score the same clips with the same stage classes, from loading the models to the last row. The loop
has all cores as torch threads; the pools have one thread per actor and overlap. Printed: the ratio (goal: at most 1.1).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time

import pyarrow as pa
import ray
import torch

from magicid import recipe, repository, schema
from magicid.backbones import base_sha256
from magicid.prompts import load_prompts
from magicid.run import Run
from magicid.schema import Clip, Made
from ray_jobs import pipeline, services
from ray_jobs.job import connect
from ray_jobs.stages import GenerateClips, ScoreIdentity, ScoreMotion, ScoreSemantics


def loop(settings: recipe.Recipe, run: Run, wanted: list[Clip]) -> int:
    """One process, one model after the other for each small batch of clips."""
    torch.set_num_threads(os.cpu_count() or 1)
    arguments = (settings.model_dump(mode="json"), run.location, "loop")
    stages = [stage(*arguments) for stage in (GenerateClips, ScoreIdentity, ScoreMotion)]
    stages.append(ScoreSemantics(*arguments, last=True))
    rows = 0
    for block in pipeline.blocks(wanted):
        batch = pa.Table.from_pylist(schema.to_rows(block), schema=schema.arrow_schema(Clip))
        for stage in stages:
            batch = stage(batch)
        rows += batch.num_rows
    return rows


async def pools(settings: recipe.Recipe, run: Run, wanted: list[Clip]) -> list[Made]:
    """The job's own pools."""
    made = services.on_ray(settings, run, "pools").pipeline
    try:
        return await made.score("bench", 0.0, wanted, lambda rows: None)
    finally:
        await asyncio.to_thread(made.stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=160)
    options = parser.parse_args()
    settings = recipe.load("face-world", {"repository.base_clips": options.clips, "evaluation.clips": 0})
    prompts = [prompt for prompt in load_prompts(settings.prompts) if prompt.split == "training"]
    wanted = repository.base_clips(settings, base_sha256(settings), prompts, "person")
    connect(settings)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        began = time.perf_counter()
        rows = asyncio.run(pools(settings, Run(one), wanted))
        pools_s = time.perf_counter() - began
        ray.shutdown()
        began = time.perf_counter()
        assert loop(settings.with_overrides({"resources.threads": 0}), Run(two), wanted) == len(rows)
        loop_s = time.perf_counter() - began
    assert all(row.error is None for row in rows)
    print(f"{len(rows)} clips of {settings.sampling.frames} frames, {os.cpu_count()} cores")
    print(f"Ray Data pools        {pools_s:6.1f} s")
    print(f"single-process loop   {loop_s:6.1f} s")
    print(f"pools : loop = {pools_s / loop_s:.2f} (goal <= 1.1)")


if __name__ == "__main__":
    main()
