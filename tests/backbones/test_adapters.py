"""A LoRA trained through PEFT, published, and loaded here or by the plain pipeline gives the same clips."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from magicid.adapters import WEIGHTS_NAME, to_bytes
from magicid.backbones import load_backbone
from magicid.errors import AdapterError
from magicid.training import lora
from tests.backbones.test_backbones import PROMPTS, SEEDS, plain_call, plain_pipeline
from tests.tiny_models import tiny_recipe

RECIPES = ["hunyuan-480p", "wan-480p"]


def trained_lora(recipe: Any, seed: int = 0, rank: int | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """A training backbone whose policy adapter holds random numbers, and these under their published names."""
    backbone = load_backbone(recipe, parts=("transformer",))
    lora.attach(backbone.transformer, backbone.lora_target_modules(), rank or recipe.lora.rank, recipe.lora.alpha)
    policy = lora.parameters(backbone.transformer, lora.POLICY)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in policy.values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))
    state = {name: tensor.detach().clone() for name, tensor in policy.items()}
    return backbone, backbone.lora_state_dict(state)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("alpha", "layers"), [(4, "attention"), (8, "attention"), (8, "all")])
def test_published_training_sampling_and_the_plain_pipeline_agree(
    folders: dict[str, Path], tmp_path: Path, name: str, alpha: int, layers: str
) -> None:
    recipe = tiny_recipe(name, folders[name], lora__alpha=alpha, lora__layers=layers)  # rank 4
    training, published = trained_lora(recipe)
    (tmp_path / WEIGHTS_NAME).write_bytes(to_bytes(published, recipe.lora.rank, recipe.lora.alpha))

    backbone = load_backbone(recipe)
    base = backbone.sample(PROMPTS, SEEDS)
    backbone.load_adapter(published)
    adapted = backbone.sample(PROMPTS, SEEDS)
    assert (adapted - base).abs().max() > 1e-2

    pipeline = plain_pipeline(recipe)
    pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(plain_call(pipeline, recipe), adapted, atol=1e-5, rtol=0)

    text, sigma = backbone.encode_prompts(PROMPTS), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        trained = training.predict_velocity(base, sigma, text, 1.0)
        sampled = backbone.predict_velocity(base, sigma, text, 1.0)
    torch.testing.assert_close(sampled, trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_adapters_are_swapped_switched_off_and_on(folders: dict[str, Path], name: str) -> None:
    recipe = tiny_recipe(name, folders[name])
    (_, first), (_, second) = trained_lora(recipe, 1), trained_lora(recipe, 2)
    backbone = load_backbone(recipe)
    backbone.load_adapter(None)  # nothing to switch off yet
    samples = [backbone.sample(PROMPTS[:1], [0])]
    for state in (first, second, None, first):
        start = time.perf_counter()
        backbone.load_adapter(state)
        assert time.perf_counter() - start < 1
        samples.append(backbone.sample(PROMPTS[:1], [0]))
    base, with_first, with_second, without, again = samples
    assert torch.equal(base, without)
    assert torch.equal(with_first, again)
    assert (with_first - base).abs().max() > 1e-2
    assert (with_second - with_first).abs().max() > 1e-2
    assert list(backbone.transformer.peft_config) == ["default"]
    assert not any(parameter.requires_grad for parameter in backbone.transformer.parameters())


def test_an_adapter_of_another_rank_replaces_the_first(folders: dict[str, Path]) -> None:
    recipe = tiny_recipe("hunyuan-480p", folders["hunyuan-480p"])
    (_, small), (_, large) = trained_lora(recipe, 1, rank=2), trained_lora(recipe, 2, rank=8)
    backbone, fresh = load_backbone(recipe), load_backbone(recipe)
    backbone.load_adapter(small)
    backbone.load_adapter(large)
    fresh.load_adapter(large)
    assert torch.equal(backbone.sample(PROMPTS[:1], [0]), fresh.sample(PROMPTS[:1], [0]))


def test_double_means_the_dual_stream_blocks(folders: dict[str, Path]) -> None:
    modules = {}
    for blocks in ("all", "double"):
        _, published = trained_lora(tiny_recipe("hunyuan-480p", folders["hunyuan-480p"], lora__blocks=blocks))
        modules[blocks] = {name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in published}
    joint = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    assert modules["double"] == {f"transformer_blocks.0.attn.{name}" for name in joint}
    single = {f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")}
    assert modules["all"] == modules["double"] | single


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("hunyuan-480p", {"transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2",
                          "single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out"}),
        ("wan-480p", {f"blocks.{block}.ffn.net.{layer}" for block in (0, 1) for layer in ("0.proj", "2")}),
    ],
)  # fmt: skip
def test_all_layers_are_the_feed_forward_ones_of_the_picture_too(
    folders: dict[str, Path], name: str, added: set[str]
) -> None:
    modules = {}
    for layers in ("attention", "all"):
        _, published = trained_lora(tiny_recipe(name, folders[name], lora__layers=layers))
        modules[layers] = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in published}
    assert modules["all"] - modules["attention"] == added
    assert modules["attention"] < modules["all"]


def test_wan_adapts_both_attentions_of_every_block(folders: dict[str, Path]) -> None:
    _, published = trained_lora(tiny_recipe("wan-480p", folders["wan-480p"]))
    modules = {name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in published}
    assert modules == {
        f"blocks.{block}.attn{attention}.{name}"
        for block in (0, 1)
        for attention in (1, 2)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_a_lora_that_does_not_fit_is_named(folders: dict[str, Path]) -> None:
    recipe = tiny_recipe("hunyuan-480p", folders["hunyuan-480p"])
    _, state = trained_lora(recipe)
    backbone = load_backbone(recipe)
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    wrong_shape = {**state, key: torch.zeros(4, 7)}
    half = {name: tensor for name, tensor in state.items() if name != key}
    other_rank = {**state, key: torch.zeros(3, 24)}
    foreign = {**state, "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 24)}
    for broken in ({}, wrong_shape, half, other_rank, foreign):
        with pytest.raises(AdapterError, match=r"LoRA|does not fit"):
            backbone.load_adapter(broken)
    backbone.load_adapter(state)  # a refused adapter leaves the model usable
