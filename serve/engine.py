"""The continuous batch: videos that come and go while all of them are denoised together.

Each row has its own prompt, adapter, guidance, seed, number of steps and progress. Rows whose latents have one shape
share a forward of the transformer; what a row becomes does not depend on the others. Every row is what the plain
diffusers pipeline would make of it: the same noise, the same scheduler, the same true classifier-free guidance.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from magicid.backbones.base import TextEmbeddings, stack_text
from magicid.backbones.mixed_lora import LoraWeights, MixedLora
from magicid.backbones.pipeline import PipelineBackbone
from magicid.errors import GenerationError, MagicIDError
from serve.schema import VideoRequest

_NEGATIVE = "negative_"  # prefix of the negative prompt's embeddings, as `encode_prompts` gives them


@dataclass(frozen=True)
class Sample:
    """A row that left the batch: its latents float32 (1, C, F, H, W), or why there are none."""

    key: str
    latents: Tensor | None = None
    error: MagicIDError | None = None


@dataclass
class _Row:
    """One video on its way."""

    key: str
    lora: LoraWeights | None
    text: TextEmbeddings
    negative: TextEmbeddings  # empty without true classifier-free guidance
    guidance_scale: float
    true_cfg_scale: float
    scheduler: Any
    latents: Tensor  # float32 (1, C, F, H, W)
    steps: int
    done: int = 0


class BatchFull(GenerationError):
    """The batch has no row left; it passes when a video leaves."""


class Engine:
    """Denoises up to `max_batch` videos together, one step of each at a time.

    `step` is for one thread. `admit`, `drop` and `progress`, and decoding in one other, may go on meanwhile.

    Args:
        backbone: with all its parts loaded. It must not be used otherwise, and carries no adapter of its own.
        compiler: backend of torch.compile for the transformer; empty: not compiled. Another identity compiles nothing
            anew; another number of rows, another shape or a higher rank than any before does, once.
    """

    def __init__(self, backbone: PipelineBackbone, *, max_batch: int, compiler: str = "") -> None:
        self._backbone, self.max_batch = backbone, max_batch
        self._lora = MixedLora(backbone.transformer, backbone.lora_target_modules(), keep_ranks=bool(compiler))
        if compiler:
            backbone.transformer.compile(backend=compiler)
        self._rows: dict[str, _Row] = {}
        self._admitting = threading.Lock()  # tokenizers are not safe for several threads

    def admit(self, key: str, request: VideoRequest, lora: LoraWeights | None) -> None:
        """Encode the prompt and put a video into the batch; it moves with the next `step`.

        As in the pipeline, a negative prompt acts only where true classifier-free guidance is on: with Wan above
        guidance 1, with HunyuanVideo above the recipe's true_cfg_scale 1. Without one the recipe's is taken.

        Raises:
            BatchFull: there is no row left.
            GenerationError: the key is in the batch.
            BackboneError: frames, height or width do not fit the model.
            AdapterError: the adapter has modules that this recipe does not adapt.
        """
        with self._admitting:
            if key in self._rows:
                raise GenerationError(f"video {key} is in the batch already", "admit it once")
            if len(self._rows) >= self.max_batch:
                problem = f"video {key} cannot join: the batch of {self.max_batch} is full"
                raise BatchFull(problem, "admit it when another has left")
            if lora is not None:
                self._lora.check(lora)
            self._rows[key] = self._make_row(key, request, lora)

    @torch.inference_mode()
    def _make_row(self, key: str, request: VideoRequest, lora: LoraWeights | None) -> _Row:
        backbone = self._backbone.with_sampling(**_sampling(request))  # it keeps no prompts: there is no end of them
        text = backbone.encode_prompts([request.prompt])
        text = {name: tensor.to(backbone.device, backbone.transformer.dtype) for name, tensor in text.items()}
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn((1, *backbone.latent_shape()), generator=generator)
        arguments = backbone.call_arguments({})
        return _Row(
            key,
            lora and lora.scaled(request.lora_scale),
            {name: tensor for name, tensor in text.items() if not name.startswith(_NEGATIVE)},
            {name.removeprefix(_NEGATIVE): tensor for name, tensor in text.items() if name.startswith(_NEGATIVE)},
            request.guidance_scale,
            arguments.get("true_cfg_scale", arguments["guidance_scale"]),  # Wan's guidance is this one
            _scheduler(backbone, request.steps),
            noise.to(backbone.device),
            request.steps,
        )

    @torch.inference_mode()
    def step(self) -> list[Sample]:
        """One denoising step of every row; those that are done leave, and those that failed, with their error.

        Rows with true classifier-free guidance take a second forward under their negative prompts. When a forward
        runs out of memory its rows are tried one by one.
        """
        groups: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
        for row in list(self._rows.values()):
            groups[tuple(row.latents.shape)].append(row)
        return [sample for rows in groups.values() for sample in self._step(rows)]

    def _step(self, rows: list[_Row]) -> list[Sample]:
        try:
            velocity = self._guided_velocity(rows)
        except torch.OutOfMemoryError as error:
            if len(rows) > 1:  # too many at once need not be too large each
                return [sample for row in rows for sample in self._step([row])]
            problem = f"video {rows[0].key} does not fit into memory: {error}"
            return self._leave(rows[0], Sample(rows[0].key, error=GenerationError(problem, "ask for a smaller one")))
        finite = velocity.isfinite().flatten(1).all(1).tolist()
        samples = []
        for row, change, good in zip(rows, velocity.split(1), finite):
            if not good:
                samples += self._leave(row, Sample(row.key, error=_not_finite(row)))
                continue
            timestep = row.scheduler.timesteps[row.done]
            row.latents = row.scheduler.step(change, timestep, row.latents, return_dict=False)[0]
            row.done += 1
            if row.done == row.steps:
                samples += self._leave(row, Sample(row.key, row.latents))
        return samples

    def _leave(self, row: _Row, sample: Sample) -> list[Sample]:
        """Take a row out; no sample of it when it was dropped meanwhile."""
        if self._rows.get(row.key) is not row:
            return []
        self.drop(row.key)
        return [sample]

    def _guided_velocity(self, rows: Sequence[_Row]) -> Tensor:
        """Velocity float32 (B, C, F, H, W) of rows of one shape, with true classifier-free guidance where it is on."""
        velocity = self._velocity(rows, [row.text for row in rows])
        guided = [number for number, row in enumerate(rows) if row.negative]
        if guided:
            chosen = [rows[number] for number in guided]
            unconditional = self._velocity(chosen, [row.negative for row in chosen])
            scale = torch.tensor([row.true_cfg_scale for row in chosen], device=velocity.device).view(-1, 1, 1, 1, 1)
            velocity[guided] = unconditional + scale * (velocity[guided] - unconditional)
        return velocity

    def _velocity(self, rows: Sequence[_Row], texts: Sequence[TextEmbeddings]) -> Tensor:
        """One forward under these texts."""
        self._lora.set_rows([row.lora for row in rows])
        return self._backbone.predict_velocity(
            torch.cat([row.latents for row in rows]),
            torch.stack([row.scheduler.sigmas[row.done] for row in rows]),
            stack_text(texts),
            torch.tensor([row.guidance_scale for row in rows]),
        )

    def drop(self, key: str) -> None:
        """Take a video out of the batch, if it is there; its computing ends with the step under way."""
        self._rows.pop(key, None)

    def progress(self) -> dict[str, int]:
        """Denoising steps done of each video in the batch, in per cent, 0..99."""
        return {row.key: 100 * row.done // row.steps for row in list(self._rows.values())}

    @property
    def swaps(self) -> int:
        """How often a row of the batch got another adapter, since the start."""
        return self._lora.swaps

    def decode(self, latents: Tensor, request: VideoRequest) -> np.ndarray:
        """A finished video, uint8 RGB (F, H, W, 3). Raises GenerationError when it has not the size asked for."""
        return self.decode_all([(latents, request)])[0]

    def decode_all(self, finished: Sequence[tuple[Tensor, VideoRequest]]) -> list[np.ndarray]:
        """`decode` of several videos, in order; on a CPU those of one shape together, which takes half the time.

        On a GPU one after another: little would be gained, and memory is what limits the size of a batch.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (latents, _) in enumerate(finished):
            groups[tuple(latents.shape) if latents.device.type == "cpu" else (number,)].append(number)
        videos: dict[int, np.ndarray] = {}
        for numbers in groups.values():
            clips = self._backbone.decode(torch.cat([finished[number][0] for number in numbers]))
            videos |= dict(zip(numbers, clips))
        for number, (_, request) in enumerate(finished):
            shape, expected = videos[number].shape, (request.frames, request.height, request.width, 3)
            if shape != expected:
                raise GenerationError(f"a clip has the shape {shape}, not {expected}", "correct frames and size")
        return [videos[number] for number in range(len(finished))]


def _sampling(request: VideoRequest) -> dict[str, Any]:
    """The request's sampling settings, in the recipe's names."""
    names = ("frames", "height", "width", "fps", "steps", "guidance_scale")
    changes = {name: getattr(request, name) for name in names}
    if request.negative_prompt is not None:
        changes["negative_prompt"] = request.negative_prompt
    return changes


def _scheduler(backbone: PipelineBackbone, steps: int) -> Any:
    """A scheduler of a row's own, set as the pipeline sets it."""
    scheduler = backbone.new_scheduler()
    if backbone.recipe.backbone.kind == "hunyuan":  # its pipeline names its own noise levels, before the shift
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    else:
        scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def _not_finite(row: _Row) -> GenerationError:
    problem = f"video {row.key} became NaN or infinite at step {row.done + 1} of {row.steps}"
    return GenerationError(problem, "check the adapter, lower lora_scale, or use another precision")
