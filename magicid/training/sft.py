"""SFT, the initial fine-tune: self-reconstruction of the reference photos inflated to clips (paper: 1000 steps)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from magicid import recipe
from magicid.backbones.base import TextEmbeddings, VideoBackbone, add_noise, stack_text, velocity_target
from magicid.errors import TrainingError
from magicid.storage import sha256_bytes, sha256_json
from magicid.training.checkpoint import CheckpointStore
from magicid.training.engine import Engine
from magicid.training.loop import LogRow, Progress, TrainingResult, to_device
from magicid.training.loss import velocity_error
from magicid.training.pairs import Visit, draw, generator, rank_slice

FRAMES_PER_LATENT = 4  # of every backbone here; `Sampling` takes no other lengths


def train_sft(
    engine: Engine,
    backbone: VideoBackbone,
    clips: Mapping[str, Tensor],
    texts: Mapping[str, TextEmbeddings],
    settings: recipe.Sft,
    trainer: recipe.Trainer,
    checkpoints: CheckpointStore | None = None,
    *,
    on_log: Callable[[LogRow], None] = lambda row: None,
    on_step: Callable[[int], None] = lambda step: None,
) -> TrainingResult:
    """Train a fresh LoRA to reconstruct static clips under their captions: mean squared error of the velocity.

    All workers call it alike; the result does not depend on how many there are.

    Args:
        clips: clip id -> latents (C, F, H, W), one per photo.
        texts: clip id -> embeddings of its caption, batch dimension 1.
        on_log: called on the first worker with a row every `trainer.log_every` steps.
        on_step: called on every worker after each step, with the number of steps done.

    Raises:
        NonFiniteLossError: on all workers together; the last checkpoint is kept.
        TrainingError: no clips, or a checkpoint of other settings.
    """
    if not clips:
        raise TrainingError("there are no photo clips to train on", "check the identity's photos")
    progress = Progress(
        engine, checkpoints, trainer, settings.seed, settings_sha256=_settings_sha256(settings, trainer, clips, texts)
    )
    start = progress.begin(
        None, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, max_grad_norm=1.0
    )
    for step in range(start, settings.steps):
        began = time.perf_counter()
        batch = rank_slice(batch_of_step(list(clips), settings, step), engine.rank, engine.world_size)
        sums = torch.zeros(1, dtype=torch.float64)
        for part in progress.micro_batches(batch):
            loss, weights = _forward(engine, backbone, clips, texts, part, settings, trainer)
            engine.backward((loss * weights).sum(), engine.world_size / settings.batch_size)
            sums[0] += float((loss.detach() * weights).sum())
        (mean,) = progress.agree(sums / settings.batch_size, step).tolist()
        norm = engine.step()
        row = {"loss": mean, "gradient_norm": norm, "steps_per_second": 1 / (time.perf_counter() - began)}
        progress.after_step(step + 1, settings.steps, row, on_log)
        on_step(step + 1)
    return progress.result(settings.steps)


def first_frames(latents: Tensor, frames: int) -> Tensor:
    """The latents (C, F', H, W) of a photo clip's first frames; 0: all of them.

    The VAEs are causal and a photo clip stands still, so they are those of a shorter photo clip; 1 is a single frame.
    """
    return latents[:, : (frames - 1) // FRAMES_PER_LATENT + 1] if frames else latents


def batch_of_step(clip_ids: list[str], settings: recipe.Sft, step: int) -> list[Visit]:
    """The global batch of a step: seeded permutations of all clips, one after the other."""
    visits = []
    for index in range(step * settings.batch_size, (step + 1) * settings.batch_size):
        epoch, position = divmod(index, len(clip_ids))
        order = torch.randperm(len(clip_ids), generator=generator(settings.seed, "clips", epoch))
        visits.append(Visit(clip_ids[int(order[position])], epoch))
    return visits


def _forward(
    engine: Engine,
    backbone: VideoBackbone,
    clips: Mapping[str, Tensor],
    texts: Mapping[str, TextEmbeddings],
    part: list[tuple[Visit, float]],
    settings: recipe.Sft,
    trainer: recipe.Trainer,
) -> tuple[Tensor, Tensor]:
    """Velocity error and weight of each clip of a micro-batch, both (b,)."""
    clean = torch.stack([clips[visit.pair_id].float() for visit, _ in part]).to(engine.device)
    draws = [draw(settings.seed, v.pair_id, v.number, clean.shape[1:], trainer.shift) for v, _ in part]
    noise = torch.stack([d.noise for d in draws]).to(engine.device)
    sigma = torch.stack([d.sigma for d in draws]).to(engine.device)
    weights = torch.tensor([weight for _, weight in part], device=engine.device)
    captions = to_device(stack_text([texts[visit.pair_id] for visit, _ in part]), engine.device)
    with engine.autocast():
        velocity = backbone.predict_velocity(add_noise(clean, noise, sigma), sigma, captions, settings.guidance_scale)
    return velocity_error(velocity, velocity_target(clean, noise)), weights


def _settings_sha256(
    settings: recipe.Sft,
    trainer: recipe.Trainer,
    clips: Mapping[str, Tensor],
    texts: Mapping[str, TextEmbeddings],
) -> str:
    content = dict(clips)
    for clip_id in clips:
        content |= {f"{clip_id}/{name}": tensor for name, tensor in texts[clip_id].items()}
    return sha256_json(
        {
            "sft": settings.model_dump(mode="json", exclude={"steps"}),
            "shift": trainer.shift,
            "data": {name: sha256_bytes(t.float().cpu().contiguous().numpy().tobytes()) for name, t in content.items()},
        }
    )
