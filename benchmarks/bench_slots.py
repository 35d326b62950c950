"""Identities per hour: a training slot against a trainer for each identity, in one run.

    python benchmarks/bench_slots.py [--steps 20] [--identities 8] [--cold 2]

Both sides do the same SFT steps on the same photo clips, one worker. A trainer each pays for worker start, imports, the
process group and loading the base model every time; a slot pays once. Printed: identities per hour for `--identities`
in one slot, its start included, against as many trainers, of which `--cold` are measured (goal: at least 5 times); and
what one more identity costs a warm slot beyond its own steps (goal: at most 1 s). The ratio falls as training grows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from typing import Any

import ray

from magicid import manifests, recipe, repository
from magicid.backbones import base_sha256
from magicid.recipe import Recipe
from magicid.run import Run, training_uri
from ray_jobs import services, work
from ray_jobs.customize import photo_examples
from ray_jobs.job import connect
from ray_jobs.queue import Task
from ray_jobs.slots import Slots
from ray_jobs.work import TRAINING


async def examples(settings: Recipe, run: Run, location: str) -> list[dict[str, Any]]:
    """The photo clips of the first identity, as SFT takes them."""
    rows, _ = manifests.read_manifest(location)
    there = services.on_ray(settings, run, "bench")
    person = await there.intake.check(rows[0])
    wanted = repository.static_clips(settings, base_sha256(settings), person)
    made = await there.pipeline.score("bench", 0.0, wanted, lambda rows: None)
    await asyncio.to_thread(there.pipeline.stop)
    return photo_examples(made, person)


def train(settings: Recipe, run: Run, names: list[str], clips: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Train them in one slot that is started for them: seconds in all, and between one end and the next."""
    name, handle = work.start(settings)
    payload = {"overrides": {}, "stage": "sft", "examples": clips}
    tasks = [Task(f"{who}/sft", "bench", 1.0, payload={"identity_id": who, **payload}) for who in names]
    ray.get(handle.put.remote(TRAINING, tasks))
    slots, began, ends = Slots(settings, run, (name, handle)), time.perf_counter(), []
    while len(ends) < len(names):
        view = ray.get(handle.view.remote())
        for ended in view.ended[TRAINING]:
            assert ended.state == "done", ended.error
            ends.append(time.perf_counter())
        slots.adjust(view.waiting[TRAINING], view.held[TRAINING])
        time.sleep(0.1)
    ray.get(handle.send_home.remote(TRAINING, True))
    slots.join()
    ray.kill(handle)
    return ends[-1] - began, [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--identities", type=int, default=8)
    parser.add_argument("--cold", type=int, default=2)
    parser.add_argument("--manifest", default="examples/demo.jsonl")
    options = parser.parse_args()
    settings = recipe.load("face-world", {"sft.steps": options.steps, "resources.slots": 1, "evaluation.clips": 0})
    connect(settings)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        run.open(settings, base_sha256(settings))
        clips = asyncio.run(examples(settings, run, options.manifest))
        cold = [train(settings, run, [f"cold{number}"], clips)[0] for number in range(options.cold)]
        names = [f"warm{number}" for number in range(options.identities)]
        slot_s, gaps = train(settings, run, names, clips)
        # the same identities with twice the steps: the difference is what the steps themselves take
        twice = settings.with_overrides({"sft.steps": 2 * options.steps})
        _, long_gaps = train(twice, run, [f"long{number}" for number in range(3)], clips)
        assert all(run.has(training_uri(name, "sft", "lora.safetensors")) for name in names)
    ray.shutdown()
    each, slot = statistics.mean(cold), slot_s / options.identities
    steps_s = statistics.median(long_gaps) - statistics.median(gaps)
    print(f"{options.steps} SFT steps per identity, {settings.sft.batch_size} clips a step, one worker")
    print(f"a trainer each   {each:6.1f} s per identity  {[round(value, 1) for value in cold]}")
    print(f"a slot           {slot:6.1f} s per identity, start included; between two {[round(v, 1) for v in gaps]}")
    print(f"identities per hour, a slot : a trainer each = {each / slot:.2f} (goal >= 5)")
    print(f"one more identity beyond its own steps: {statistics.median(gaps) - steps_s:.2f} s (goal <= 1)")


if __name__ == "__main__":
    main()
