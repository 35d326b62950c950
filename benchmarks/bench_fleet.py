"""The driver's cost against the number of identities, and how busy it keeps 64 GPUs, on simulated workers.

    python benchmarks/bench_fleet.py [--identities 10 100 1000 10000 100000] [--carried 100] [--whole 1000]
                                     [--times 1] [--plot docs/fleet-scale.svg]

What is real and what is not: ray_jobs/simulation.py. For each size, in a process of its own: a manifest of so many rows
is planned, then worked on for as long as 64 GPUs need for `--carried` identities, while the others wait. Printed: time,
CPU and peak memory of planning; the driver's CPU for each identity, which is its part of planning and as much work as
one identity is; the same of the queues' actor. What the simulation's own loop takes to go on as often with workers that
do nothing is measured apart and not counted. `--whole N`: N identities to the last one, and the busy part of 64 GPUs.
These are split as the work is, for the durations assumed: 29 slots, 33 generators and 2 GPUs of scorers.
`--times N`: N times as many GPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from magicid import ledger, recipe
from magicid.recipe import Recipe
from magicid.run import Run
from ray_jobs.fleet import Fleet
from ray_jobs.simulated_cluster import Durations
from ray_jobs.simulation import PHOTOS, Outcome, overhead, simulate

GPUS = 64
OWNERS = 3


def settings(times: int) -> Recipe:
    """HunyuanVideo at 480p with all 64 GPUs given out, or `times` as many."""

    def pool(size: int, gpus: float) -> dict[str, float]:
        return {"min_size": times * size, "max_size": times * size, "gpus": gpus}

    return recipe.load(
        "hunyuan-480p",
        {
            "identities.require_consent": False,
            "resources.slots": times * 29,
            "resources.generator": pool(33, 1),
            # as quick as 33 generators when all of them make clips to score, or all make clips to measure
            "resources.identity": pool(7, 0.1),
            "resources.motion": pool(2, 0.1),
            "resources.semantics": pool(4, 0.1),
        },
    )


def work_of_one(settings: Recipe, took: Durations) -> float:
    """Device-seconds of one identity, by the recipe and the durations."""
    own, evaluated = settings.repository.trained_clips, settings.evaluation.clips
    made = PHOTOS * took.photo_clip + (own + 2 * evaluated) * took.clip + evaluated * took.found_clip
    resources = settings.resources
    rewards = took.identity * resources.identity.gpus + took.motion * resources.motion.gpus
    rewards += took.semantics * resources.semantics.gpus
    measured = 3 * evaluated * took.measure * resources.identity.gpus
    trained = settings.sft.steps * took.sft_step + settings.hpo.steps * took.hpo_step
    return made + (own + PHOTOS) * rewards + measured + trained


def run(identities: int, carried: int, times: int, folder: str) -> dict[str, Any]:
    """One size: a row of the table."""
    manifest = Path(folder) / "people.jsonl"
    with manifest.open("w") as file:
        for number in range(identities):
            photos = [f"photos/{number:06d}/{photo}.png" for photo in range(5)]
            row = {"id": f"p{number:06d}", "owner": f"tenant-{number % OWNERS}", "photos": photos, "consent": "form-1"}
            file.write(json.dumps(row) + "\n")
    start_mib, found = _peak_mib(), {}
    began, began_cpu = time.monotonic(), time.process_time()

    async def planned(fleet: Fleet, where: Run) -> None:
        while not fleet.ledger.records:  # the driver plans without waiting for anything
            await asyncio.sleep(0)
        found.update(plan_s=time.monotonic() - began, plan_cpu_s=time.process_time() - began_cpu, plan_mib=_peak_mib())

    used, gpus = settings(times), times * GPUS
    each = work_of_one(used, Durations())
    lasts_s = None if carried >= identities else carried * each / gpus
    outcome = simulate(used, str(manifest), folder + "/run", rows=False, meanwhile=planned, lasts_s=lasts_s)
    worked, planning_s = outcome.busy(gpus) * gpus * outcome.seconds / each, found["plan_cpu_s"]
    simulation_s = overhead(used, outcome.cluster.steps)
    working_s = outcome.cpu["driver"] - planning_s - simulation_s
    return {
        "identities": identities,
        "carried": worked,
        "ended": outcome.ledger.states[ledger.DONE],
        "start_mib": start_mib,
        **found,
        "driver_ms": 1000 * (planning_s / identities + working_s / worked),
        "simulation_ms": 1000 * simulation_s / worked,
        "queues_ms": 1000 * outcome.cpu["queues"] / worked,
        "peak_mib": _peak_mib(),
        "hours": outcome.seconds / 3600,
        **_busy(outcome, gpus),
    }


def _busy(outcome: Outcome, gpus: int) -> dict[str, Any]:
    """The busy part of all GPUs, over the run, by kind and by hour."""
    kinds: defaultdict[str, float] = defaultdict(float)
    for (_, kind), seconds in outcome.cluster.busy.items():
        kinds[kind] += round(seconds / outcome.seconds, 2)
    by_hour: defaultdict[int, float] = defaultdict(float)
    for end, _, work in outcome.cluster.served:
        by_hour[int(end // 3600)] += work / 3600 / gpus
    return {
        "busy": outcome.busy(gpus),
        "gpus_by_kind": dict(kinds),
        "by_hour": [round(by_hour[hour], 3) for hour in range(max(by_hour, default=0) + 1)],
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(identities: int, carried: int, times: int) -> dict[str, Any]:
    """`run` in a process of its own, so that memory is its own."""
    command = [sys.executable, __file__, "--one", str(identities), str(carried), str(times)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def plot(rows: list[dict[str, Any]], location: str) -> None:
    """CPU and memory against identities, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    sizes = [row["identities"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.loglog(sizes, [row["driver_ms"] for row in rows], "o-", label="driver, each identity")
    left.loglog(sizes, [row["queues_ms"] for row in rows], "s--", label="queues' actor, each identity")
    left.axhline(50, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="identities in the run", ylabel="CPU ms")
    left.legend()
    right.semilogx(sizes, [row["plan_mib"] for row in rows], "o-", label="peak, everything imported")
    right.semilogx(sizes, [row["plan_mib"] - row["start_mib"] for row in rows], "s--", label="above the start")
    right.set(xlabel="identities in the run", ylabel="MiB", ylim=(0, None))
    right.legend()
    figure.savefig(location, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--identities", type=int, nargs="*", default=[10, 100, 1000, 10_000, 100_000])
    parser.add_argument("--carried", type=int, default=100)
    parser.add_argument("--whole", type=int, default=1000)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--plot", default="")
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(*options.one, folder)))
        return
    rows = []
    for identities in options.identities:
        rows.append(row := apart(identities, options.carried, options.times))
        print(
            f"{identities:7d} identities: planned in {row['plan_s']:.1f} s ({row['plan_cpu_s']:.1f} s of CPU), peak "
            f"{row['plan_mib']:.0f} MiB ({row['plan_mib'] - row['start_mib']:.0f} above the start); each of "
            f"{row['carried']:.0f} carried: driver {row['driver_ms']:.1f} ms (and the simulation itself "
            f"{row['simulation_ms']:.1f}), queues {row['queues_ms']:.1f} ms; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    if options.plot:
        plot(rows, options.plot)
    if options.whole:
        gpus = options.times * GPUS
        row = apart(options.whole, options.whole, options.times)
        print(f"{row['ended']} identities to the end: {row['hours']:.1f} hours, {row['busy']:.1%} of {gpus} GPUs busy")
        print(f"  GPUs busy by kind: {row['gpus_by_kind']}")
        print(f"  busy by hour, the first and the last: {row['by_hour'][:3]} ... {row['by_hour'][-8:]}")


if __name__ == "__main__":
    main()
