"""Adapters that are trained together learn what each learns alone in the trainer's engine."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from magicid import recipe
from magicid.laboratory.population import Population, StackedLora, stack, take
from magicid.training import lora
from magicid.training.engine import create_engine

RANK, ALPHA = 4, 8
TARGETS = r".*\.(to_q|to_k|to_v|add_q_proj)"
RATES, STEPS, GROUP = (3e-3, 1e-2), 4, 2


def transformer() -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip


def velocity(model: HunyuanVideoTransformer3DModel, latents: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(3)
    rows = len(latents)
    output: Tensor = model(
        hidden_states=latents,
        timestep=torch.full((rows,), 500.0),
        encoder_hidden_states=torch.randn(1, 5, 16, generator=random).expand(rows, -1, -1),
        encoder_attention_mask=torch.ones(rows, 5, dtype=torch.long),
        pooled_projections=torch.randn(1, 8, generator=random).expand(rows, -1),
        guidance=torch.full((rows,), 6000.0),
        return_dict=False,
    )[0]
    return output


def batches() -> list[Tensor]:
    """For each step latents (2 adapters * GROUP, 4, 2, 4, 4)."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(2 * GROUP, 4, 2, 4, 4, generator=random) for _ in range(STEPS)]


def alone(number: int, model: HunyuanVideoTransformer3DModel, initial: lora.LoraState) -> lora.LoraState:
    settings = recipe.Lora(rank=RANK, alpha=ALPHA)
    trainer = recipe.Trainer.model_validate({"precision": "float32", "gradient_checkpointing": False})
    engine = create_engine(copy.deepcopy(model), TARGETS, settings, trainer, kind="torch", device="cpu")
    engine.reset(initial, learning_rate=RATES[number], weight_decay=0.01, max_grad_norm=0.01)
    for latents in batches():
        mine = latents[number * GROUP : (number + 1) * GROUP]
        engine.backward((velocity(engine.transformer, mine) - mine).square().mean())
        engine.step()
    return engine.lora_state()


def test_two_adapters_at_once_equal_two_trainings_alone() -> None:
    model = transformer()
    model.requires_grad_(False)
    shapes = StackedLora(copy.deepcopy(model), TARGETS, rank=RANK, scale=ALPHA / RANK).shapes
    initial = [{n: t + 0.02 for n, t in lora.initial_state(shapes, seed).items()} for seed in (5, 6)]
    expected = [alone(number, model, state) for number, state in enumerate(initial)]

    adapters = StackedLora(model, TARGETS, rank=RANK, scale=ALPHA / RANK)
    population = Population(stack(initial, torch.device("cpu")), RATES, weight_decay=0.01, max_grad_norm=0.01)
    for latents in batches():
        with adapters.active(population.weights):
            error = (velocity(model, latents) - latents).square().flatten(1).mean(1)
        norms = population.step(error.sum() / GROUP)
        assert (norms > 0.01).all()  # so that clipping took part
    assert len(population) == 2
    for number, state in enumerate(expected):
        assert state.keys() == population.weights.keys()
        for name, tensor in state.items():
            moved = (tensor - initial[number][name]).abs().max()
            assert moved > 1e-3
            torch.testing.assert_close(population.weights[name][number].detach(), tensor, atol=1e-5, rtol=1e-4)


def test_without_adapters_the_base_answers() -> None:
    model = transformer()
    latents = batches()[0]
    with torch.no_grad():
        base = velocity(model, latents)
        adapters = StackedLora(model, TARGETS, rank=RANK, scale=1.0)
        weights = {n: t + 0.1 for n, t in adapters.initial([1, 2], torch.device("cpu")).items()}
        with adapters.active(weights):
            changed = velocity(model, latents)
        torch.testing.assert_close(velocity(model, latents), base)
        assert (changed - base).abs().max() > 1e-3
        with adapters.active(take(weights, [1])):
            torch.testing.assert_close(velocity(model, latents[GROUP:]), changed[GROUP:], atol=1e-5, rtol=1e-4)


def test_take_copies() -> None:
    weights = {"x": torch.arange(3.0).view(3, 1, 1)}
    taken = take(weights, [2, 0, 2])
    weights["x"].zero_()
    assert taken["x"].flatten().tolist() == [2.0, 0.0, 2.0]


@pytest.mark.parametrize("rows", [3])
def test_rows_must_divide_over_the_adapters(rows: int) -> None:
    model = transformer()
    adapters = StackedLora(model, TARGETS, rank=RANK, scale=1.0)
    with adapters.active(adapters.initial([1, 2], torch.device("cpu"))), pytest.raises(RuntimeError):
        velocity(model, torch.randn(rows, 4, 2, 4, 4))
