"""How much memory training and sampling take, by estimate from sizes alone: nothing is loaded.

    tokens t     = latent frames x (height / 16) x (width / 16) + text tokens
    weights      = parameters x bytes of the dtype; under ZeRO-3 shared by the workers of a slot
    adapters     = 20 bytes per LoRA parameter: policy, its gradient, two Adam moments and the reference, in float32
    activations  = one block's 34 t h bytes, and 2 t h bytes more for each block's kept input while training; without
                   gradient checkpointing 34 t h for every block while training

h is the transformer's width; activations double in float32. 34 s b h bytes per layer in 16-bit, attention scores not
kept, is eq. 1 of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv 2205.05198.
One clip is differentiated at a time, so the batch b is 1. HunyuanVideo's authors publish 60 GB for sampling 129 frames
at 720x1280 and 45 GB at 544x960; this estimate gives 55 and 49. Take it as good to 20 %.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from magicid.recipe import Recipe

GIB = 2**30

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK_BYTES = 34  # per token and unit of width, 16-bit
_ADAPTER_BYTES = 20
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class VideoModelSize:
    """Sizes of a video model: parameters of its parts, width and number of blocks, adapted projections."""

    transformer: float
    vae: float
    text: float
    width: int
    blocks: int
    projections: int  # square attention projections that a LoRA on all blocks adapts
    temporal: int = 4  # frames per latent frame
    patch: int = 16  # pixels per token, along height and width


# The published models, for when the folder is not there yet.
PUBLISHED = {
    "hunyuan": VideoModelSize(12.8e9, 0.25e9, 8.2e9, 3072, 60, 20 * 8 + 40 * 3),
    "wan": VideoModelSize(14.3e9, 0.13e9, 5.7e9, 5120, 40, 40 * 8),
}


@dataclass(frozen=True)
class MemoryNeed:
    """GiB of one process."""

    weights: float
    adapters: float
    activations: float

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.adapters + self.activations


def video_model_size(kind: str, folder: Path | None) -> VideoModelSize:
    """Sizes from a pipeline folder's configurations and safetensors headers; without a folder the published ones."""
    if folder is None:
        return PUBLISHED[kind]
    config = json.loads((folder / "transformer" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    layers, single = int(config.get("num_layers", 0)), int(config.get("num_single_layers", 0))
    patch = config.get("patch_size", 2)
    spatial = vae.get("spatial_compression_ratio", vae.get("scale_factor_spatial", 8))
    return VideoModelSize(
        transformer=parameter_count(folder / "transformer"),
        vae=parameter_count(folder / "vae"),
        text=sum(parameter_count(folder / name) for name in ("text_encoder", "text_encoder_2")),
        width=int(config["num_attention_heads"]) * int(config["attention_head_dim"]),
        blocks=layers + single,
        projections=8 * layers + 3 * single,  # both models have eight in a full block, Hunyuan three in a single one
        temporal=int(vae.get("temporal_compression_ratio", vae.get("scale_factor_temporal", 4))),
        patch=int(spatial) * int(patch if isinstance(patch, int) else patch[-1]),
    )


def parameter_count(folder: Path) -> int:
    """Numbers in the safetensors files of a folder, from their headers; 0 when there are none."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                total += (end - start) // _ITEM_BYTES.get(entry["dtype"], 4)
    return total


def tokens(recipe: Recipe, size: VideoModelSize) -> int:
    """Tokens of one clip and its prompt."""
    sampling = recipe.sampling
    frames = (sampling.frames - 1) // size.temporal + 1
    text = recipe.backbone.max_sequence_length
    return frames * (sampling.height // size.patch) * (sampling.width // size.patch) + text


def training_memory(recipe: Recipe, size: VideoModelSize) -> MemoryNeed:
    """One training worker: the transformer, both adapters, one clip's activations."""
    trainer, item = recipe.trainer, _BYTES[recipe.backbone.dtype]
    shards = recipe.resources.workers_per_slot if trainer.zero_stage == 3 else 1
    adapted = size.projections * 2 * size.width * recipe.lora.rank
    block = tokens(recipe, size) * size.width * item / 2
    if trainer.gradient_checkpointing:
        activations = block * (2 * size.blocks + _BLOCK_BYTES)
    else:
        activations = block * _BLOCK_BYTES * size.blocks
    return MemoryNeed(size.transformer * item / shards / GIB, adapted * _ADAPTER_BYTES / GIB, activations / GIB)


def sampling_memory(recipe: Recipe, size: VideoModelSize) -> MemoryNeed:
    """One generator: all parts of the pipeline, one block's activations."""
    item = _BYTES[recipe.backbone.dtype]
    weights = (size.transformer + size.vae + size.text) * item
    activations = tokens(recipe, size) * size.width * _BLOCK_BYTES * item / 2
    return MemoryNeed(weights / GIB, 0.0, activations / GIB)
