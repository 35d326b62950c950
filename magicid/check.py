"""What a run would lack, found before hours are spent: weights, licences, memory, CPUs, storage, prompts.

Nothing is loaded and nothing but a small probe file is written, so it answers at once on a machine without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from magicid import memory
from magicid.backbones import check_folder
from magicid.errors import BackboneError, MagicIDError, RecipeError, StorageError
from magicid.prompts import load_prompts
from magicid.recipe import Recipe
from magicid.storage import check_creates_once, check_writable, public_name
from magicid.weights import NO_FOLDER, resolve

Level = Literal["ok", "warning", "error"]

_PIPELINES = {
    "hunyuan": ("HunyuanVideoPipeline", ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    "wan": ("WanPipeline", ("text_encoder", "tokenizer")),
}
_FREE_LICENCES = ("apache-2.0", "mit")
_RESEARCH_PACKS = ("antelopev2", "buffalo_l", "buffalo_m", "buffalo_s", "buffalo_sc")
_MODEL_FILES = (".safetensors", ".onnx")
_LOW_DISK_GIB = 1


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `error` would stop the run, `warning` needs a person's eye, `ok` is for information."""

    level: Level
    subject: str
    problem: str
    action: str


def check(
    recipe: Recipe, out: str | None = None, *, cpus: float | None = None, gpu_gib: float | None = None
) -> list[Finding]:
    """Everything that can be said about a run beforehand.

    Args:
        out: the run directory, probed for writing; None: not looked at.
        cpus: of the whole cluster; None: this machine's.
        gpu_gib: memory of one GPU; None: the smallest of this machine's GPUs, where there is one.
    """
    findings = [*_weights(recipe), *_licences(recipe)]
    findings += _memory(recipe, gpu_gib)
    findings += _cpus(recipe, cpus)
    findings += _prompts(recipe)
    if out is not None:
        findings += _storage(out)
    return findings


# ---- weights and licences ----------------------------------------------------------------------------------------


def _model_locations(recipe: Recipe) -> dict[str, str]:
    """Recipe key -> location of every model of the run."""
    return {
        "backbone.path": recipe.backbone.path,
        "rewards.identity": recipe.rewards.identity,
        "rewards.motion": recipe.rewards.motion,
        "rewards.semantics": recipe.rewards.semantics,
        **{
            f"evaluation.{key}": location
            for key in ("identity", "motion", "pose", "clip", "video", "classifier")
            if (location := getattr(recipe.evaluation, key)) not in NO_FOLDER and recipe.evaluation.clips
        },
    }


def _weights(recipe: Recipe) -> Iterator[Finding]:
    """Missing model folders, folders without weights, and an incomplete pipeline folder."""
    for key, location in _model_locations(recipe).items():
        try:
            folder = resolve(location)
            parts = [folder]
            if key == "backbone.path":
                pipeline, text = _PIPELINES[recipe.backbone.kind]
                check_folder(folder, pipeline)
                parts = [folder / part for part in ("transformer", "vae", *text)]
            lacking = [part for part in parts if not _has_model(part)]
            if lacking:
                names = ", ".join(str(part) for part in lacking)
                raise BackboneError(f"no model files in {names}", "download the model again, all of its folders")
        except BackboneError as error:
            yield Finding("error", key, error.problem, error.action)
        else:
            yield Finding("ok", key, f"found {folder}", "")


def _has_model(part: Path) -> bool:
    """Whether a folder holds weights; a tokenizer's folder only needs a file."""
    if not part.is_dir():
        return False
    if part.name.startswith("tokenizer"):
        return any(part.iterdir())
    return any(file.suffix in _MODEL_FILES for file in part.iterdir())


def _licences(recipe: Recipe) -> Iterator[Finding]:
    """Licences a person must accept."""
    licence = recipe.backbone.licence
    if licence:
        free = licence.lower() in _FREE_LICENCES
        yield Finding(
            "ok" if free else "warning",
            "backbone.licence",
            f"the video model is under: {licence}",
            "" if free else "read and accept its terms before the run",
        )
    for key, location in _model_locations(recipe).items():
        if Path(location).name in _RESEARCH_PACKS:
            yield Finding(
                "warning",
                key,
                f"insightface's pack {Path(location).name} is licensed for non-commercial research only",
                "license it from insightface for any other use, or give another ArcFace folder",
            )


# ---- memory and CPUs ---------------------------------------------------------------------------------------------


