"""One actor class per model. Every stage is one-to-one: a batch of clip rows in, the same clips out, with more columns.

| stage           | reads                     | adds                                                        |
|-----------------|---------------------------|-------------------------------------------------------------|
| GenerateClips   | prompt, seed, adapter_uri | video_uri, latents_uri, text_uri, attempts, error           |
| ScoreIdentity   | video_uri                 | embeddings (frames' face embeddings), identity_error        |
| ScoreMotion     | video_uri                 | motion_reward, motion_error                                 |
| ScoreSemantics  | video_uri, prompt         | semantics_reward, semantics_error                           |
| MeasureClips    | video_uri, prompt         | the columns of MetricRow                                    |

A row that fails carries its reason on; it never ends the job. Pixels stay in storage, rows carry URI + SHA-256.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from magicid import schema, storage
from magicid.attempts import Attempts
from magicid.clips import decode_mp4
from magicid.errors import MagicIDError, RewardError
from magicid.generation import Generator
from magicid.recipe import Recipe
from magicid.run import Run
from magicid.schema import Clip, Identity, MetricRow, ScoredClip
from magicid.weights import resolve


class Stage:
    """Base of the stages: Arrow batch in, Arrow batch out, the clips in the same order.

    Args:
        recipe: the recipe as plain values; Ray pickles it.
        run: location of the run directory.
        job: name of this start of the job, for the ledger of tries.
    """

    reads: type = ScoredClip
    writes: type = ScoredClip

    def __init__(self, recipe: dict[str, Any], run: str, job: str) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.run, self.job = Run(run), job
        limit_threads(self.recipe.resources.threads)
        self.setup()

    def setup(self) -> None:
        """Load the model."""

    def process(self, rows: list[Any]) -> Iterator[Any]:
        """One output row for each input row."""
        raise NotImplementedError(f"{type(self).__name__} must map its rows")

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[Any] = [schema.from_row(self.reads, row) for row in batch.to_pylist()]
        results = list(self.process(rows))
        if [r.clip_id for r in results] != [r.clip_id for r in rows]:
            raise MagicIDError(f"{type(self).__name__} lost or reordered rows", "report this as a defect")
        return pa.Table.from_pylist(schema.to_rows(results), schema=schema.arrow_schema(self.writes))


class Scorer(Stage):
    """A stage that looks at one clip at a time; one that fails, or kills the process, becomes a row with a reason."""

    def process(self, rows: list[ScoredClip]) -> Iterator[Any]:
        attempts = Attempts(self.run, self.job, self.recipe.repository.attempts)
        for row in rows:
            try:
                attempts.begin(f"{type(self).__name__}-{row.identity_id or 'shared'}-{row.clip_id}")
                yield self.score(row, *self._frames(row))
            except Exception as error:  # one clip's failure is a value with a reason
                yield self.failed(row, reason(error))

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> Any:
        """The row with what this stage adds, from frames uint8 (F, H, W, 3). May raise anything."""
        raise NotImplementedError(f"{type(self).__name__} must score a clip")

    def failed(self, row: ScoredClip, why: str) -> Any:
        """The row with nulls and the reason."""
        raise NotImplementedError(f"{type(self).__name__} must say that it failed")

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


class GenerateClips(Stage):
    """Samples the clips that are wanted, or finds the finished ones in storage."""

    reads, writes = Clip, ScoredClip

    def setup(self) -> None:
        self.generator = Generator(self.recipe, self.run, job=self.job, device=device())

    def process(self, rows: list[Clip]) -> Iterator[ScoredClip]:
        for clip in self.generator.make(rows):
            yield ScoredClip(**schema.to_row(clip))


class ScoreIdentity(Scorer):
    """Face embeddings of every frame; R_id against any person is then a dot product."""

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

    def setup(self) -> None:
        from magicid.rewards.dynamics import MotionReward

        self.model = MotionReward.from_pretrained(resolve(self.recipe.rewards.motion), device=device())

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> ScoredClip:
        return dataclasses.replace(row, motion_reward=self.model.score(frames), motion_error=None)

    def failed(self, row: ScoredClip, why: str) -> ScoredClip:
        return dataclasses.replace(row, motion_reward=None, motion_error=why)


class ScoreSemantics(Scorer):
    """R_sem: the vision-language model's expected rating, 1..10."""

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

    writes = MetricRow

    def __init__(self, recipe: dict[str, Any], run: str, job: str, identities: list[dict[str, Any]]) -> None:
        people = [schema.from_row(Identity, row) for row in identities]
        self.references = {p.identity_id: np.asarray(p.metric_references, np.float32) for p in people}
        super().__init__(recipe, run, job)

    def setup(self) -> None:
        from magicid.evaluation.metrics import Metrics

        self.metrics = Metrics.from_recipe(self.recipe, device=device())

    def score(self, row: ScoredClip, frames: np.ndarray, fps: int) -> MetricRow:
        values = self.metrics.measure(frames, fps, row.prompt, self.references[str(row.identity_id)])
        return schema.from_row(MetricRow, {**values, **self._asked(row), "error": values.get("error")})

    def failed(self, row: ScoredClip, why: str) -> MetricRow:
        empty = dict.fromkeys(("face_sim", "face_detect_rate", "dynamic_magnitude", "prompt_score"))
        sizes = {key: getattr(self.recipe.sampling, key) for key in ("fps", "frames", "height", "width")}
        return schema.from_row(MetricRow, {**self._asked(row), **empty, **sizes, "error": why})

    @staticmethod
    def _asked(row: ScoredClip) -> dict[str, Any]:
        names = ("clip_id", "identity_id", "method", "prompt", "seed", "video_uri")
        return {name: getattr(row, name) for name in names}


def reason(error: Exception) -> str:
    """What a row keeps of an exception."""
    return str(error) if isinstance(error, MagicIDError) else f"{type(error).__name__}: {error}"
