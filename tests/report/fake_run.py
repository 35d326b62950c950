"""Fills a run directory with plausible rows and small clips, as a finished job leaves it.

python -m tests.report.fake_run FOLDER      also writes FOLDER/report.html, to look at
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image

from magicid import recipe, storage
from magicid.clips import encode_mp4
from magicid.run import Run, clip_uri, identity_uri, training_uri
from magicid.schema import (
    BASE_CLIP,
    STATIC_CLIP,
    TRAINED_CLIP,
    Identity,
    MetricRow,
    Pair,
    Rejected,
    ScoredClip,
)
from magicid.selection import select_pairs, with_identity_reward

PHOTOS = Path(__file__).parents[2] / "examples" / "identities"
SIDE, FRAMES, FPS = 48, 13, 8
PROMPTS = [
    "a person walks across in a park",
    "a person nods in the kitchen",
    "a person jumps on the beach",
    "a person shakes the head in the snow",
    "a person talks in front of a brick wall",
    "a person leans in under the night sky",
    "a person turns in the garden",
]
LEVELS = {"base": (0.08, 9.0, 0.71), "sft": (0.55, 3.6, 0.52), "hpo": (0.60, 6.4, 0.66)}  # face_sim, motion, prompt
MOVES = {"base": 7.0, "sft": 1.0, "hpo": 4.0}


def fill(location: str, names: tuple[str, ...] = ("ada", "bruno"), *, takes: int = 7, pairs: bool = True) -> Run:
    """A finished run of the given people; returns it without report.html."""
    run, rng = Run(location), np.random.default_rng(3)
    run.open(recipe.load("face-world"), "b" * 64)
    people = [_identity(run, name, rng) for name in names]
    for person in people:
        run.write(identity_uri(person.identity_id), [person], Identity)
    shared = [_scored(run, BASE_CLIP, None, k, rng, people[0]) for k in range(12)]
    for person in people:
        own = [_scored(run, TRAINED_CLIP, person, k, rng, person) for k in range(24)]
        own += [_scored(run, STATIC_CLIP, person, k, rng, person) for k in range(len(person.photos))]
        run.append(f"scored/{person.identity_id}", own, ScoredClip)
        if pairs:
            selected = select_pairs(
                person.identity_id,
                with_identity_reward(own + shared, person.references),
                recipe.load("face-world", {"selection.motion_tolerance": 4}).selection,
            )
            run.write(f"pairs/{person.identity_id}.parquet", selected.pairs, Pair)
            run.write(f"pairs/{person.identity_id}.rejected.parquet", selected.dropped, Rejected)
        for method in ("base", "sft", "hpo"):
            rows = [_measured(run, person, method, k, rng) for k in range(takes)]
            run.append(f"evaluation/{person.identity_id}", rows, MetricRow)
        _log(run, person.identity_id, "sft", [_sft_row(k, rng) for k in range(5, 85, 5)])
        _log(run, person.identity_id, "hpo", [_hpo_row(k, rng) for k in range(5, 125, 5)])
        for step in (60, 120):
            uri = training_uri(person.identity_id, "hpo", f"validation/step-{step:06d}.mp4")
            storage.write_bytes(run.path(uri), encode_mp4(_moving(person.identity_id, step / 20), FPS))
        _manifest(run, person)
    run.append("scored/_shared", shared, ScoredClip)
    run.write("rejected.parquet", [Rejected("identity", "eve", "photo-2.png is empty", "give another photo")], Rejected)
    return run


def _photo(name: str) -> NDArray[np.uint8]:
    path = next(iter(sorted((PHOTOS / name).glob("*.png"))), None) if (PHOTOS / name).is_dir() else None
    if path is None:
        return np.full((64, 64, 3), 128, np.uint8)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _moving(name: str, amount: float) -> NDArray[np.uint8]:
    """The photo, swaying by `amount` px."""
    image = np.asarray(Image.fromarray(_photo(name)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    shifts = [round(amount * math.sin(2 * math.pi * k / FRAMES)) for k in range(FRAMES)]
    return np.stack([np.roll(image, shift, axis=1) for shift in shifts])


def _identity(run: Run, name: str, rng: np.random.Generator) -> Identity:
    photos = []
    for number in range(4):
        buffer = io.BytesIO()
        Image.fromarray(_photo(name)).rotate(3 * number).save(buffer, "PNG")
        photos.append(f"identities/{name}/photo-{number}.png")
        storage.write_bytes(run.path(photos[-1]), buffer.getvalue())
    reference = _unit(rng.normal(size=16))
    return Identity(
        identity_id=name, owner="studio", photos=photos, consent="form-17", references=[reference.tolist()] * 2,
        warnings=["photo-5.png was left out: it shows two faces"],
    )  # fmt: skip


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / np.linalg.norm(vector)


def _scored(
    run: Run, kind: str, person: Identity | None, k: int, rng: np.random.Generator, model: Identity
) -> ScoredClip:
    who = person.identity_id if person else "base"
    clip_id = storage.sha256_json([kind, who, k])[:32]
    reference = np.array(model.references[0])
    likeness = {BASE_CLIP: 0.0, TRAINED_CLIP: 1.4, STATIC_CLIP: 3.0}[kind] * float(rng.uniform(0.6, 1.2))
    faces = [_unit(likeness * reference + rng.normal(size=16) / 4).tolist() for _ in range(3)]
    motion = {BASE_CLIP: 2.4, TRAINED_CLIP: 1.6, STATIC_CLIP: 0.05}[kind] * float(rng.lognormal(0, 0.4))
    missing = kind == TRAINED_CLIP and k == 3
    return ScoredClip(
        clip_id=clip_id, kind=kind, identity_id=person.identity_id if person else None,
        method={BASE_CLIP: "base", TRAINED_CLIP: "sft", STATIC_CLIP: "photo"}[kind],
        prompt_id="p", prompt=PROMPTS[k % len(PROMPTS)] if kind != STATIC_CLIP else "a person", seed=k,
        latents_uri=clip_uri(clip_id, ".safetensors"), text_uri="text/t.safetensors",
        embeddings=None if missing else faces, identity_error="no face was found in any frame" if missing else None,
        motion_reward=motion, semantics_reward=float(rng.uniform(3, 9)),
    )  # fmt: skip


def _measured(run: Run, person: Identity, method: str, k: int, rng: np.random.Generator) -> MetricRow:
    clip_id = storage.sha256_json(["evaluation", method, None if method == "base" else person.identity_id, k])[:32]
    uri = clip_uri(clip_id, ".mp4")
    if not run.has(uri):
        name = "dana" if method == "base" else person.identity_id
        storage.write_bytes(run.path(uri), encode_mp4(_moving(name, MOVES[method] + k / 3), FPS))
    face, motion, prompt = LEVELS[method]
    return MetricRow(
        clip_id=clip_id, identity_id=person.identity_id, method=method, prompt=PROMPTS[k % len(PROMPTS)], seed=1000 + k,
        face_sim=None if method == "base" and k == 2 else face + float(rng.normal(0, 0.06)),
        face_detect_rate=1.0 if k else 0.75, dynamic_magnitude=motion * float(rng.lognormal(0, 0.2)),
        prompt_score=float(np.clip(prompt + rng.normal(0, 0.2), 0, 1)), fps=FPS, frames=FRAMES, height=SIDE, width=SIDE,
        video_uri=uri, face_sim_missing0=face, dynamic_degree=1.0, head_motion=motion / 5 + float(rng.normal(0, 0.1)),
        temporal_flickering=0.97 - motion / 500, warp_error=3.0, temporal_consistency=0.98, action=float(k % 3 > 0),
        place=1.0, step={"base": 0, "sft": 60}.get(method, 160),
    )  # fmt: skip


def _log(run: Run, name: str, stage: str, rows: list[dict[str, float]]) -> None:
    schema = pa.schema([(column, pa.float64()) for column in rows[0]])
    storage.write_table(run.path(training_uri(name, stage, "log.parquet")), rows, schema)


def _sft_row(step: int, rng: np.random.Generator) -> dict[str, float]:
    loss = 0.35 + 0.5 * math.exp(-step / 25) + float(rng.normal(0, 0.03))
    return {"step": float(step), "loss": loss, "gradient_norm": loss / 3, "steps_per_second": 2.5}


def _hpo_row(step: int, rng: np.random.Generator) -> dict[str, float]:
    inside = 1.6 * (1 - math.exp(-step / 60)) + float(rng.normal(0, 0.2))
    return {
        "step": float(step), "loss": math.log1p(math.exp(-inside)), "inside": inside,
        "accuracy": 1 / (1 + math.exp(-2 * inside)), "gradient_factor": 1 / (1 + math.exp(inside)),
        "policy_winner": 0.42 - 0.02 * inside, "policy_loser": 0.44 + 0.02 * inside,
        "reference_winner": 0.42 + float(rng.normal(0, 0.01)), "reference_loser": 0.44 + float(rng.normal(0, 0.01)),
        "gradient_norm": 0.4 + float(rng.normal(0, 0.05)), "steps_per_second": 1.2,
    }  # fmt: skip


def _manifest(run: Run, person: Identity) -> None:
    tensor = np.full((8, 4), len(person.identity_id), np.float32)
    data = safetensors.numpy.save({"transformer.block.to_q.lora_A.weight": tensor})
    version = storage.sha256_bytes(data + person.identity_id.encode())
    folder = run.path("adapters", person.identity_id, version[:12])
    digest = storage.write_bytes(storage.join(folder, "pytorch_lora_weights.safetensors"), data)
    content: dict[str, Any] = {
        "identity_id": person.identity_id, "version": version[:12], "sha256": digest, "base_sha256": "b" * 64,
        "recipe_sha256": "c" * 64, "rank": 8, "alpha": 8, "created": "2026-01-01T00:00:00+00:00",
        "metrics": {"face_sim": {"mean": 0.6012, "low": 0.57, "high": 0.63, "n": 7, "nulls": 0}},
    }  # fmt: skip
    storage.write_json(storage.join(folder, "manifest.json"), content)


if __name__ == "__main__":
    from magicid.report import build_report

    made = fill(sys.argv[1], ("ada", "bruno", "chidi", "dana"))
    storage.write_bytes(made.path("report.html"), build_report(made).encode())
