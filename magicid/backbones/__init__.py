"""Video models behind one protocol (base.py): `load_backbone` gives the recipe's, with only the parts asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from magicid.errors import BackboneError
from magicid.recipe import Recipe
from magicid.weights import folder_sha256, resolve

if TYPE_CHECKING:
    import torch

    from magicid.backbones.pipeline import PipelineBackbone

PARTS = ("transformer", "vae", "text")


def load_backbone(
    recipe: Recipe,
    *,
    parts: tuple[str, ...] = PARTS,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> PipelineBackbone:
    """Load the parts of the recipe's video model from its diffusers pipeline folder; nothing is downloaded.

    Args:
        parts: of `transformer`, `vae` and `text` (both text encoders and their tokenizers). Training needs the
            transformer only, since latents and text embeddings are kept on storage.
        dtype: of the weights; None is the recipe's `backbone.dtype`.

    Raises:
        BackboneError: the folder is missing, holds another pipeline class or unreadable weights, or its compression
            ratios do not fit the recipe's frames, height and width.
    """
    folder = resolve(recipe.backbone.path)
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        raise ValueError(f"parts must be some of {PARTS}, not {parts}")
    if recipe.backbone.kind == "hunyuan":
        from magicid.backbones.hunyuan import HunyuanBackbone as Backbone
    else:
        from magicid.backbones.wan import WanBackbone as Backbone  # type: ignore[assignment]
    check_folder(folder, Backbone.pipeline_class.__name__)
    return Backbone(recipe, folder, parts=parts, device=device, dtype=dtype)


def base_sha256(recipe: Recipe) -> str:
    """Hash of the base model's transformer and VAE files; computed once per process. Raises BackboneError."""
    return _folder_sha256(resolve(recipe.backbone.path))


@lru_cache(maxsize=8)
def _folder_sha256(folder: Path) -> str:
    return folder_sha256(folder, ("transformer", "vae"))


def check_folder(folder: Path, pipeline_class: str) -> None:
    """Raise BackboneError unless the folder is a pipeline of that class, with one transformer."""
    index_file = folder / "model_index.json"
    try:
        index = json.loads(index_file.read_text())
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{folder} is not a diffusers pipeline folder: cannot read model_index.json ({error})",
            "download the model in its diffusers layout, or correct backbone.path",
        ) from error
    if index.get("_class_name") != pipeline_class:
        raise BackboneError(
            f"{folder} holds a {index.get('_class_name')}, not a {pipeline_class}",
            "correct backbone.path or backbone.kind",
        )
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise BackboneError(
            f"{folder} is a Wan 2.2 pipeline (two transformers or timesteps per token)",
            "use a Wan 2.1 text-to-video folder",
        )
