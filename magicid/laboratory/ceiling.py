"""What the video model's autoencoder allows: ``python -m magicid.laboratory.ceiling``.

An adapter changes the transformer; its clips still pass through the decoder. So no adapter's face_sim can be expected
above that of true clips of the person, encoded and decoded: here the renderer's clips of the test people doing the
held-out prompts, and their photos held still, before and after.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicid import recipe as recipes
from magicid.backbones import load_backbone
from magicid.clips import inflate_photo
from magicid.evaluation.intervals import hierarchical
from magicid.evaluation.metrics import Metrics
from magicid.laboratory.people import SEED, heldout_actions, people
from magicid.markdown import table
from magicid.recipe import Recipe
from magicid.rewards.identity import IdentityReward
from magicid.world.renderer import render_clips, sample_people

THRESHOLD = 0.545
"""Cosine of the metric recogniser that separates same from different people; measured in the world's README."""


@dataclass(frozen=True)
class Row:
    """Similarities (N, F) of clips' frames with their person's photos, NaN without a face, and whose clips (N,)."""

    name: str
    similarities: NDArray[np.float64]
    owners: list[int]

    @property
    def clips(self) -> NDArray[np.float64]:
        """face_sim (N,) of each clip."""
        return np.asarray(np.nanmean(self.similarities, axis=1), dtype=np.float64)

    @property
    def by_frame(self) -> NDArray[np.float64]:
        """Mean similarity (F,) by the frame's number."""
        return np.asarray(np.nanmean(self.similarities, axis=0), dtype=np.float64)


def similarities(
    faces: IdentityReward, clips: NDArray[np.uint8], owners: Sequence[int], references: Sequence[NDArray[np.float32]]
) -> NDArray[np.float64]:
    """(N, F): of each frame of clips (N, F, H, W, 3) the mean cosine with its owner's references; NaN: no face."""
    return np.stack(
        [(faces.embed(frames) @ references[owner].T).mean(1) for frames, owner in zip(clips, owners)]
    ).astype(np.float64)


def measure(recipe: Recipe, count: int = 8, device: str = "cpu") -> list[Row]:
    """The rows: clips and inflated photos of `count` test people, before and after the autoencoder.

    Raises:
        ValueError: the recipe names no metric recogniser.
    """
    faces = Metrics.from_recipe(recipe, device).faces
    if faces is None:
        raise ValueError("the recipe names no metric recogniser: set evaluation.identity")
    sampling, backbone = recipe.sampling, load_backbone(recipe, parts=("vae",), device=device)
    actions, places, seeds = heldout_actions(recipe, "test")
    moving, still, owners, whose = [], [], [], []
    references = []
    for number, (person, look) in enumerate(zip(people("test", count), sample_people(count, SEED + 1))):
        found = faces.embed(person.photos)
        references.append(found[~np.isnan(found).any(1)])
        moving.append(render_clips(np.repeat(look[None], len(seeds), 0), actions, places, seeds).frames)
        still.append(
            np.stack([inflate_photo(p, sampling.frames, sampling.height, sampling.width) for p in person.photos])
        )
        owners += [number] * len(seeds)
        whose += [number] * len(person.photos)
    rows = []
    for name, clips, of in (("clips", np.concatenate(moving), owners), ("photos", np.concatenate(still), whose)):
        decoded = np.concatenate(
            [backbone.decode(backbone.encode_video(clips[i : i + 16])) for i in range(0, len(clips), 16)]
        )
        rows.append(Row(name, similarities(faces, clips, of, references), of))
        rows.append(Row(f"{name}, decoded", similarities(faces, decoded, of, references), of))
    return rows


def markdown(rows: Sequence[Row], threshold: float = THRESHOLD) -> str:
    """The rows as a Markdown table, ending with a new line."""
    heads = ["", "clips", "face_sim", f"share above {threshold:g}", "first frame", "others", "lowest and highest frame"]
    lines = []
    for row in rows:
        cells = []
        for values, digits in ((row.clips, 3), ((row.clips > threshold).astype(float), 2)):
            interval = hierarchical(values, row.owners)
            assert interval is not None
            cells.append(f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]")
        frames = row.by_frame
        ends = f"{frames.min():.3f} ({frames.argmin()}), {frames.max():.3f} ({frames.argmax()})"
        lines.append([row.name, str(len(row.owners)), *cells, f"{frames[0]:.3f}", f"{frames[1:].mean():.3f}", ends])
    return table(heads, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m magicid.laboratory.ceiling", description=__doc__)
    parser.add_argument("--recipe", default="face-world", help="whose autoencoder and metric recogniser it is")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="torch device")
    chosen = parser.parse_args(arguments)
    rows = measure(recipes.load(chosen.recipe), chosen.people, chosen.device)
    print(markdown(rows))
    for row in rows:
        print(f"{row.name}, by frame: {' '.join(f'{value:.3f}' for value in row.by_frame)}")


if __name__ == "__main__":
    main()
