"""One actor class per model. Every stage is one-to-one: a batch of clip rows in, the same clips out, with more columns.

| stage           | reads                     | adds                                                        |
|-----------------|---------------------------|-------------------------------------------------------------|
| GenerateClips   | prompt, seed, adapter_uri | video_uri, latents_uri, text_uri, attempts, error           |
| ScoreIdentity   | video_uri                 | embeddings (frames' face embeddings), identity_error        |
| ScoreMotion     | video_uri                 | motion_reward, motion_error                                 |
| ScoreSemantics  | video_uri, prompt         | semantics_reward, semantics_error                           |
| MeasureClips    | video_uri, prompt         | a MetricRow beside the clip                                 |

The last of them writes the rows to the run and hands on what the driver needs to know (keeping.py).
Rewards look at the clips of the preference repository, metrics at the others; each passes on what is not its own, so
one pass serves both and the video model is loaded once. A row that fails carries its reason on; it never ends the job.
One that hangs, or eats memory, ends its process and is given up when its tries are used up. A storage that is full or
away is no row's failure: the pass over the pools breaks and is begun again. Pixels stay in storage, rows carry URI +
SHA-256. Each stage imports its model's libraries when it is set up: all of them cost a process seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from magicid import schema, storage, storage_errors
from magicid.attempts import Attempts
from magicid.clips import decode_mp4
from magicid.errors import MagicIDError, RewardError, StorageError
from magicid.photos import read_image
from magicid.recipe import Recipe
from magicid.run import Run
from magicid.schema import REWARDED, Clip, Made, MetricRow, ScoredClip
from magicid.weights import resolve
from ray_jobs import watchdog
from ray_jobs.keeping import LAST_KIND, Finished, is_measured, keep
from ray_jobs.work import END

POLL_S = 0.2  # how often an idle source asks for work
LAST = Clip("last", LAST_KIND, None, "", "", "", 0)  # what an idle source sends: the pass may end


class Stage:
    """Base of the stages: Arrow batch in, Arrow batch out, the clips in the same order.

    Args:
        recipe: the recipe as plain values; Ray pickles it.
        run: location of the run directory.
        job: name of this start of the job, for the ledger of tries.
        last: whether this is the last stage, which keeps the rows.
    """

    name = ""  # of the class: Ray Data makes a class of its own of it, so `type(self)` does not say
    reads: type = ScoredClip
    writes: type = ScoredClip

    def __init__(self, recipe: dict[str, Any], run: str, job: str, last: bool = False) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.run, self.job, self.last = Run(run), job, last
        limit_threads(self.recipe.resources.threads)
        self.setup()
        watchdog.limit_memory(self.recipe.fleet.memory_limit_gib)

    @contextmanager
    def timed(self, seconds: dict[str, float]) -> Iterator[None]:
        """Watch the work on one clip, and note how long it took under the stage's name."""
        began = time.perf_counter()
        with watchdog.time_limit(self.recipe.fleet.clip_limit_s):
            yield
        seconds[self.name] = time.perf_counter() - began

    def setup(self) -> None:
        """Load the model."""

    def process(self, rows: list[Any]) -> Iterator[Any]:
        """One output row for each input row."""
        raise NotImplementedError(f"{self.name} must map its rows")

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Any] = [schema.from_row(self.reads, row) for row in batch.to_pylist()]
        results = list(self.process(rows))
        if [_clip(r).clip_id for r in results] != [r.clip_id for r in rows]:
            raise MagicIDError(f"{self.name} lost or reordered rows", "report this as a defect")
        if not self.last:
            return pa.Table.from_pylist(schema.to_rows(results), schema=schema.arrow_schema(self.writes))
        made = keep(self.run, [r if isinstance(r, Finished) else Finished(r) for r in results])
        return pa.Table.from_pylist(schema.to_rows(made), schema=schema.arrow_schema(Made))


def _clip(result: Any) -> Any:
    return result.clip if isinstance(result, Finished) else result


