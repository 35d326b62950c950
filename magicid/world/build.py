"""Makes every network of the face world again from nothing: ``python -m magicid.world.build``.

Each part writes its folder under ``weights`` and its measured figures beside its checkpoints; a part whose figures are
there and whose files are in place is finished and skipped, and one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WEIGHTS = Path(__file__).parent / "weights"
CHECKSUMS = "SHA256SUMS"
Train = Callable[[Path, Path, str, "int | None"], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One training: its name, where its ``train`` function is, the folder it fills and a file it leaves there."""

    name: str
    module: str
    folder: str
    file: str
    function: str = "train"

    def load(self) -> tuple[Train, int]:
        """The training function and its usual number of steps."""
        module = importlib.import_module(self.module)
        train: Train = getattr(module, self.function)
        steps = getattr(module, "STEPS", None) or module.RECIPES[self.folder].steps
        return train, int(steps)


# In this order: the recognisers need the detector's file, and the video model is judged by the classifier.
PARTS = (
    Part("detector", "magicid.world.train_detector", "identity", "detector.onnx"),
    Part("identity", "magicid.world.train_identity", "identity", "recognizer.onnx"),
    Part("identity_metric", "magicid.world.train_identity", "identity_metric", "recognizer.onnx", "train_metric"),
    Part("classifier", "magicid.world.train_classifier", "classifier", "model.safetensors"),
    Part("pose", "magicid.world.train_pose", "pose", "model.safetensors"),
    Part("pose", "magicid.world.train_pose", "pose", "model.safetensors"),
    Part("motion", "magicid.world.train_motion", "motion", "model.safetensors"),
    Part("prompt", "magicid.world.train_prompt", "prompt", "model.safetensors"),
    Part("video", "magicid.world.train_video", "video", "model_index.json"),
)


class ChecksumError(RuntimeError):
    """A weight file that is missing, changed, or not listed."""


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _weight_files(weights: Path) -> list[str]:
    files = (f.relative_to(weights) for f in weights.rglob("*") if f.is_file())
    return sorted(
        f.as_posix() for f in files if not any(part.startswith(".") for part in f.parts) and f.name != CHECKSUMS
    )


def write_checksums(weights: Path = WEIGHTS) -> Path:
    """Write ``SHA256SUMS`` (the format of ``sha256sum``) over every file below ``weights``, by one rename."""
    lines = [f"{_sha256(weights / name)}  {name}\n" for name in _weight_files(weights)]
    temporary = weights / f".{CHECKSUMS}.{os.getpid()}"
    temporary.write_text("".join(lines))
    temporary.replace(weights / CHECKSUMS)
    return weights / CHECKSUMS


def verify_checksums(weights: Path = WEIGHTS, folders: Sequence[str] | None = None) -> int:
    """Compare the files below ``weights`` with ``SHA256SUMS``; returns how many were checked.

    Args:
        weights: folder of the world's networks.
        folders: names of the folders to check, all by default.

    Raises:
        ChecksumError: the list is missing, or a file is missing, changed or not listed.
    """
    listing = weights / CHECKSUMS
    if not listing.is_file():
        raise ChecksumError(f"{listing} is missing; run `python -m magicid.world.build`")
    lines = (line.split("  ", 1) for line in listing.read_text().splitlines())
    listed = {name: digest for digest, name in lines}

    def wanted(name: str) -> bool:
        return folders is None or name.split("/", 1)[0] in folders

    problems = [f"{name} is not listed" for name in _weight_files(weights) if wanted(name) and name not in listed]
    names = [name for name in listed if wanted(name)]
    for name in names:
        if not (weights / name).is_file():
            problems.append(f"{name} is missing")
        elif _sha256(weights / name) != listed[name]:
            problems.append(f"{name} has changed")
    if problems:
        raise ChecksumError(f"{weights}: " + "; ".join(problems) + "; restore the files or run the build again")
    return len(names)


def build(
    work: Path,
    *,
    weights: Path = WEIGHTS,
    parts: Sequence[Part] = PARTS,
    only: Sequence[str] = (),
    device: str = "auto",
    steps_scale: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Train what is not finished yet, then write the checksums.

    Args:
        work: folder for checkpoints and figures, outside the package.
        weights: folder to fill.
        parts: the trainings, in order.
        only: names of the parts to make; all when empty.
        device: `auto`, `cpu` or `cuda`.
        steps_scale: factor on every part's number of steps; below 1 for a rough world in less time.

    Returns:
        The figures of every finished part, by name.

    Raises:
        ValueError: ``only`` names an unknown part.
    """
    unknown = set(only) - {part.name for part in parts}
    if unknown:
        raise ValueError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in parts)}")
    figures: dict[str, dict[str, Any]] = {}
    for part in parts:
        record = work / part.name / "figures.json"
        finished = record.is_file() and (weights / part.folder / part.file).is_file()
        if not finished and (not only or part.name in only):
            train, usual = part.load()
            began = time.monotonic()
            steps = None if steps_scale == 1.0 else max(1, round(usual * steps_scale))
            made = train(weights / part.folder, work / part.name, device, steps)
            made["minutes"] = round((time.monotonic() - began) / 60, 1)
            record.parent.mkdir(parents=True, exist_ok=True)
            temporary = record.with_suffix(".tmp")
            temporary.write_text(json.dumps(made, indent=1))
            temporary.replace(record)
        if record.is_file():
            figures[part.name] = json.loads(record.read_text())
    write_checksums(weights)
    return figures


def quality_table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of all parts, one row each."""
    table = Table("part", "figure", "value", title="Networks of the face world")
    for part, values in figures.items():
        for name, value in values.items():
            table.add_row(part, name, f"{value:.4g}" if isinstance(value, float) else str(value))
        table.add_section()
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(prog="python -m magicid.world.build", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("~/.cache/magicid/build"), help="checkpoints and figures")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder to fill")
    parser.add_argument("--only", action="append", default=[], help="make this part only (may be given again)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on the numbers of training steps")
    parser.add_argument("--checksums", action="store_true", help="train nothing, only write the list of checksums")
    chosen = parser.parse_args(arguments)
    if chosen.checksums:
        Console().print(f"wrote {write_checksums(chosen.weights)}")
        return
    figures = build(
        chosen.work.expanduser(), weights=chosen.weights, only=chosen.only, device=chosen.device,
        steps_scale=chosen.steps_scale,
    )  # fmt: skip
    Console().print(quality_table(figures))


if __name__ == "__main__":
    main()
