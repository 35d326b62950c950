"""Model folders: `world:NAME` is a folder that ships with the package, anything else is a path on this machine."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import BinaryIO

from magicid.errors import BackboneError
from magicid.recipe import Recipe
from magicid.storage import sha256_json

NO_FOLDER = ("", "dis", "landmarks")  # what a recipe may name that is no model folder
_WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".json", ".txt", ".model")


def resolve(location: str) -> Path:
    """The folder behind a recipe's model location. Raises BackboneError when it is not there."""
    if location.startswith("world:"):
        folder = Path(str(resources.files("magicid.world"))) / "weights" / location.removeprefix("world:")
    else:
        folder = Path(location).expanduser()
    if not folder.is_dir():
        raise BackboneError(
            f"no model folder {location} ({folder})", "put the weights there, or point the recipe at another folder"
        )
    return folder


def model_folders(recipe: Recipe) -> list[str]:
    """The location of every model a recipe names."""
    rewards, evaluation = recipe.rewards, recipe.evaluation
    named = [recipe.backbone.path, rewards.identity, rewards.motion, rewards.semantics]
    if evaluation.clips:
        named += [evaluation.identity, evaluation.motion, evaluation.pose, evaluation.clip, evaluation.video]
        named += [evaluation.classifier]
    return [location for location in named if location not in NO_FOLDER]


def folder_sha256(folder: Path, subfolders: tuple[str, ...] = ("",)) -> str:
    """One hash over the weight and config files of a folder: names and contents, in order."""
    digests = {}
    for subfolder in subfolders:
        for file in sorted((folder / subfolder).rglob("*")):
            if file.suffix in _WEIGHT_SUFFIXES and file.is_file():
                with file.open("rb") as stream:
                    digests[str(file.relative_to(folder))] = _digest(stream)
    return sha256_json(digests)


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