class Scorer(Stage):
    """A stage that looks at one clip at a time; one that fails, or kills the process, becomes a row with a reason."""

    def process(self, rows: list[ScoredClip]) -> Iterator[Any]:
        attempts = Attempts(self.run, self.job, self.recipe.repository.attempts)
        for row in rows:
            if not self.concerns(row):
                yield self.passed(row)
                continue
            seconds, key = dict(row.seconds), f"{self.name}-{row.identity_id or 'shared'}-{row.clip_id}"
            attempted = False
            try:
                attempts.begin(key)
                attempted = True
                with self.timed(seconds):
                    scored = self.score(row, *self._frames(row))
            except Exception as error:  # one clip's failure is a value with a reason
                if isinstance(error, StorageError) and storage_errors.outage(error):
                    raise  # that of the storage says nothing of the clip
                scored = self.failed(row, reason(error))
            if attempted:  # or a pass that breaks would count against clips that did nothing
                attempts.came_back(key)
            yield self.with_seconds(scored, seconds)

    def concerns(self, row: ScoredClip) -> bool:
        """Whether this stage looks at the clip."""
        return row.kind in REWARDED

    def passed(self, row: ScoredClip) -> Any:
        """What comes out for a clip that is not this stage's."""
        return row

    def with_seconds(self, result: Any, seconds: dict[str, float]) -> Any:
        """The result with the time that was spent on it."""
        return dataclasses.replace(result, seconds=seconds)

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> Any:
        """The row with what this stage adds, from frames uint8 (F, H, W, 3). May raise anything."""
        raise NotImplementedError(f"{self.name} must score a clip")

    def failed(self, row: ScoredClip, why: str) -> Any:
        """The row with nulls and the reason."""
        raise NotImplementedError(f"{self.name} must say that it failed")

    def _frames(self, clip: Clip) -> tuple[np.ndarray, int]:
        """The clip's frames and fps, its bytes checked against the row's hash."""
        if clip.error is not None or clip.video_uri is None:
            raise RewardError(f"clip {clip.clip_id} was not made: {clip.error}", "see its row")
        data = storage.read_bytes(self.run.path(clip.video_uri))
        if storage.sha256_bytes(data) != clip.video_sha256:
            raise RewardError(f"{clip.video_uri} differs from its hash", "remove the file and run again")
        return decode_mp4(data)


def limit_threads(threads: int) -> None:
    """Torch threads of this process; 0 keeps torch's default."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def device() -> str:
    """`cuda` where Ray gave this actor a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class TakeBlocks:
    """The pipeline's source: a ticket in, the next few clips out, once somebody wants some; none at the end.

    A ticket that comes again, because a process or a machine was lost, gets the same clips.
    """

    def __init__(self, work: str, of: str) -> None:
        self.work, self.of = ray.get_actor(work), of

    def __call__(self, batch: pa.Table) -> pa.Table:
        ticket = f"ticket-{batch.column('item')[0].as_py()}"
        task: Any = None
        while (task := ray.get(self.work.take_block.remote(self.of, ticket))) is None:
            time.sleep(POLL_S)
        rows = schema.to_rows([LAST]) if task == END else task.payload["clips"]
        return pa.Table.from_pylist(rows, schema=schema.arrow_schema(Clip))


class GenerateClips(Stage):
    """Samples the clips that are wanted, or finds the finished ones in storage."""

    name = "GenerateClips"
    reads, writes = Clip, ScoredClip

    def setup(self) -> None:
        from magicid.generation import Generator

        self.generator = Generator(self.recipe, self.run, job=self.job, device=device())

    def process(self, rows: list[Clip]) -> Iterator[ScoredClip]:
        for row in rows:
            seconds: dict[str, float] = {}
            clip = row
            if row.kind != LAST.kind:
                with self.timed(seconds):
                    (clip,) = self.generator.make([row])
            yield ScoredClip(**schema.to_row(clip), seconds=seconds)


class ScoreIdentity(Scorer):
    """Face embeddings of every frame; R_id against any person is then a dot product."""

    name = "ScoreIdentity"

    def setup(self) -> None:
        from magicid.rewards.identity import IdentityReward

        self.model = IdentityReward.from_pretrained(
            resolve(self.recipe.rewards.identity),
            detection_size=self.recipe.rewards.detection_size,
            detection_threshold=self.recipe.identities.detection_threshold,
            device=device(),
        )

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> ScoredClip:
        embeddings = self.model.embed(frames)
        found = [bool(np.isfinite(embedding).all()) for embedding in embeddings]
        if not any(found):
            raise RewardError("no face was found in any frame", "nothing to do: the clip is not used")
        listed = [embedding.tolist() if ok else None for embedding, ok in zip(embeddings, found)]
        return dataclasses.replace(row, embeddings=listed, identity_error=None)

    def failed(self, row: ScoredClip, why: str) -> ScoredClip:
        return dataclasses.replace(row, embeddings=None, identity_error=why)


