"""HunyuanVideo (arXiv 2412.03603) through diffusers' HunyuanVideoPipeline.

Guidance is distilled into the transformer: `guidance_scale` is embedded (1000 times its value), one forward per step.
True classifier-free guidance (`true_cfg_scale` > 1) comes on top and is off as the model is meant to be used.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor

from magicid.backbones.base import TextEmbeddings
from magicid.backbones.pipeline import PipelineBackbone

_FEED_FORWARD = "(ff\\.net\\.0\\.proj|ff\\.net\\.2|proj_mlp|proj_out)"
_PROJECTIONS = "(to_q|to_k|to_v|to_out\\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"


class HunyuanBackbone(PipelineBackbone):
    """HunyuanVideo: dual-stream and single-stream blocks, a Llama-type and a CLIP text encoder."""

    pipeline_class = HunyuanVideoPipeline
    transformer_class = HunyuanVideoTransformer3DModel
    vae_class = AutoencoderKLHunyuanVideo
    text_components = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def _load(self) -> Any:
        pipeline = super()._load()
        if pipeline.vae is not None:
            pipeline.vae.enable_tiling()  # takes effect above one tile (256 px): whole 720p frames do not fit a card
        return pipeline

    def compression(self) -> tuple[int, int]:
        """The VAE's compression: frames per latent frame, pixels per latent pixel."""
        config = self._config("vae")
        return config["temporal_compression_ratio"], config["spatial_compression_ratio"]

    def _encode_prompt(self, prompt: str) -> TextEmbeddings:
        settings = self.recipe.backbone
        template = {}
        if settings.prompt_template is not None:
            template = {"prompt_template": {"template": settings.prompt_template, "crop_start": 0}}
        tokens, pooled, mask = self.pipeline.encode_prompt(
            prompt=prompt, device=self.device, max_sequence_length=settings.max_sequence_length, **template
        )
        return {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "pooled_projections": pooled}

    def _to_transformer_scale(self, latents_BCFHW: Tensor) -> Tensor:
        return latents_BCFHW * self._config("vae")["scaling_factor"]

    def _to_vae_scale(self, latents_BCFHW: Tensor) -> Tensor:
        return latents_BCFHW / self._config("vae")["scaling_factor"]

    def _velocity_inputs(
        self, text: TextEmbeddings, guidance_scale: float | Tensor, latents: Tensor
    ) -> dict[str, Tensor]:
        inputs = super()._velocity_inputs(text, guidance_scale, latents)
        if self._config("transformer")["guidance_embeds"]:
            guidance = torch.as_tensor(guidance_scale, device=latents.device, dtype=self.transformer.dtype)
            inputs["guidance"] = 1000 * guidance.expand(len(latents))
        return inputs

    def call_arguments(self, text: TextEmbeddings) -> dict[str, Any]:
        names = {
            "encoder_hidden_states": "prompt_embeds",
            "encoder_attention_mask": "prompt_attention_mask",
            "pooled_projections": "pooled_prompt_embeds",
        }
        names |= {f"negative_{ours}": f"negative_{theirs}" for ours, theirs in names.items()}
        return {
            **{names[name]: tensor for name, tensor in text.items()},
            "guidance_scale": self.recipe.sampling.guidance_scale,
            "true_cfg_scale": self.recipe.sampling.true_cfg_scale,
        }

    def lora_target_modules(self) -> str:
        """Attention projections of all blocks, or with `lora.blocks = "double"` of the dual-stream blocks only (which
        is reported to keep motion better); with `lora.layers = "all"` also what the feed-forward layers do to the
        picture. The text refiner, and the feed-forward layers of the text, are never adapted."""
        single = "" if self.recipe.lora.blocks == "double" else "(single_)?"
        layers = (
            f"(attn\\.{_PROJECTIONS}|{_FEED_FORWARD})" if self.recipe.lora.layers == "all" else f"attn\\.{_PROJECTIONS}"
        )
        return f"{single}transformer_blocks\\.\\d+\\.{layers}"
