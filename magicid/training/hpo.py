"""Hybrid Preference Optimization: move the policy toward winners and away from losers, relative to the frozen SFT
model (paper: AdamW, 5000 steps).

Winner and loser share prompt, noise level and noise. Each pair has `noise_draws` fixed draws; the reference's errors on
them are computed at the first visit and kept, so that later visits cost the policy's passes only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from magicid import recipe
from magicid.backbones.base import TextEmbeddings, VideoBackbone, add_noise, stack_text, velocity_target
from magicid.storage import sha256_json
from magicid.training.checkpoint import CheckpointStore, ReferenceErrors
from magicid.training.engine import Engine
from magicid.training.loop import LogRow, Progress, TrainingResult, to_device
from magicid.training.lora import POLICY, REFERENCE, LoraState, state_sha256
from magicid.training.loss import HpoLoss, hpo_loss_from_errors, velocity_error
from magicid.training.pairs import PairOrder, PairTensors, Visit, draw, draw_number, rank_slice

LOGGED = (
    "loss",
    "inside",
    "accuracy",
    "gradient_factor",
    "policy_winner",
    "policy_loser",
    "reference_winner",
    "reference_loser",
)


class Pairs(Protocol):
    """Where pairs come from; `magicid.training.pairs.PairStore` reads them from a run directory."""

    @property
    def kinds(self) -> dict[str, str]:
        """Pair id -> kind."""

    @property
    def sha256(self) -> str:
        """Hash of which pairs there are."""

    def __getitem__(self, pair_id: str) -> PairTensors:
        """One pair."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs of one micro-batch on the engine's device; everything but the latents is common to both sides."""

    keys: list[str]  # "<pair id>/<draw>"
    winner: Tensor  # (B, C, F, H, W)
    loser: Tensor
    noise: Tensor
    sigma: Tensor  # (B,)
    text: TextEmbeddings
    weights: Tensor  # (B,): 0 for the repeats that fill up a worker's share


def train_hpo(
    engine: Engine,
    backbone: VideoBackbone,
    pairs: Pairs,
    reference: LoraState,
    settings: recipe.Hpo,
    trainer: recipe.Trainer,
    guidance_scale: float,
    checkpoints: CheckpointStore | None = None,
    *,
    on_log: Callable[[LogRow], None] = lambda row: None,
    on_step: Callable[[int], None] = lambda step: None,
    validate: Callable[[int], None] = lambda step: None,
) -> TrainingResult:
    """Train the policy from the SFT LoRA, which also is the frozen reference.

    All workers call it alike; the result does not depend on how many there are (to rounding).

    Args:
        reference: the SFT LoRA; its hash is pinned in the first checkpoint.
        guidance_scale: embedded guidance, the one the pairs were sampled with.
        on_log: called on the first worker with a row every `trainer.log_every` steps.
        on_step: called on every worker after each step, with the number of steps done.
        validate: called on every worker every `settings.validate_every` steps, the policy active, before the step's
            checkpoint: after a kill it may be called again for a step, never left out.

    Raises:
        NonFiniteLossError: on all workers together; the last checkpoint is kept.
        ReferenceMovedError: a checkpoint was pinned to another reference.
        TrainingError: no pairs, or a checkpoint of other settings or pairs.
        Exception: what loading a pair, `validate` or `on_log` raised on one worker, on all workers together.
    """
    order = PairOrder(pairs.kinds, settings.batch_size, settings.static_share, settings.seed)
    progress = Progress(
        engine,
        checkpoints,
        trainer,
        settings.seed,
        settings_sha256=_settings_sha256(settings, trainer, guidance_scale, pairs),
        reference_sha256=state_sha256(reference),
    )
    engine.set_reference(reference)
    start = progress.begin(
        reference,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )
    for step in range(start, settings.steps):
        began = time.perf_counter()
        share = rank_slice(order.batch(step), engine.rank, engine.world_size)
        sums = torch.zeros(len(LOGGED), dtype=torch.float64)
        for part in progress.micro_batches(share):
            batch = progress.together(partial(load_batch, engine, pairs, part, settings, trainer))
            kept = reference_errors(engine, backbone, batch, guidance_scale, progress.reference_errors)
            loss = pair_gradients(
                engine, backbone, batch, kept, settings, guidance_scale, short_of_memory=trainer.gradient_checkpointing
            )
            sums += _weighted(loss, batch.weights)
            if not settings.noise_draws:
                progress.reference_errors.clear()  # a fresh draw is never met again
        means = progress.agree(sums / settings.batch_size, step)
        norm = engine.step()
        row = dict(zip(LOGGED, means.tolist()))
        row |= {"gradient_norm": norm, "steps_per_second": 1 / (time.perf_counter() - began)}
        # Before the checkpoint: one that is there says that its validation is done. Every draw of the training has a
        # generator of its own, so that what the validation draws changes nothing.
        if settings.validate_every and (step + 1) % settings.validate_every == 0:
            with torch.no_grad():
                progress.together(partial(validate, step + 1))
        progress.after_step(step + 1, settings.steps, row, on_log)
        on_step(step + 1)
    return progress.result(settings.steps)


