"""Wan 2.1 text-to-video (arXiv 2503.20314) through diffusers' WanPipeline.

Wan has no embedded guidance: `guidance_scale` is classifier-free guidance (two forwards per step when above 1), and
`predict_velocity` ignores it. It is sampled with flow-match Euler like HunyuanVideo, not with the folder's UniPC
scheduler, so both backbones share the noise levels that training draws.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor

from magicid.backbones.base import TextEmbeddings
from magicid.backbones.pipeline import PipelineBackbone


class WanBackbone(PipelineBackbone):
    """Wan: one kind of block with self- and cross-attention, an UMT5 text encoder."""

    pipeline_class = WanPipeline
    transformer_class = WanTransformer3DModel
    vae_class = AutoencoderKLWan
    text_components = ("text_encoder", "tokenizer")
    vae_dtype = torch.float32  # as its authors run it; in half precision it bands

    def compression(self) -> tuple[int, int]:
        """The VAE's compression: frames per latent frame, pixels per latent pixel."""
        config = self._config("vae")
        return config["scale_factor_temporal"], config["scale_factor_spatial"]

    def _encode_prompt(self, prompt: str) -> TextEmbeddings:
        template = self.recipe.backbone.prompt_template
        tokens, _ = self.pipeline.encode_prompt(
            prompt=template.format(prompt) if template else prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.recipe.backbone.max_sequence_length,
            device=self.device,
        )
        return {"encoder_hidden_states": tokens}

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self._config("vae")
        mean, std = (torch.tensor(config[key], device=latents.device) for key in ("latents_mean", "latents_std"))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    def _to_transformer_scale(self, latents_BCFHW: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents_BCFHW)
        return (latents_BCFHW - mean) / std

    def _to_vae_scale(self, latents_BCFHW: Tensor) -> Tensor:
        mean, std = self._latent_statistics(latents_BCFHW)
        return latents_BCFHW * std + mean

    def _true_cfg(self) -> bool:
        return self.recipe.sampling.guidance_scale > 1

    def call_arguments(self, text: TextEmbeddings) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            name.replace("encoder_hidden_states", "prompt_embeds"): tensor for name, tensor in text.items()
        }
        return {**arguments, "guidance_scale": self.recipe.sampling.guidance_scale}

    def lora_target_modules(self) -> str:
        """Self- and cross-attention projections of all blocks, with `lora.layers = "all"` the feed-forward layers too;
        Wan has no single-stream blocks to leave out."""
        attention = "attn[12]\\.(to_q|to_k|to_v|to_out\\.0)"
        layers = f"({attention}|ffn\\.net\\.(0\\.proj|2))" if self.recipe.lora.layers == "all" else attention
        return f"blocks\\.\\d+\\.{layers}"
