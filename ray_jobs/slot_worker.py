"""What one worker of a training slot holds, the base transformer and the engine, and how it trains one task.

Neither the VAE nor the text encoders are in memory: latents and text embeddings come from the run directory, and a
validation sample is kept as latents, to be decoded by the generator pool later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa
import safetensors.torch

from magicid import adapters, storage
from magicid.backbones import load_backbone
from magicid.backbones.base import TextEmbeddings
from magicid.recipe import Recipe
from magicid.run import Run, training_uri
from magicid.schema import Pair
from magicid.training.checkpoint import CheckpointStore
from magicid.training.engine import create_engine
from magicid.training.hpo import train_hpo
from magicid.training.loggers import Curves
from magicid.training.loop import LogRow, TrainingResult
from magicid.training.lora import LoraState
from magicid.training.pairs import PairStore, read_latents, read_text
from magicid.training.sft import first_frames, train_sft
from magicid.training.tokens import TOKENS, train_tokens
from ray_jobs import watchdog
from ray_jobs.queue import Task
from ray_jobs.stages import device, limit_threads

RAW_FILE = "lora.safetensors"  # PEFT's names: what the next stage starts from
WEIGHTS_FILE = adapters.WEIGHTS_NAME  # the published form; written last, so where it is, all is
REPORTED = ("loss", "accuracy", "gradient_factor")

OnProgress = Callable[[int, dict[str, float]], None]


class SlotWorker:
    """One worker's resident base model and engine; trains one task after the other."""

    def __init__(self, recipe: Recipe, run: Run, *, engine: Literal["deepspeed", "torch"] = "deepspeed") -> None:
        limit_threads(recipe.resources.threads)
        self.recipe, self.run = recipe, run
        self.backbone = load_backbone(recipe, parts=("transformer",), device=device())
        self.engine = create_engine(
            self.backbone.transformer, self.backbone.lora_target_modules(), recipe.lora, recipe.trainer, kind=engine
        )
        self._tokens: LoraState = {}  # extended tokens as they are, where these are trained
        watchdog.limit_memory(recipe.fleet.memory_limit_gib)

    def train(self, task: Task, progress: OnProgress) -> dict[str, Any]:
        """Train one identity through one stage and write its adapter; returns what the ledger keeps.

        Raises:
            MagicIDError: the identity cannot be trained; its last good checkpoint is kept.
        """
        identity_id, name = task.payload["identity_id"], task.payload["stage"]
        weights = self.run.path(training_uri(identity_id, name, WEIGHTS_FILE))
        if storage.exists(weights):
            return {"sha256": storage.sha256_bytes(storage.read_bytes(weights))}
        recipe = self.recipe.for_identity(task.payload["overrides"])
        folder = self.run.path(training_uri(identity_id, name, "checkpoints"))
        stage = self._sft if name == "sft" else self._hpo
        curves = self._curves(identity_id, name)
        self._alive()
        try:
            progress(0, {})
            steps = recipe.sft.steps if name == "sft" else recipe.hpo.steps
            watch = _Watch(progress, self._alive, curves, self._keeper(task, recipe, steps))
            result = stage(task, recipe, CheckpointStore(folder, name), watch)
            sha256 = self._write(identity_id, name, result) if self.engine.rank == 0 else ""
        finally:
            watchdog.start_time_limit(0)
            curves.close()
        return {"steps": result.steps, "loss": result.history[-1]["loss"], "sha256": sha256}

    def _curves(self, identity_id: str, stage: str) -> Curves:
        """What the recipe's loggers are told, by one worker."""
        settings = self.recipe.training
        place = self.run.path(training_uri(identity_id, stage, "logs"))
        if settings.folder:
            place = storage.join(settings.folder, identity_id, stage)
        names = settings.loggers if self.engine.rank == 0 else []
        return Curves(names, place, f"{identity_id}/{stage}", self.run.location)

    def _alive(self) -> None:
        """Each step has its own time; a worker that hangs in one ends, and its slot with it."""
        watchdog.start_time_limit(self.recipe.fleet.step_limit_s)

    def _sft(self, task: Task, recipe: Recipe, checkpoints: CheckpointStore, watch: _Watch) -> TrainingResult:
        examples = task.payload["examples"]
        clips = {example["clip_id"]: read_latents(self.run.location, example["latents_uri"]) for example in examples}
        clips = {clip_id: first_frames(latents, recipe.sft.frames) for clip_id, latents in clips.items()}
        texts = {example["clip_id"]: read_text(self.run.location, example["text_uri"]) for example in examples}
        if recipe.sft.tokens:
            self.engine.reset(None, None, learning_rate=0.0, weight_decay=0.0, max_grad_norm=1.0, seed=0)  # no effect
            return train_tokens(
                self.backbone, clips, texts, recipe.sft, recipe.trainer, device=self.engine.device, on_log=watch.log,
                on_step=watch.step, on_tokens=lambda step, tokens: self._tokens.update({TOKENS: tokens.float().cpu()}),
            )  # fmt: skip
        return train_sft(
            self.engine, self.backbone, clips, texts, recipe.sft, recipe.trainer, checkpoints,
            on_log=watch.log, on_step=watch.step,
        )  # fmt: skip

    def _hpo(self, task: Task, recipe: Recipe, checkpoints: CheckpointStore, watch: _Watch) -> TrainingResult:
        identity_id = task.payload["identity_id"]
        pairs = PairStore(self.run.read(f"pairs/{identity_id}.parquet", Pair), self.run.location)
        sft = storage.read_bytes(self.run.path(training_uri(identity_id, "sft", RAW_FILE)))
        text = pairs[next(iter(pairs.kinds))].text
        return train_hpo(
            self.engine, self.backbone, pairs, safetensors.torch.load(sft), recipe.hpo, recipe.trainer,
            recipe.sampling.guidance_scale, checkpoints,
            on_log=watch.log, on_step=watch.step, validate=lambda step: self._validate(identity_id, step, text, recipe),
        )  # fmt: skip

    def _validate(self, identity_id: str, step: int, text: TextEmbeddings, recipe: Recipe) -> None:
        """Sample one clip with the policy, always the same prompt and seed, and keep its latents."""
        latents = self.backbone.sample_text(text, [recipe.hpo.seed])
        if self.engine.rank == 0:
            uri = training_uri(identity_id, "hpo", f"validation/step-{step:06d}.safetensors")
            storage.write_arrays(self.run.path(uri), {"latents": latents[0].float().cpu().numpy()})

    def _write(self, identity_id: str, stage: str, result: TrainingResult) -> str:
        """Write what a stage made; returns the hash of the weights, which are written last."""

        def path(name: str) -> str:
            return self.run.path(training_uri(identity_id, stage, name))

        storage.write_table(path("log.parquet"), list(result.history), log_schema(result.history))
        storage.write_bytes(path(RAW_FILE), safetensors.torch.save(result.lora_state))
        return storage.write_bytes(path(WEIGHTS_FILE), self._published(result.lora_state))

    def _published(self, state: LoraState) -> bytes:
        """The file that the sampler loads."""
        if TOKENS in state:
            return safetensors.torch.save(state)
        named = self.backbone.lora_state_dict(state)
        return adapters.to_bytes(named, self.recipe.lora.rank, self.recipe.lora.alpha)

    def _keeper(self, task: Task, recipe: Recipe, steps: int) -> Callable[[int], None]:
        """Keeps the adapter every `evaluation.every` steps, for curves; the last step has a file of its own."""
        every, state_now = recipe.evaluation.every, self.engine.lora_state
        if recipe.sft.tokens:
            state_now = self._tokens.copy
        identity_id, stage = task.payload["identity_id"], task.payload["stage"]

        def keep(step: int) -> None:
            if every and step % every == 0 and step < steps:
                state = state_now()
                if self.engine.rank == 0:
                    uri = training_uri(identity_id, stage, f"steps/step-{step:06d}.safetensors")
                    storage.write_bytes(self.run.path(uri), self._published(state))

        return keep


def log_schema(history: list[LogRow]) -> pa.Schema:
    """`step` and one float column per logged quantity."""
    names = list(history[0]) if history else ["step"]
    return pa.schema([(name, pa.float64()) for name in names])


class _Watch:
    """Joins what the loop tells: the log row every few steps, the step number at each."""

    def __init__(
        self, progress: OnProgress, alive: Callable[[], None], curves: Curves, keep: Callable[[int], None]
    ) -> None:
        self.progress, self.alive, self.curves, self.keep = progress, alive, curves, keep
        self.metrics: dict[str, float] = {}

    def log(self, row: LogRow) -> None:
        self.metrics = {name: row[name] for name in REPORTED if name in row}
        self.curves.log(row)

    def step(self, step: int) -> None:
        self.alive()
        self.keep(step)
        self.progress(step, self.metrics)
