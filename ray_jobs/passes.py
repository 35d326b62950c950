"""The pools that make clips: one long pass of Ray Data that all identities share.

    TakeBlocks ─ GenerateClips ─ ScoreIdentity ─ ScoreMotion ─ ScoreSemantics ─ MeasureClips ─▶ scored/ evaluation/

The source is a queue, so the models stay loaded while identities come and go. A pass ends when nothing is wanted for a
while, which gives its machines back, and begins again with the next clip.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import pyarrow as pa
import ray

from magicid import schema
from magicid.errors import GenerationError
from magicid.recipe import Recipe
from magicid.run import Run
from magicid.schema import Made
from ray_jobs import pools, stages
from ray_jobs.job import cause
from ray_jobs.keeping import LAST_KIND
from ray_jobs.pipeline import Pipeline
from ray_jobs.work import CLIPS

TICKETS = 512  # blocks of one pass; then the models are loaded again, which bounds what Ray Data remembers
PAUSE_S = 5  # after the first broken pass, longer after the next: a full disk may be seen to
BROKEN_PASSES = 3  # passes in a row that ended with an error and no clip before what is wanted is given up


class Passes:
    """Runs Ray Data in a thread of its own while something is wanted.

    Args:
        job: name of this start of the job, for the ledger of tries.
        work: name and handle of the queues' actor.
    """

    def __init__(self, recipe: Recipe, run: Run, job: str, work: tuple[str, Any]) -> None:
        self.recipe, self.run, self.job = recipe, run, job
        self._work_name, self._work = work
        self._wanted, self._stop = threading.Event(), False
        self._thread: threading.Thread | None = None

    def begin(self, pipeline: Pipeline) -> None:
        """Something is wanted."""
        self._work.send_home.remote(CLIPS, False)
        self._wanted.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._passes, args=(pipeline,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the pass; what is in hand is finished."""
        self._stop = True
        self._work.send_home.remote(CLIPS, True)
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(timeout=60)

    def _passes(self, pipeline: Pipeline) -> None:
        broken = 0
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stop:
                return
            while pipeline.open_blocks and not self._stop:
                before = pipeline.open_blocks
                try:
                    self._pass(pipeline)
                    broken = 0
                except Exception as error:
                    broken = broken + 1 if pipeline.open_blocks >= before else 1
                    if broken >= BROKEN_PASSES:
                        pipeline.problem = GenerationError(
                            f"the pools cannot work: {cause(error)}",
                            "see the worker's log and `magicid check`, then run the same command again",
                        )
                        return
                    time.sleep(PAUSE_S * broken)

    def _pass(self, pipeline: Pipeline) -> None:
        """One execution over the pools, until its tickets are used up or nothing is wanted any more."""
        batch: pa.Table
        name = uuid.uuid4().hex[:8]
        ray.get(self._work.begin_pass.remote(name))
        for batch in self._dataset(name).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            rows = [schema.from_row(Made, row) for row in batch.to_pylist()]
            pipeline.received(rows)
            if any(row.kind == LAST_KIND for row in rows) and not pipeline.open_blocks:
                return

    def _dataset(self, name: str) -> ray.data.Dataset:
        pools.configure()
        resources = self.recipe.resources
        each = [
            (stages.GenerateClips, resources.generator),
            (stages.ScoreIdentity, resources.identity),
            (stages.ScoreMotion, resources.motion),
            (stages.ScoreSemantics, resources.semantics),
        ]
        if self.recipe.evaluation.clips and self.recipe.evaluation.identity:
            each.append((stages.MeasureClips, resources.identity))
        arguments = {"recipe": self.recipe.model_dump(mode="json"), "run": self.run.location, "job": self.job}
        dataset: ray.data.Dataset = ray.data.from_items(list(range(TICKETS)), override_num_blocks=TICKETS)
        dataset = pools.add_source(dataset, stages.TakeBlocks, {"work": self._work_name, "of": name})
        for stage, pool in each:
            dataset = pools.add_stage(dataset, stage, pool, {**arguments, "last": stage is each[-1][0]})
        return dataset
