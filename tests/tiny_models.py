"""Tiny random-weight pipeline folders of the production classes, made in seconds, and recipes for them.

Sizes: clips of 5 frames at 16x16 or more; the VAEs compress 4 times in time and 8 times in space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from magicid import recipe
from magicid.world.text_encoders import clip_tokenizer, llama_tokenizer

WORDS = [
    "a",
    "person",
    "man",
    "woman",
    "nods",
    "jumps",
    "walks",
    "talks",
    "in",
    "on",
    "the",
    "kitchen",
    "beach",
    "snow",
]


def tiny_hunyuan_folder(path: Path, seed: int = 0) -> Path:
    """A HunyuanVideoPipeline folder: one double and one single block, Llama- and CLIP-type encoders."""
    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
        guidance_embeds=True,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
    llama_tokens, clip_tokens = llama_tokenizer(WORDS), clip_tokenizer(WORDS)
    llama = LlamaModel(
        LlamaConfig(vocab_size=len(llama_tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                    num_attention_heads=2, max_position_embeddings=512, bos_token_id=llama_tokens.bos_token_id,
                    eos_token_id=llama_tokens.eos_token_id, pad_token_id=llama_tokens.pad_token_id)
    )  # fmt: skip
    clip = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(clip_tokens), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                       num_attention_heads=2, projection_dim=8, bos_token_id=clip_tokens.bos_token_id,
                       eos_token_id=clip_tokens.eos_token_id, pad_token_id=clip_tokens.pad_token_id)
    )  # fmt: skip
    HunyuanVideoPipeline(
        text_encoder=llama.eval(), tokenizer=llama_tokens, transformer=transformer, vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=clip.eval(), tokenizer_2=clip_tokens,
    ).save_pretrained(path)  # fmt: skip
    return path


def tiny_wan_folder(path: Path, seed: int = 0) -> Path:
    """A WanPipeline folder: two blocks, an UMT5 encoder, the UniPC scheduler that real Wan folders have."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0],
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS] + [(chr(c), -5.0) for c in range(ord("a"), ord("z") + 1)]
    tokens = T5Tokenizer(vocab=pieces, extra_ids=0)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokens), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
                   relative_attention_num_buckets=8)
    )  # fmt: skip
    WanPipeline(
        tokenizer=tokens, text_encoder=encoder.eval(), vae=vae, transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(path)  # fmt: skip
    return path


def tiny_recipe(name: str, folder: Path, **changes: Any) -> recipe.Recipe:
    """A shipped production recipe (`hunyuan-480p`, `hunyuan-paper`, `wan-480p`) on a tiny folder.

    Only sizes change: folder, dtype, clip size, steps. `changes` are dotted keys with `__` for the dot.
    """
    tiny = {
        "backbone.path": str(folder),
        "backbone.dtype": "float32",
        "backbone.max_sequence_length": 16,
        "sampling.frames": 5,
        "rewards.semantics_frames": 5,
        "sampling.height": 32,
        "sampling.width": 48,
        "sampling.steps": 3,
        "lora.rank": 4,
        "lora.alpha": 8,
    }
    if "wan" not in name:
        tiny["backbone.prompt_template"] = "{}"
    return recipe.load(name, {**tiny, **{key.replace("__", "."): value for key, value in changes.items()}})