def load_batch(
    engine: Engine, pairs: Pairs, part: list[tuple[Visit, float]], settings: recipe.Hpo, trainer: recipe.Trainer
) -> PairBatch:
    """The pairs of some visits with their draws, on the engine's device."""
    loaded = [pairs[visit.pair_id] for visit, _ in part]
    numbers = [draw_number(visit.number, settings.noise_draws) for visit, _ in part]
    draws = [draw(settings.seed, p.pair_id, n, p.winner.shape, trainer.shift) for p, n in zip(loaded, numbers)]
    device = engine.device
    return PairBatch(
        keys=[f"{pair.pair_id}/{number}" for pair, number in zip(loaded, numbers)],
        winner=torch.stack([pair.winner for pair in loaded]).to(device),
        loser=torch.stack([pair.loser for pair in loaded]).to(device),
        noise=torch.stack([d.noise for d in draws]).to(device),
        sigma=torch.stack([d.sigma for d in draws]).to(device),
        text=to_device(stack_text([pair.text for pair in loaded]), device),
        weights=torch.tensor([weight for _, weight in part], device=device),
    )


def reference_errors(
    engine: Engine, backbone: VideoBackbone, batch: PairBatch, guidance_scale: float, kept: ReferenceErrors
) -> tuple[Tensor, Tensor]:
    """The reference's errors (B,), (B,) of a batch, from `kept`; computed and added where one is missing.

    With several workers all compute when one must: under ZeRO-3 a forward pass needs all of them.
    """
    missing = any(key not in kept for key in batch.keys)
    if float(engine.sum_over_workers(torch.tensor([float(missing)]))) > 0:
        engine.use(REFERENCE)
        try:
            with torch.no_grad():
                winner, loser = _both_errors(engine, backbone, batch, guidance_scale)
        finally:
            engine.use(POLICY)
        for key, *both in zip(batch.keys, winner.tolist(), loser.tolist()):
            kept.setdefault(key, (both[0], both[1]))
    values = torch.tensor([kept[key] for key in batch.keys], device=engine.device)
    return values[:, 0], values[:, 1]


def pair_gradients(
    engine: Engine,
    backbone: VideoBackbone,
    batch: PairBatch,
    reference: tuple[Tensor, Tensor],
    settings: recipe.Hpo,
    guidance_scale: float,
    *,
    short_of_memory: bool,
) -> HpoLoss:
    """Add the gradient of a micro-batch to the engine's sum: HPO loss plus anchor * beta * (winner error).

    Short of memory, one pair at a time, winner and loser are differentiated one after the other, so that the
    activations of one clip live at a time: with g the gradient of an error, that of the pair's loss is
    0.5 beta sigma(-inside) (g_winner - g_loser), and its weight is known by then.
    """
    scale = engine.world_size / settings.batch_size
    anchor = settings.anchor * settings.beta
    if not short_of_memory:
        winner, loser = _both_errors(engine, backbone, batch, guidance_scale)
        loss = hpo_loss_from_errors(winner, loser, *reference, beta=settings.beta)
        engine.backward(((loss.per_pair + anchor * winner) * batch.weights).sum(), scale)
        return loss
    winner = _error(engine, backbone, batch, batch.winner, guidance_scale)
    winner_gradients = engine.gradients(winner.sum())
    loser = _error(engine, backbone, batch, batch.loser, guidance_scale)
    loser_gradients = engine.gradients(loser.sum())
    loss = hpo_loss_from_errors(winner.detach(), loser.detach(), *reference, beta=settings.beta)
    weight = 0.5 * settings.beta * float(loss.gradient_factor)
    scale *= float(batch.weights)
    engine.accumulate(winner_gradients, scale * (weight + anchor))
    engine.accumulate(loser_gradients, -scale * weight)
    return loss


def _error(engine: Engine, backbone: VideoBackbone, batch: PairBatch, clean: Tensor, guidance_scale: float) -> Tensor:
    """Velocity error (B,) of one side under the active adapter."""
    noisy = add_noise(clean, batch.noise, batch.sigma)
    with engine.autocast():
        velocity = backbone.predict_velocity(noisy, batch.sigma, batch.text, guidance_scale)
    return velocity_error(velocity, velocity_target(clean, batch.noise))


def _both_errors(
    engine: Engine, backbone: VideoBackbone, batch: PairBatch, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Velocity errors (B,) of winners and losers under the active adapter, in one forward pass of 2 B clips."""
    doubled = PairBatch(
        keys=batch.keys * 2,
        winner=batch.winner,
        loser=batch.loser,
        noise=torch.cat([batch.noise, batch.noise]),
        sigma=torch.cat([batch.sigma, batch.sigma]),
        text=stack_text([batch.text, batch.text]),
        weights=torch.cat([batch.weights, batch.weights]),
    )
    both = _error(engine, backbone, doubled, torch.cat([batch.winner, batch.loser]), guidance_scale)
    winner, loser = both.split(len(batch.keys))
    return winner, loser


def _weighted(loss: HpoLoss, weights: Tensor) -> Tensor:
    """Weighted sums over the micro-batch of what is logged, in the order of LOGGED, float64 on the CPU."""
    columns = [loss.per_pair if name == "loss" else getattr(loss, name) for name in LOGGED]
    return (torch.stack([column.detach().double() for column in columns]) * weights.double()).sum(1).cpu()


def _settings_sha256(settings: recipe.Hpo, trainer: recipe.Trainer, guidance_scale: float, pairs: Pairs) -> str:
    return sha256_json(
        {
            "hpo": settings.model_dump(mode="json", exclude={"steps", "validate_every"}),
            "shift": trainer.shift,
            "guidance_scale": guidance_scale,
            "pairs": pairs.sha256,
        }
    )
