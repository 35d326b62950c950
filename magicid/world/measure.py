"""Is the face world good enough? ``python -m magicid.world.measure`` compares generated clips with the renderer's own.

Clips of the base video model by a recipe's settings, clips of as many people whom no network has seen doing the same,
and the latter once more through the video model's autoencoder, which shows what the autoencoder alone costs. Measured
by the recipe's metric networks, loaded as production loads them. Then the figures of the reward networks themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from magicid import recipe as recipes
from magicid.backbones import load_backbone
from magicid.evaluation.intervals import hierarchical, ratio
from magicid.evaluation.metrics import Metrics, Sample
from magicid.recipe import Recipe
from magicid.world import language
from magicid.world.build import WEIGHTS
from magicid.world.contact_sheet import contact_sheet
from magicid.world.renderer import render_clips, sample_people

SEED = 3_000_000  # of noise, people and renders; networks are trained on people of seeds below a million
BATCH = 16
SOURCES = ("generated", "renderer", "autoencoder")
Clips = dict[str, NDArray[np.uint8]]  # source -> (N, F, H, W, 3)
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """Prompts with the actions and places (N,) that they name."""

    prompts: list[str]
    actions: NDArray[np.int64]
    places: NDArray[np.int64]


@dataclass(frozen=True)
class Line:
    """A figure, its values as text, what is asked for, and whether it is so; None where nothing is asked for."""

    name: str
    values: tuple[str, ...]
    goal: str = ""
    reached: bool | None = None


def ask(count: int) -> Asked:
    """Prompts over all pairs of action and place in turn, the wording and the word for the person drawn."""
    rng = np.random.default_rng(SEED)
    numbers = np.arange(count)
    actions = numbers % len(language.ACTIONS)
    places = (numbers // len(language.ACTIONS) + numbers) % len(language.PLACES)
    words = rng.integers(0, [len(language.CLASS_WORDS), language.VARIANTS], (count, 2))
    prompts = [
        language.caption(int(a), int(p), class_word=language.CLASS_WORDS[word], variant=int(variant))
        for a, p, (word, variant) in zip(actions, places, words)
    ]
    return Asked(prompts, actions, places)


def make_clips(recipe: Recipe, asked: Asked, device: str, say: Say) -> Clips:
    """The clips of every source, prompt by prompt the same."""
    count, sampling = len(asked.prompts), recipe.sampling
    seeds = np.arange(SEED, SEED + count)
    true = render_clips(
        sample_people(count, SEED), asked.actions, asked.places, seeds, frames=sampling.frames, size=sampling.height
    ).frames
    backbone = load_backbone(recipe, device=device)
    generated, decoded = [], []
    for start in range(0, count, BATCH):
        part = slice(start, start + BATCH)
        generated.append(backbone.decode(backbone.sample(asked.prompts[part], seeds[part].tolist())))
        decoded.append(backbone.decode(backbone.encode_video(true[part])))
        say(f"{min(start + BATCH, count)} of {count} clips made")
    return dict(zip(SOURCES, (np.concatenate(generated), true, np.concatenate(decoded)), strict=True))


def measure_clips(
    metrics: Metrics, clips: NDArray[np.uint8], prompts: Sequence[str], fps: float
) -> list[dict[str, Any]]:
    """The metric columns of each clip, and two of the pixels: `change` and `second`, the mean absolute first and second
    difference of frames in grey levels. Smooth motion hardly has a second one; flicker has."""
    rows = []
    for start in range(0, len(clips), BATCH):
        part = slice(start, start + BATCH)
        samples = [Sample(frames, fps, prompt) for frames, prompt in zip(clips[part], prompts[part])]
        rows += metrics.measure_many(samples)
    for row, frames in zip(rows, clips):
        for name, order in (("change", 1), ("second", 2)):
            row[name] = float(np.abs(np.diff(frames.astype(np.float32), n=order, axis=0)).mean())
    return rows


def faces(metrics: Metrics, clips: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """Unit embeddings (f, D) of the frames of each clip in which the metric recogniser finds a face.

    Raises:
        ValueError: the recipe names no metric recogniser.
    """
    if metrics.faces is None:
        raise ValueError("the recipe names no metric recogniser: set evaluation.identity")
    found = [metrics.faces.embed(frames).astype(np.float64) for frames in clips]
    return [rows[~np.isnan(rows).any(1)] for rows in found]


def between_clips(embeddings: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Cosines between the people of every two clips; a person is the mean of its frames."""
    means = np.stack([rows.mean(0) for rows in embeddings if len(rows)])
    people = means / np.linalg.norm(means, axis=1, keepdims=True)
    return np.asarray((people @ people.T)[np.triu_indices(len(people), 1)], dtype=np.float64)


