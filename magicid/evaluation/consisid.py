"""ConsisID as a row of the table: ``python -m magicid.evaluation.consisid`` makes its clips for `magicid evaluate`.

ConsisID (Yuan et al., CVPR 2025, arXiv:2411.17440) needs no training: one photo steers a CogVideoX model. It runs
through diffusers' ConsisIDPipeline from a folder with its published weights; the face models beside them
(`face_encoder`) need the packages facexlib and consisid_eva_clip. Prompts and seeds are a run's own held-out ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from magicid import recipe as recipes
from magicid import storage
from magicid.clips import encode_mp4
from magicid.errors import BackboneError, MagicIDError, PhotoError
from magicid.evaluation.folder import INDEX
from magicid.identities import check_consent
from magicid.manifests import ManifestRow, read_manifest
from magicid.photos import decode_photo
from magicid.prompts import load_prompts
from magicid.recipe import Recipe
from magicid.repository import evaluation_clips

FPS = 8
PACKAGES = ("facexlib", "consisid_eva_clip")
Photo = NDArray[np.uint8]


@dataclass(frozen=True)
class Face:
    """What the pipeline takes of a person: the aligned face, `id_cond` (1, D), the `id_vit_hidden` of the vision model
    (each (1, T, E)), and five key points (5, 2) of the photo."""

    image: Image.Image
    id_cond: torch.Tensor
    id_vit_hidden: list[torch.Tensor]
    kps: Any = None


Faces = Callable[[Photo], Face]
"""A photo, uint8 RGB (H, W, 3), to its face. May raise PhotoError."""


def load_faces(folder: str | Path, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Faces:
    """The face models that ConsisID's weights come with.

    Raises:
        BackboneError: a package is not installed, or the files are not there.
    """
    try:
        from diffusers.pipelines.consisid import consisid_utils
    except ImportError as error:
        raise BackboneError(
            f"ConsisID's face models cannot be loaded: {error}", f"pip install {' '.join(PACKAGES)}"
        ) from error
    try:
        models = consisid_utils.prepare_face_models(str(folder), device, dtype)
    except Exception as error:
        raise BackboneError(
            f"cannot load ConsisID's face models from {folder}/face_encoder: {error}",
            "put the whole of ConsisID's published weights there",
        ) from error

    helper, recogniser, vision, detector, mean, deviation = models

    def face(photo: Photo) -> Face:
        try:
            id_cond, hidden, image, kps = consisid_utils.process_face_embeddings_infer(
                helper, vision, recogniser, mean, deviation, detector, device, dtype, photo, is_align_face=True
            )
        except RuntimeError as error:
            raise PhotoError(f"ConsisID finds no face: {error}", "give another photo first") from error
        return Face(image, id_cond, hidden, kps)

    return face


class ConsisID:
    """The pipeline with its face models. Make it with `from_pretrained`.

    Args:
        pipeline: diffusers' ConsisIDPipeline.
        faces: see `load_faces`.
        options: of the pipeline's call; empty: its defaults, 49 frames of 480 x 720, 50 steps, guidance 6.
    """

    def __init__(self, pipeline: Any, faces: Faces, **options: Any) -> None:
        self.pipeline, self.faces, self.options = pipeline, faces, options
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> ConsisID:
        """Load a folder of ConsisID's published weights; nothing is downloaded. Raises BackboneError."""
        faces = load_faces(folder, device, dtype)
        return cls(load_pipeline(folder, device, dtype), faces, **options)

    def clip(self, face: Face, prompt: str, seed: int) -> NDArray[np.uint8]:
        """Frames uint8 RGB (F, H, W, 3)."""
        frames = self.pipeline(
            image=face.image,
            prompt=prompt,
            id_cond=face.id_cond,
            id_vit_hidden=face.id_vit_hidden,
            kps_cond=face.kps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **self.options,
        ).frames[0]
        return np.round(np.asarray(frames) * 255).astype(np.uint8)


def load_pipeline(folder: str | Path, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """diffusers' ConsisIDPipeline from a folder. Raises BackboneError."""
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    try:
        return ConsisIDPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    except Exception as error:
        raise BackboneError(
            f"cannot load ConsisID from {folder}: {error}", "put its published weights there, in diffusers' layout"
        ) from error


def make_clips(
    model: ConsisID,
    people: Mapping[str, Photo],
    asked: Mapping[str, Sequence[tuple[str, int]]],
    out: str,
    say: Callable[[str], None] = print,
) -> int:
    """Make what is not there yet, in the layout that `magicid evaluate --clips` reads; returns how many were made.

    Args:
        people: a photo of each.
        asked: prompts and seeds of each; one seed comes once.
        out: folder on any fsspec URL. Its index is written at the end, so that it names whole clips only.
        say: told who is set aside, and why.
    """
    index, made = [], 0
    for name, photo in people.items():
        try:
            face = model.faces(photo)
        except MagicIDError as error:
            say(f"{name} is set aside: {error}")
            continue
        for prompt, seed in asked[name]:
            made_of = storage.sha256_json([storage.sha256_bytes(photo.tobytes()), prompt])[:8]
            file = f"{name}/{seed}-{made_of}.mp4"
            if not storage.exists(storage.join(out, file)):
                storage.write_bytes(storage.join(out, file), encode_mp4(model.clip(face, prompt, seed), FPS))
                made += 1
            index.append({"file": file, "identity": name, "prompt": prompt, "seed": seed})
        say(f"{name}: {len(asked[name])} clips")
    storage.write_bytes(storage.join(out, INDEX), "".join(json.dumps(line) + "\n" for line in index).encode())
    return made


def held_out(recipe: Recipe, rows: Sequence[ManifestRow]) -> dict[str, list[tuple[str, int]]]:
    """The prompts and seeds that a run of the recipe evaluates each person on."""
    prompts = [prompt for prompt in load_prompts(recipe.prompts) if prompt.split == "heldout"]
    return {
        row.id: [
            (clip.prompt, clip.seed)
            for clip in evaluation_clips(recipe, "", prompts, row.class_word, "consisid", None, None)
        ]
        for row in rows
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; any recipe key may follow as --section.key=value."""
    parser = argparse.ArgumentParser(prog="python -m magicid.evaluation.consisid", description=__doc__)
    parser.add_argument("--weights", required=True, help="folder of ConsisID's published weights")
    parser.add_argument("--identities", required=True, help="manifest; each person's first photo is used")
    parser.add_argument("--out", required=True, help="folder for the clips; the same one resumes")
    parser.add_argument("--recipe", default="hunyuan-480p", help="whose held-out prompts and seeds they are")
    parser.add_argument("--device", default="cuda", help="torch device")
    chosen, overrides = parser.parse_known_args(arguments)
    try:
        recipe = recipes.load(chosen.recipe, recipes.parse_overrides(overrides))
        rows, unusable = read_manifest(chosen.identities)
        for bad in unusable:
            print(f"{bad.name} is set aside: {bad.problem}; {bad.action}")
        model = ConsisID.from_pretrained(chosen.weights, chosen.device)
        photos = {}
        for row in rows:
            try:
                check_consent(row, recipe.identities)
                photos[row.id] = decode_photo(storage.read_bytes(row.photos[0]), row.photos[0], recipe.identities)
            except MagicIDError as error:
                print(f"{row.id} is set aside: {error}")
        made = make_clips(model, photos, held_out(recipe, rows), chosen.out)
    except MagicIDError as error:
        parser.exit(2, f"error {error}\n")
    print(f"{made} clips made; `magicid evaluate --clips {chosen.out} --identities ... --name ConsisID` measures them")


if __name__ == "__main__":
    main()