def _memory(recipe: Recipe, gpu_gib: float | None) -> Iterator[Finding]:
    """Estimated memory per process against one GPU's, or against this machine's where the recipe wants no GPU."""
    folder = None
    try:
        folder = resolve(recipe.backbone.path)
        size = memory.video_model_size(recipe.backbone.kind, folder)
    except (MagicIDError, OSError, ValueError, KeyError):  # what is wrong with the folder is said above
        if folder is not None or recipe.backbone.path.startswith("world:"):
            return  # not a published model, or an incomplete one
        size = memory.video_model_size(recipe.backbone.kind, None)
    resources = recipe.resources
    training, sampling = memory.training_memory(recipe, size), memory.sampling_memory(recipe, size)
    if resources.worker_gpus or resources.generator.gpus:
        available = gpu_gib if gpu_gib is not None else smallest_gpu_gib()
        for subject, need, gpus in (
            ("memory of a training worker", training, resources.worker_gpus),
            ("memory of a generator", sampling, resources.generator.gpus),
        ):
            if gpus:
                yield _compare(subject, need, available / min(gpus, 1) if available else None, "GPU")
    else:
        workers = resources.slots * resources.workers_per_slot
        yield _compare("memory of the trainers", training, machine_gib() / workers, "worker")
        yield _compare("memory of a generator", sampling, machine_gib() / resources.generator.min_size, "process")


def _compare(subject: str, need: memory.MemoryNeed, available: float | None, unit: str) -> Finding:
    parts = f"weights {need.weights:.1f}, adapters {need.adapters:.1f}, activations {need.activations:.1f}"
    problem = f"about {need.total:.1f} GiB per {unit} ({parts})"
    if available is None:
        return Finding(
            "ok", subject, f"{problem}; no GPU here to compare with", f"use GPUs with {need.total * 1.2:.0f} GiB"
        )
    action = "lower sampling.frames, height or width, turn trainer.gradient_checkpointing on, or use a larger GPU"
    if need.total > available:
        return Finding("error", subject, f"{problem}, but there are {available:.1f}", action)
    if need.total > 0.8 * available:  # the estimate is good to 20 %
        return Finding("warning", subject, f"{problem}, close to the {available:.1f} there are", action)
    return Finding("ok", subject, f"{problem} of {available:.1f}", "")


def machine_gib() -> float:
    """This machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / memory.GIB


def smallest_gpu_gib() -> float | None:
    """Memory of this machine's smallest NVIDIA GPU, as its driver's tool says; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(float(line) for line in answer.split()) / 1024  # MiB
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _cpus(recipe: Recipe, cpus: float | None) -> Iterator[Finding]:
    """CPUs that the pools of a pass leave to Ray Data's own tasks, and enough for all training workers."""
    resources = recipe.resources
    here = cpus is None
    available = float(cpus if cpus is not None else os.cpu_count() or 1)
    # A job for GPUs is often checked on the machine it is sent from: then what lacks here may be on the cluster.
    wants_gpus = bool(resources.worker_gpus or resources.generator.gpus)
    lacking: Level = "warning" if here and wants_gpus else "error"
    where = f"this machine's {available:g}" if here else f"{available:g}"
    taken = resources.pool_cpus()
    if taken >= available:
        yield Finding(
            lacking,
            "CPUs for Ray Data",
            f"the actor pools take {taken:g} of {where} CPUs: with none left the read tasks wait for ever",
            "lower resources.*.min_size or resources.*.cpus, or use more CPUs",
        )
    else:
        yield Finding("ok", "CPUs for Ray Data", f"the actor pools leave {available - taken:g} of {where} CPUs", "")
    trainers = resources.slots * resources.workers_per_slot * resources.worker_cpus
    if trainers > available:
        yield Finding(
            lacking,
            "CPUs for training",
            f"{resources.slots} slots take {trainers:g} of {where} CPUs: some would never start",
            "lower resources.slots, resources.workers_per_slot or resources.worker_cpus",
        )
    else:
        yield Finding("ok", "CPUs for training", f"the slots take {trainers:g} of {where} CPUs", "")


# ---- prompts and storage -----------------------------------------------------------------------------------------


def _prompts(recipe: Recipe) -> Iterator[Finding]:
    """A shipped set that is not there or too small, or a language model that is not named."""
    settings = recipe.prompts
    if settings.source == "shipped":
        try:
            load_prompts(settings)
        except RecipeError as error:
            yield Finding("error", "prompts", error.problem, error.action)
    elif settings.source == "openai" and not (settings.url and settings.model):
        yield Finding("error", "prompts", "prompts.source = openai needs prompts.url and prompts.model", "set both")
    elif settings.source == "transformers" and not (Path(settings.model) / "config.json").is_file():
        yield Finding("error", "prompts", f"no model folder {settings.model!r}", "correct prompts.model")
    if recipe.evaluation.clips and not settings.heldout:
        yield Finding("error", "prompts", "evaluation.clips needs held-out prompts", "raise prompts.heldout")


def _storage(out: str) -> Iterator[Finding]:
    """Whether the run directory can be written and leased, and little space on a local disk."""
    try:
        check_writable(out)
        check_creates_once(out)  # the driver's lease stands on it
    except StorageError as error:
        yield Finding("error", "storage", error.problem, error.action)
        return
    yield Finding("ok", "storage", f"{public_name(out)} can be written", "")
    if Path(out).is_dir():
        free = shutil.disk_usage(out).free / memory.GIB
        if free < _LOW_DISK_GIB:
            yield Finding(
                "warning", "storage", f"{out} has {free:.1f} GiB free", "free some space, or give another --out"
            )
