"""The build: parts in order, finished ones skipped, checksums that notice every change."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from magicid.world import build as world_build
from magicid.world.build import PARTS, ChecksumError, Part, build, quality_table, verify_checksums, write_checksums
from magicid.world.training_loop import train_loop

STEPS = 10
runs: list[tuple[str, int]] = []
stop_at: list[int] = []


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """A part that learns one number; it may be told to break off."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        if stop_at and step == stop_at[0]:
            raise KeyboardInterrupt
        runs.append((work.name, step))
        return {"loss": (model.weight - float(rng.normal())).square().sum()}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_loop("toy", model, optimizer, step_function, steps=steps or STEPS, folder=work, save_seconds=0.0)
    out.mkdir(parents=True, exist_ok=True)
    (out / "value.txt").write_text(f"{model.weight.item():.8f}\n")
    return {"value": model.weight.item()}


TOYS = tuple(Part(name, __name__, name, "value.txt") for name in ("first", "second"))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    runs.clear()
    stop_at.clear()


def test_finished_parts_are_skipped(tmp_path: Path) -> None:
    figures = build(tmp_path / "work", weights=tmp_path / "weights", parts=TOYS)
    assert runs == [(name, step) for name in ("first", "second") for step in range(STEPS)]
    runs.clear()
    assert build(tmp_path / "work", weights=tmp_path / "weights", parts=TOYS) == figures
    assert runs == []
    (tmp_path / "weights" / "second" / "value.txt").unlink()
    build(tmp_path / "work", weights=tmp_path / "weights", parts=TOYS)
    assert verify_checksums(tmp_path / "weights") == 2


def test_an_interrupted_part_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = build(tmp_path / "a", weights=tmp_path / "wa", parts=TOYS[:1])
    runs.clear()
    stop_at.append(6)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "b", weights=tmp_path / "wb", parts=TOYS[:1])
    stop_at.clear()
    again = build(tmp_path / "b", weights=tmp_path / "wb", parts=TOYS[:1])
    assert [step for _, step in runs] == list(range(STEPS))
    assert again["first"]["value"] == whole["first"]["value"]


def test_only_and_scale(tmp_path: Path) -> None:
    build(tmp_path / "work", weights=tmp_path / "weights", parts=TOYS, only=["second"], steps_scale=0.3)
    assert runs == [("second", step) for step in range(3)]
    with pytest.raises(ValueError, match="third"):
        build(tmp_path / "work", weights=tmp_path / "weights", parts=TOYS, only=["third"])


def test_checksums_notice_every_change(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.bin").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    write_checksums(tmp_path)
    digests = [hashlib.sha256(content).hexdigest() for content in (b"weights", b"{}")]
    listing = (tmp_path / "SHA256SUMS").read_text()
    assert listing == f"{digests[0]}  a/model.bin\n{digests[1]}  config.json\n"
    assert verify_checksums(tmp_path) == 2
    assert verify_checksums(tmp_path, ["a"]) == 1
    (tmp_path / "a" / "model.bin").write_bytes(b"weighty")
    with pytest.raises(ChecksumError, match=r"a/model\.bin has changed"):
        verify_checksums(tmp_path)
    (tmp_path / "a" / "model.bin").unlink()
    with pytest.raises(ChecksumError, match=r"a/model\.bin is missing"):
        verify_checksums(tmp_path)
    (tmp_path / "a" / "other.bin").write_bytes(b"")
    with pytest.raises(ChecksumError, match=r"a/other\.bin is not listed"):
        verify_checksums(tmp_path, ["a"])
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ChecksumError, match="is missing"):
        verify_checksums(tmp_path)


def test_every_part_has_a_training_and_a_number_of_steps() -> None:
    assert [part.name for part in PARTS][:2] == ["detector", "identity"]
    for part in PARTS:
        training, steps = part.load()
        assert callable(training)
        assert steps > 0


def test_shipped_weights_match_their_checksums_and_stay_small() -> None:
    files = verify_checksums()
    folders = {part.folder for part in PARTS}
    assert files > 20
    for folder in folders:
        assert verify_checksums(folders=[folder]) >= 2
    total = sum(f.stat().st_size for f in world_build.WEIGHTS.rglob("*") if f.is_file())
    assert total <= 30e6


def test_quality_table_has_a_row_per_figure() -> None:
    table = quality_table({"a": {"x": 1.0, "minutes": 2}, "b": {"y": 0.123456}})
    assert table.row_count == 3
