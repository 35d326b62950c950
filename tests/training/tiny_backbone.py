"""A tiny random-weight HunyuanVideo transformer behind the backbone protocol, and pairs for it. No VAE, no encoders."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from magicid import recipe
from magicid.storage import sha256_json
from magicid.training.pairs import PairTensors, generator

SHAPE = (4, 2, 4, 4)  # C, F, H, W
TEXT_TOKENS = 5


def tiny_transformer(**changes: int) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    settings = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 4, 4),
    }
    return HunyuanVideoTransformer3DModel(**{**settings, **changes})


class TinyBackbone:
    """What training needs of a `VideoBackbone`."""

    base_sha256 = "0" * 64

    def __init__(self, transformer: HunyuanVideoTransformer3DModel | None = None) -> None:
        self.transformer = transformer or tiny_transformer()
        self.calls = 0

    def predict_velocity(self, latents_BCFHW: Tensor, sigma_B: Tensor, text: dict, guidance_scale: float) -> Tensor:
        self.calls += 1
        return self.transformer(
            hidden_states=latents_BCFHW,
            timestep=(sigma_B * 1000),
            encoder_hidden_states=text["prompt_embeds"],
            encoder_attention_mask=text["prompt_attention_mask"],
            pooled_projections=text["pooled_prompt_embeds"],
            guidance=torch.full((len(sigma_B),), guidance_scale * 1000, device=latents_BCFHW.device),
            return_dict=False,
        )[0]

    def lora_target_modules(self) -> list[str]:
        return ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

    def lora_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"transformer.{name}": tensor for name, tensor in state.items()}


def tiny_text(key: str, width: int = 16, pooled: int = 8) -> dict[str, Tensor]:
    random = generator(7, "text", key)
    return {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, width, generator=random),
        "prompt_attention_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.long),
        "pooled_prompt_embeds": torch.randn(1, pooled, generator=random),
    }


@dataclass
class MemoryPairs:
    """Random pairs held in memory: `static` of kind P_id, `dynamic` of kind P_dy."""

    static: int = 2
    dynamic: int = 3
    shape: tuple[int, ...] = SHAPE
    broken: set[str] = field(default_factory=set)  # pairs whose winner is NaN

    @property
    def kinds(self) -> dict[str, str]:
        return {f"id{i}": "P_id" for i in range(self.static)} | {f"dy{i}": "P_dy" for i in range(self.dynamic)}

    @property
    def sha256(self) -> str:
        return sha256_json(self.kinds)

    def __getitem__(self, pair_id: str) -> PairTensors:
        random = generator(3, pair_id)
        winner, loser = (torch.randn(self.shape, generator=random) for _ in range(2))
        if pair_id in self.broken:
            winner = winner * float("nan")
        return PairTensors(pair_id, self.kinds[pair_id], winner, loser, tiny_text(pair_id))


def hpo_settings(**changes: object) -> recipe.Hpo:
    values = {"steps": 4, "learning_rate": 1e-2, "batch_size": 3, "beta": 50.0, "noise_draws": 2, "validate_every": 0}
    return recipe.Hpo.model_validate({**values, **changes})


def trainer_settings(**changes: object) -> recipe.Trainer:
    values = {
        "zero_stage": 0,
        "precision": "float32",
        "gradient_checkpointing": False,
        "checkpoint_every": 2,
        "log_every": 1,
        "shift": 3.0,
    }
    return recipe.Trainer.model_validate({**values, **changes})


LORA = recipe.Lora(rank=4, alpha=4, blocks="all")
