"""SFT and Hybrid Preference Optimization of many adapters in one batch; the losses are the trainer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from magicid import recipe
from magicid.backbones.base import TextEmbeddings, add_noise, shifted_sigma, velocity_target
from magicid.laboratory.clips import Bank, Sampler
from magicid.laboratory.population import Population, Stack
from magicid.schema import Pair
from magicid.training.loss import hpo_loss_from_errors, velocity_error
from magicid.training.pairs import PairOrder

SIDES = ("winner_id", "loser_id")
Tick = Callable[[str, int, float], None]
"""Told the stage, the step and the mean loss."""


def train_sft(
    sampler: Sampler,
    weights: Stack,
    photos: Sequence[Tensor],
    captions: Sequence[Sequence[str]],
    settings: recipe.Sft,
    shift: float,
    at: Sequence[int],
    tick: Tick = lambda stage, step, loss: None,
    rates: Sequence[float] = (),
) -> dict[int, Stack]:
    """Self-reconstruction of inflated photos.

    Args:
        weights: K fresh adapters: LoRAs, or extended tokens (MagicMe).
        photos: latents (P, C, F, H, W) of each adapter's person.
        captions: P of each adapter's person.
        shift: of the noise levels.
        at: steps after which the adapters are copied; the last one ends the training.
        rates: learning rate of each adapter; the settings' where empty.

    Returns:
        step -> copies.
    """
    population = Population(
        weights, rates or [settings.learning_rate] * len(photos), weight_decay=settings.weight_decay
    )
    each, kept = settings.batch_size, {}
    rng, randomness = np.random.default_rng(settings.seed), _generator(settings.seed, sampler.device)
    order = [np.concatenate([rng.permutation(len(p)) for _ in range(-(-each * max(at) // len(p)))]) for p in photos]
    for step in range(max(at)):
        rows = [indices[step * each : (step + 1) * each] for indices in order]
        text = sampler.text([captions[k][row] for k, indices in enumerate(rows) for row in indices])
        clean = torch.cat([latents[torch.from_numpy(r).to(latents.device)] for latents, r in zip(photos, rows)])
        noise = torch.randn(clean.shape, generator=randomness, device=sampler.device)
        sigma = _sigma(len(clean), randomness, shift)
        with sampler.under(population.weights, text) as told:
            velocity = sampler.backbone.predict_velocity(
                add_noise(clean, noise, sigma), sigma, told, settings.guidance_scale
            )
        loss = velocity_error(velocity, velocity_target(clean, noise)).sum() / each
        population.step(loss)
        if step + 1 in at:
            kept[step + 1] = population.snapshot()
            tick("sft", step + 1, float(loss.detach()) / len(photos))
    return kept


@dataclass(frozen=True)
class Preference:
    """One adapter's training by preferences: its pairs and settings."""

    pairs: Sequence[Pair]
    settings: recipe.Hpo


def train_hpo(
    sampler: Sampler,
    start: Stack,
    reference: Stack,
    preferences: Sequence[Preference],
    bank: Bank,
    guidance_scale: float,
    shift: float,
    at: Sequence[int],
    tick: Tick = lambda stage, step, loss: None,
) -> dict[int, Stack]:
    """Preference training of K adapters, each from its own SFT adapter.

    As `magicid.training.hpo`, with fresh noise at every visit and one batch size for all.

    Args:
        start: the K SFT adapters.
        reference: K frozen adapters whose errors those of the trained ones are compared with: the same, unless another
            reading is wanted.
        at: steps after which the adapters are copied; the last one ends the training.

    Raises:
        ValueError: an adapter without pairs, or different batch sizes.
    """
    (each,) = {p.settings.batch_size for p in preferences}
    if not all(p.pairs for p in preferences):
        raise ValueError("an adapter has no pairs")
    first = preferences[0].settings
    population = Population(
        {name: tensor.clone() for name, tensor in start.items()},
        [p.settings.learning_rate for p in preferences],
        weight_decay=first.weight_decay,
        max_grad_norm=first.max_grad_norm,
    )
    device, randomness, kept = sampler.device, _generator(first.seed, sampler.device), {}
    beta, anchor = (
        torch.tensor([value for p in preferences for value in [getattr(p.settings, key)] * each], device=device)
        for key in ("beta", "anchor")
    )
    orders = [
        PairOrder({x.pair_id: x.kind for x in p.pairs}, each, p.settings.static_share, p.settings.seed)
        for p in preferences
    ]
    by_id = [{pair.pair_id: pair for pair in p.pairs} for p in preferences]
    count, latents = len(preferences), bank.latents
    for step in range(max(at)):
        batch = [
            pairs[visit.pair_id] for pairs, order in zip(by_id, orders) for visit in order.batch(step)
        ]  # (K * each), adapter by adapter
        winner, loser = (latents[bank.index([getattr(pair, side) for pair in batch]).to(device)] for side in SIDES)
        drawn = _Pairs(
            winner,
            loser,
            noise=torch.randn(winner.shape, generator=randomness, device=device),
            sigma=_sigma(len(batch), randomness, shift),
            text=sampler.text([pair.prompt for pair in batch]),
        )
        with torch.no_grad():
            frozen = _errors(sampler, reference, drawn, count, guidance_scale)
        policy = _errors(sampler, population.weights, drawn, count, guidance_scale)
        loss = hpo_loss_from_errors(*policy, *frozen, beta=beta)  # type: ignore[arg-type]  # one beta a pair
        total = (loss.per_pair + anchor * beta * policy[0]).sum() / each
        population.step(total)
        if step + 1 in at:
            kept[step + 1] = population.snapshot()
            tick("hpo", step + 1, float(loss.loss.detach()))
    return kept


@dataclass(frozen=True)
class _Pairs:
    """The pairs of one step, adapter by adapter: (K * b, ...) each; both sides share noise, level and prompt."""

    winner: Tensor
    loser: Tensor
    noise: Tensor
    sigma: Tensor
    text: TextEmbeddings


def _errors(
    sampler: Sampler, weights: Stack, pairs: _Pairs, count: int, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    """Velocity errors (K * b,) of winners and losers under K adapters, in one forward pass."""

    def both(a: Tensor, b: Tensor) -> Tensor:  # each adapter's winners, then its losers
        return torch.cat([a.unflatten(0, (count, -1)), b.unflatten(0, (count, -1))], 1).flatten(0, 1)

    clean, noise, sigma = (
        both(pairs.winner, pairs.loser),
        both(pairs.noise, pairs.noise),
        both(pairs.sigma, pairs.sigma),
    )
    text = {name: both(tensor, tensor) for name, tensor in pairs.text.items()}
    with sampler.adapters.active(weights):
        velocity = sampler.backbone.predict_velocity(add_noise(clean, noise, sigma), sigma, text, guidance_scale)
    error = velocity_error(velocity, velocity_target(clean, noise)).view(count, 2, -1)
    return error[:, 0].flatten(), error[:, 1].flatten()


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _sigma(count: int, randomness: torch.Generator, shift: float) -> Tensor:
    uniform = torch.rand(count, generator=randomness, device=randomness.device, dtype=torch.float64)
    return shifted_sigma(uniform, shift).float()