def within_clips(embeddings: Sequence[NDArray[np.float64]]) -> float:
    """Mean cosine between two frames of one clip: whether it stays the same person."""
    cosines = [(rows @ rows.T)[np.triu_indices(len(rows), 1)].mean() for rows in embeddings if len(rows) > 1]
    return float(np.mean(cosines))


def clip_lines(
    rows: dict[str, list[dict[str, Any]]], embeddings: dict[str, list[NDArray[np.float64]]]
) -> Iterator[Line]:
    """The comparison, figure by figure; see `measure_clips` and `faces`."""

    def values(name: str) -> list[NDArray[np.float64]]:
        return [np.array([row[name] for row in rows[s]], dtype=np.float64) for s in SOURCES]

    def compared(title: str, name: str, digits: int, within: float) -> Line:
        columns = values(name)
        texts, ratios = [], []
        for column in columns:
            both = np.column_stack([column, columns[1]])
            both = both[~np.isnan(both).any(1)]
            interval = hierarchical(both, [0] * len(both), statistic=ratio)  # clips of strangers: drawn one by one
            assert interval is not None, f"no clip has {name}"
            low, high = interval.low, interval.high
            ends = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
            texts.append(
                f"{np.nanmean(column):.{digits}f}" + ("" if column is columns[1] else f", × {interval.mean:.2f}{ends}")
            )
            ratios.append(interval.mean)
        return Line(title, tuple(texts), f"within {within:.0%}", abs(ratios[0] - 1) <= within)

    def shares(title: str, columns: Sequence[float], goal: str = "", least: float | None = None) -> Line:
        texts = tuple(f"{value:.3f}" for value in columns)
        return Line(title, texts, goal, None if least is None else columns[0] >= least)

    recognised = [float(np.nanmean(column)) for column in values("action")]
    yield shares("actions recognised", recognised, ">= 0.90", 0.90)
    lowest = [min(by_action(rows[s], "action")) for s in SOURCES]
    yield shares("the action recognised least", lowest, ">= 0.75", 0.75)
    yield shares("places recognised", [float(np.nanmean(column)) for column in values("place")], ">= 0.97", 0.97)
    yield compared("temporal consistency", "temporal_consistency", 3, 0.10)
    yield compared("temporal flickering (VBench's; 1: a frozen clip)", "temporal_flickering", 4, 0.10)
    yield compared("the same as change of pixels from frame to frame, grey levels", "change", 2, 0.10)
    yield compared("second difference of frames, grey levels", "second", 2, 0.10)
    yield compared("warp error: change that flow does not explain, grey levels", "warp_error", 2, 0.10)
    yield compared("motion by flow (dynamic magnitude)", "dynamic_magnitude", 2, 0.15)
    yield compared("motion of the head", "head_motion", 3, 0.15)
    yield shares("frames with a face", [float(np.nanmean(column)) for column in values("face_detect_rate")])
    yield shares("cosine between the faces of two frames of a clip", [within_clips(embeddings[s]) for s in SOURCES])
    between = [between_clips(embeddings[s]) for s in SOURCES]
    moments = [(values.mean(), values.std()) for values in between]
    close = abs(moments[0][0] - moments[1][0]) <= 0.05 and abs(moments[0][1] / moments[1][1] - 1) <= 0.15
    texts = tuple(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in moments)
    yield Line(
        "identity spread: cosine between the people of two clips", texts, "mean within 0.05, ± within 15%", close
    )