class ScoreMotion(Scorer):
    """R_dy: mean optical-flow magnitude, px per frame."""

    name = "ScoreMotion"

    def setup(self) -> None:
        from magicid.rewards.dynamics import MotionReward

        rewards = self.recipe.rewards
        self.model = MotionReward.from_pretrained(resolve(rewards.motion), device(), rewards.motion_window)

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> ScoredClip:
        return dataclasses.replace(row, motion_reward=self.model.score(frames), motion_error=None)

    def failed(self, row: ScoredClip, why: str) -> ScoredClip:
        return dataclasses.replace(row, motion_reward=None, motion_error=why)


class ScoreSemantics(Scorer):
    """R_sem: the vision-language model's expected rating, 1..10."""

    name = "ScoreSemantics"

    def setup(self) -> None:
        from magicid.rewards.semantics import SemanticsReward

        self.model = SemanticsReward.from_pretrained(
            resolve(self.recipe.rewards.semantics), frames=self.recipe.rewards.semantics_frames, device=device()
        )

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> ScoredClip:
        rating = self.model.score(frames, row.prompt, fps)
        return dataclasses.replace(row, semantics_reward=rating, semantics_error=None)

    def failed(self, row: ScoredClip, why: str) -> ScoredClip:
        return dataclasses.replace(row, semantics_reward=None, semantics_error=why)


class MeasureClips(Scorer):
    """The table's metrics, by networks that no reward used, against the identity that the row names."""

    name = "MeasureClips"

    def setup(self) -> None:
        from magicid.evaluation.metrics import Metrics

        self.metrics = Metrics.from_recipe(self.recipe, device=device())
        self.base_sha256 = str(storage.read_json(self.run.path("run.json")).get("base_sha256", ""))
        self.person = functools.lru_cache(maxsize=1000)(self._person)

    def _person(self, identity_id: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """What this person's clips are compared with: reference embeddings, and photos where a metric looks at them."""
        person = self.run.identity(identity_id)
        photos = [read_image(self.run.path(uri)) for uri in person.photos] if self.metrics.looks_at_photos else []
        return np.asarray(person.metric_references, np.float32), photos

    def concerns(self, row: ScoredClip) -> bool:
        return is_measured(row)

    def passed(self, row: ScoredClip) -> Finished:
        return Finished(row)

    def with_seconds(self, result: Finished, seconds: dict[str, float]) -> Finished:
        return dataclasses.replace(result, clip=dataclasses.replace(result.clip, seconds=seconds))

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> Finished:
        values = self.metrics.measure(frames, fps, row.prompt, *self.person(str(row.identity_id)))
        return Finished(row, schema.from_row(MetricRow, {**values, **self._asked(row)}))

    def failed(self, row: ScoredClip, why: str) -> Finished:
        from magicid.evaluation.metrics import COLUMNS

        empty = dict.fromkeys(COLUMNS)
        sizes = {key: getattr(self.recipe.sampling, key) for key in ("fps", "frames", "height", "width")}
        return Finished(row, schema.from_row(MetricRow, {**self._asked(row), **empty, **sizes, "error": why}))

    def _asked(self, row: ScoredClip) -> dict[str, Any]:
        names = ("clip_id", "identity_id", "method", "prompt", "seed", "video_uri", "step")
        adapter = {"base_sha256": self.base_sha256, "adapter_sha256": row.adapter_sha256 or ""}
        seed = {"sft": self.recipe.sft.seed, "hpo": self.recipe.hpo.seed}.get(row.method, 0)
        return {name: getattr(row, name) for name in names} | adapter | {"train_seed": seed}


def reason(error: Exception) -> str:
    """What a row keeps of an exception."""
    return str(error) if isinstance(error, MagicIDError) else f"{type(error).__name__}: {error}"
