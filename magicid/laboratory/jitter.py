"""Whether R_dy pays for shaking: ``python -m magicid.laboratory.jitter``.

Clips whose motion is known are rewarded with several windows (`rewards.motion_window`): the renderer's of the test
people, their photos held still, the same with each frame displaced by about a pixel, and photos that wander and turn
smoothly. A reward of motion should set the shaken photo far below the person who acts; and it should order clips of the
base model as the head moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, stats

from magicid import recipe as recipes
from magicid import weights
from magicid.backbones import load_backbone
from magicid.clips import inflate_photo, pan_photo
from magicid.evaluation.intervals import hierarchical
from magicid.evaluation.metrics import Metrics, Sample
from magicid.laboratory.people import SEED, heldout_actions, heldout_prompts, people
from magicid.markdown import table
from magicid.recipe import Recipe
from magicid.rewards.dynamics import MotionReward, mean_length
from magicid.world.renderer import render_clips, sample_people

WINDOWS = (1, 2, 3, 4)
SHAKEN = 1.0
"""Standard deviation of each frame's displacement along x and y, px."""


@dataclass(frozen=True)
class Row:
    """Clips of one kind: R_dy (W, N) under each window, and whose they are (N,)."""

    name: str
    rewards: NDArray[np.float64]
    owners: list[int]


def shaken(frames: NDArray[np.uint8], rng: np.random.Generator, deviation: float = SHAKEN) -> NDArray[np.uint8]:
    """Each frame of a clip (F, H, W, 3) displaced on its own by a normal number of px along x and y, edges repeated."""
    moves = rng.normal(0, deviation, (len(frames), 2))
    made = [ndimage.shift(f.astype(float), (*move, 0), order=1, mode="nearest") for f, move in zip(frames, moves)]
    return np.stack(made).round().clip(0, 255).astype(np.uint8)


def measure(recipe: Recipe, count: int = 8, prompts: int = 20, device: str = "cpu") -> list[Row]:
    """Rows of `count` test people: the renderer's clips of held-out prompts, and photos that move and do not."""
    sampling, reward = recipe.sampling, MotionReward.from_pretrained(weights.resolve(recipe.rewards.motion), device)
    actions, places, seeds = (column[:prompts] for column in heldout_actions(recipe, "test"))
    size = (sampling.frames, sampling.height, sampling.width)
    clips: dict[str, list[NDArray[np.uint8]]] = {}
    owners: dict[str, list[int]] = {}

    def add(name: str, made: Sequence[NDArray[np.uint8]], owner: int) -> None:
        clips.setdefault(name, []).extend(made)
        owners.setdefault(name, []).extend([owner] * len(made))

    for number, (person, look) in enumerate(zip(people("test", count), sample_people(count, SEED + 1))):
        rng = np.random.default_rng(number)
        still = [inflate_photo(photo, *size) for photo in person.photos]
        acting = render_clips(np.repeat(look[None], len(seeds), 0), actions, places, seeds).frames
        add("the renderer's clips", list(acting), number)
        add("photos that wander", [pan_photo(p, *size, i) for i, p in enumerate(person.photos)], number)
        add("photos that shake", [shaken(clip, rng) for clip in still], number)
        add("photos held still", still, number)
    return [Row(name, rewards(reward, np.stack(made)), owners[name]) for name, made in clips.items()]


def rewards(reward: MotionReward, clips: NDArray[np.uint8]) -> NDArray[np.float64]:
    """R_dy (W, N) of clips (N, F, H, W, 3) under each of WINDOWS."""
    flows = (torch.from_numpy(reward.flow(clip))[None] for clip in clips)
    return np.array([[float(mean_length(flow, window)) for window in WINDOWS] for flow in flows]).T


def agreement(recipe: Recipe, count: int = 60, device: str = "cpu") -> list[float]:
    """Spearman's correlation, under each window, of R_dy with the head's motion in `count` clips of the base model."""
    backbone = load_backbone(recipe, parts=("transformer", "vae", "text"), device=device)
    prompts = heldout_prompts(recipe, "test")
    asked, seeds = [prompts[i % len(prompts)] for i in range(count)], [recipe.evaluation.seed + i for i in range(count)]
    made = []
    with torch.no_grad():
        for start in range(0, count, 10):
            part = slice(start, start + 10)
            made.append(backbone.decode(backbone.sample_text(backbone.encode_prompts(asked[part]), seeds[part])))
    clips = np.concatenate(made)
    fps = recipe.sampling.fps
    measured = Metrics.from_recipe(recipe, device).measure_many([Sample(c, fps, p, None) for c, p in zip(clips, asked)])
    head = [row["head_motion"] for row in measured]
    known = [i for i, value in enumerate(head) if value is not None]
    reward = MotionReward.from_pretrained(weights.resolve(recipe.rewards.motion), device)
    return [
        float(stats.spearmanr(scores[known], [head[i] for i in known]).statistic) for scores in rewards(reward, clips)
    ]


def markdown(rows: Sequence[Row], correlations: Sequence[float]) -> str:
    """R_dy of each kind of clip over the first kind's, under each window, and the correlations; a Markdown table."""
    true = [float(np.mean(scores)) for scores in rows[0].rewards]
    lines = []
    for row in rows:
        cells = []
        for scores, reference in zip(row.rewards, true):
            found = hierarchical(scores / reference, row.owners)
            assert found is not None
            cells.append(f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]")
        lines.append([row.name, str(len(row.owners)), *cells])
    lines.append(["rank correlation with the head's motion", "", *(f"{value:.2f}" for value in correlations)])
    return table(["R_dy, of the renderer's", "clips", *(f"window {window}" for window in WINDOWS)], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m magicid.laboratory.jitter", description=__doc__)
    parser.add_argument("--recipe", default="face-world", help="whose motion reward it is")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="torch device")
    chosen = parser.parse_args(arguments)
    settings = recipes.load(chosen.recipe)
    print(markdown(measure(settings, chosen.people, device=chosen.device), agreement(settings, device=chosen.device)))


if __name__ == "__main__":
    main()