def by_action(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Means over the clips of each action, which come in turn."""
    count = len(language.ACTIONS)
    return [float(np.nanmean([np.nan if r[name] is None else r[name] for r in rows[a::count]])) for a in range(count)]


def action_lines(rows: dict[str, list[dict[str, Any]]]) -> Iterator[Line]:
    """For each action: recognised, and both motions over the renderer's."""
    recognised = [by_action(rows[s], "action") for s in SOURCES]
    for number, action in enumerate(language.ACTIONS):
        texts = [f"{values[number]:.2f}" for values in recognised[:2]]
        for name in ("dynamic_magnitude", "head_motion"):
            made, true = (by_action(rows[s], name)[number] for s in SOURCES[:2])
            texts.append(f"{made:.2f} / {true:.2f}")
        yield Line(action, tuple(texts))


def network_lines(count: int) -> Iterator[Line]:
    """The goals of the reward networks, on `count` people or clips that no network has seen."""
    from magicid.world import train_identity, train_motion, train_prompt

    for name in ("identity", "identity_metric"):
        found = train_identity.measure(WEIGHTS / name, people=count)["verification"]
        yield Line(f"{name}: verification of unseen people", (f"{found:.4f}",), ">= 0.99", found >= 0.99)
    flow = train_motion.measure(WEIGHTS / "motion", clips=count)
    yield Line("motion: end-point error, px", (f"{flow['epe']:.3f}",), "<= 0.5", flow["epe"] <= 0.5)
    for kind, title in (("", "motion: error over that of DIS"), ("_degraded", "the same on degraded clips")):
        part = flow[f"epe{kind}"] / flow[f"dis_epe{kind}"]
        value = f"{part:.2f} ({flow[f'epe{kind}']:.3f} / {flow[f'dis_epe{kind}']:.3f} px)"
        yield Line(title, (value,), "<= 0.5", part <= 0.5)
    rating = train_prompt.measure(WEIGHTS / "prompt", clips=count)
    for wrong in ("action", "place", "both"):
        area = rating[f"auc_{wrong}"]
        yield Line(f"prompt: AUC against wrong {wrong}", (f"{area:.4f}",), ">= 0.95", area >= 0.95)
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) / 1e6
    yield Line("all weights, MB", (f"{size:.1f}",), "<= 30", size <= 30)


def markdown(heads: Sequence[str], lines: Sequence[Line], *, goals: bool = True) -> str:
    """Lines as a Markdown table, ending with a new line."""
    more = ["goal", "reached"] if goals else []
    table = [[*heads, *more], ["---"] * (len(heads) + len(more))]
    for line in lines:
        verdict = {True: "yes", False: "**no**", None: ""}[line.reached]
        table.append([line.name, *line.values, *([line.goal, verdict] if goals else [])])
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n"


def measure(recipe: Recipe, count: int, *, device: str = "cpu", sheet: Path | None = None, say: Say = print) -> str:
    """Make and measure `count` clips of every source; returns two Markdown tables, and writes the contact sheet."""
    asked = ask(count)
    clips = make_clips(recipe, asked, device, say)
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(clips["generated"], clips["renderer"], asked.prompts).save(sheet, optimize=True)
    metrics = Metrics.from_recipe(recipe, device)
    rows, embeddings = {}, {}
    for source in SOURCES:
        rows[source] = measure_clips(metrics, clips[source], asked.prompts, recipe.sampling.fps)
        embeddings[source] = faces(metrics, clips[source])
        say(f"clips measured: {source}")
    s = recipe.sampling
    return "\n".join(
        [
            f"{count} clips, {s.steps} steps, guidance {s.guidance_scale:g}, shift {s.shift:g}:\n",
            markdown(["", "generated", "renderer", "renderer, through the autoencoder"],
                     [*clip_lines(rows, embeddings)]),
            markdown(["action", "recognised", "renderer's", "flow / renderer's", "head motion / renderer's"],
                     [*action_lines(rows)], goals=False),
        ]
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; any recipe key may follow as --section.key=value."""
    parser = argparse.ArgumentParser(prog="python -m magicid.world.measure", description=__doc__)
    parser.add_argument("--recipe", default="face-world", help="recipe of the face world")
    parser.add_argument("--clips", type=int, default=200, help="of each source; and people or clips of the networks")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--sheet", type=Path, help="PNG to write with generated and rendered clips side by side")
    parser.add_argument("--only", choices=("clips", "networks"), help="one of the two parts")
    chosen, overrides = parser.parse_known_args(arguments)
    if chosen.clips < len(language.ACTIONS):
        parser.error(f"--clips must be {len(language.ACTIONS)} or more: one of each action")
    recipe = recipes.load(chosen.recipe, recipes.parse_overrides(overrides))
    if chosen.only != "networks":
        print(measure(recipe, chosen.clips, device=chosen.device, sheet=chosen.sheet))
    if chosen.only != "clips":
        print(markdown(["network", "value"], [*network_lines(chosen.clips)]))


if __name__ == "__main__":
    main()
