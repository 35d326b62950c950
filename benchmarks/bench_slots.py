"""Identities per hour: a warm training slot against a trainer for each identity, in one run.

    python benchmarks/bench_slots.py [--steps 20]

Both sides do the same SFT steps on the same photo clips. A trainer each pays for worker start, imports, the process
group and loading the base model every time; a warm slot swaps the LoRA. Printed: seconds per identity and the ratio of
identities per hour (goal: at least 3). The ratio falls as the work per identity grows, so the steps are printed too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time

import ray
from rich.console import Console

from magicid import recipe, repository
from magicid.backbones import base_sha256
from magicid.identities import read_manifest
from magicid.run import Run
from ray_jobs import pipeline, slots
from ray_jobs.customize import photo_examples
from ray_jobs.intake import check_identities
from ray_jobs.job import connect
from ray_jobs.progress import Display
from ray_jobs.queue import Task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--identities", default="examples/demo.jsonl")
    options = parser.parse_args()
    settings = recipe.load("face-world", {"sft.steps": options.steps, "resources.slots": 1})
    connect(settings)
    display = Display(Console(quiet=True))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        run.open(settings, base_sha256(settings))
        rows, _ = read_manifest(options.identities)
        (person, *_), _ = check_identities(settings, run, rows[:1], "bench", display)
        wanted = repository.static_clips(settings, base_sha256(settings), person)
        clips = pipeline.score(settings, run, wanted, "bench", lambda done, row: None)
        payload = {"overrides": {}, "examples": photo_examples(clips, person)}

        def task(name: str) -> Task:
            return Task(name, "bench", "sft", options.steps, payload={"identity_id": name, **payload})

        cold = []
        for number in range(2):
            began = time.time()
            slots.train(settings, run, [task(f"cold{number}")], display)
            cold.append(time.time() - began)
        outcomes = slots.train(settings, run, [task(f"warm{number}") for number in range(3)], display)
        ends = sorted(outcome.ended_s or 0 for outcome in outcomes.values())
        warm = [after - before for before, after in itertools.pairwise(ends)]  # the first one warms the slot up
    ray.shutdown()
    each, slot = statistics.mean(cold), statistics.mean(warm)
    print(f"{options.steps} SFT steps per identity, {settings.sft.batch_size} clips a step, one worker")
    print(f"a trainer each   {each:6.1f} s per identity  {[round(value, 1) for value in cold]}")
    print(f"a warm slot      {slot:6.1f} s per identity  {[round(value, 1) for value in warm]}")
    print(f"identities per hour, warm slot : a trainer each = {each / slot:.2f} (goal >= 3)")


if __name__ == "__main__":
    main()
