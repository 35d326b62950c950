"""Published adapters of the face world's real base model, with random weights: cheap, and no two alike."""

from __future__ import annotations

import functools

import numpy as np
import torch

from magicid import adapters, backbones, recipe
from magicid.adapters import AdapterManifest, AdapterRef
from magicid.backbones import load_backbone
from magicid.backbones.pipeline import PipelineBackbone
from magicid.clips import decode_mp4, encode_mp4

RECIPE = "face-world"
ALPHA = recipe.load(RECIPE).lora.alpha  # `load_adapter` takes the recipe's


@functools.cache
def backbone() -> PipelineBackbone:
    """The base model in this process, to say what an endpoint should have answered."""
    loaded = load_backbone(recipe.load(RECIPE), parts=("transformer", "vae", "text"), device="cpu")
    assert isinstance(loaded, PipelineBackbone)
    return loaded


@functools.cache
def base_sha256() -> str:
    """Hash of the base model."""
    return backbones.base_sha256(recipe.load(RECIPE))


def random_lora(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """LoRA tensors on the first blocks, strong enough that every person's clips are their own."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in backbone().transformer.named_modules():
        if name.startswith("transformer_blocks.") and name.endswith(("attn.to_q", "attn.to_v")):
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            b = 0.2 * torch.randn(module.out_features, rank, generator=generator) / rank**0.5
            state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return state


def publish(run: str, identity_id: str, seed: int, owner: str, rank: int = 4) -> AdapterRef:
    """Publish a random adapter; another seed is another version."""
    manifest = AdapterManifest(
        base_sha256(), "0" * 64, rank=rank, alpha=ALPHA, owner=owner, consent=f"form of {identity_id}"
    )
    return adapters.publish(run, identity_id, adapters.to_bytes(random_lora(seed, rank), rank, ALPHA), manifest)


def expected(ref: AdapterRef | None, prompt: str, seed: int, steps: int) -> np.ndarray:
    """The frames uint8 (F, H, W, 3) that plain diffusers makes: this adapter alone, this prompt, this seed."""
    model = backbone()
    model.recipe = recipe.load(RECIPE, {"sampling.steps": steps})
    model.load_adapter(None if ref is None else adapters.load(ref.weights))
    frames, _ = decode_mp4(encode_mp4(model.decode(model.sample([prompt], [seed]))[0], model.recipe.sampling.fps))
    return frames
