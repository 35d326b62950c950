"""What a text-to-video model must offer: the one protocol behind which HunyuanVideo and Wan stand.

Both are flow-matching models: with clean latents x0, noise n and sigma s in 0..1,

    x_s = (1 - s) x0 + s n,        target velocity v = n - x0.

Axes: B batch, C latent channels, F latent frames, H and W latent height and width. Latents are always in the
transformer's own scale (after the VAE's scaling), the scale the sampler works in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

TextEmbeddings = dict[str, Tensor]  # named tensors, batch first; exactly what `predict_velocity` needs for its prompts


class VideoBackbone(Protocol):
    """A text-to-video model whose transformer takes LoRA adapters."""

    @property
    def transformer(self) -> nn.Module:
        """The denoising transformer."""

    base_sha256: str  # hash of the folder's weight files: an adapter fits only the base it was trained on

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Text embeddings of B prompts, on the CPU. Needs the text encoders."""

    def encode_video(self, frames_BFHWC: np.ndarray) -> Tensor:
        """uint8 RGB clips (B, F, H, W, 3) -> float32 latents (B, C, F', H', W'). Needs the VAE."""

    def decode(self, latents_BCFHW: Tensor) -> np.ndarray:
        """Latents -> uint8 RGB clips (B, F, H, W, 3). Needs the VAE."""

    def predict_velocity(
        self, latents_BCFHW: Tensor, sigma_B: Tensor, text: TextEmbeddings, guidance_scale: float | Tensor
    ) -> Tensor:
        """The transformer's velocity at noise level sigma (0..1), (B, C, F, H, W), with the adapters now active.

        Differentiable. `guidance_scale` is the embedded guidance, one for all rows or a tensor (B,); models without
        one ignore it.
        """

    def sample(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Sampled latents float32 (B, C, F, H, W), by the recipe's sampling settings; one generator per seed, so a
        clip does not depend on the others of its batch. Needs the text encoders."""

    def sample_text(self, text: TextEmbeddings, seeds: Sequence[int]) -> Tensor:
        """`sample` from text embeddings: what a trainer without text encoders calls. Uses the adapter now active."""

    def lora_target_modules(self) -> list[str] | str:
        """PEFT target modules of the recipe's `lora.blocks`."""

    def lora_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's LoRA tensors -> the names that the pipeline class's plain `load_lora_weights` reads."""

    def load_adapter(self, lora_state: dict[str, Tensor] | None, name: str = "default") -> None:
        """Load LoRA tensors (the published form) for sampling and make them the only active adapter; None is the
        untouched base."""


def stack_text(items: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """Concatenate text embeddings along the batch."""
    return {name: torch.cat([item[name] for item in items]) for name in items[0]}


def add_noise(latents_BCFHW: Tensor, noise_BCFHW: Tensor, sigma_B: Tensor) -> Tensor:
    """x_s = (1 - s) x0 + s n."""
    sigma = sigma_B.view(-1, 1, 1, 1, 1).to(latents_BCFHW)
    return (1 - sigma) * latents_BCFHW + sigma * noise_BCFHW


def velocity_target(latents_BCFHW: Tensor, noise_BCFHW: Tensor) -> Tensor:
    """v = n - x0."""
    return noise_BCFHW - latents_BCFHW


def shifted_sigma(uniform: Tensor, shift: float) -> Tensor:
    """Training noise levels: logit-normal(0, 1) of uniform draws in (0, 1), shifted as the sampler shifts its own.

    sigma = shift * u' / (1 + (shift - 1) * u'), u' = sigmoid(normal_icdf(u)). Source: Stable Diffusion 3 report,
    sections 3.1 and 5.3.2; the shift is the one of FlowMatchEulerDiscreteScheduler.
    """
    logit_normal = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)))
    return shift * logit_normal / (1 + (shift - 1) * logit_normal)
