"""Checkpoints: everything comes back; a damaged one is passed over; two are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from magicid.errors import ReferenceMovedError, StorageError
from magicid.training.checkpoint import Checkpoint, CheckpointStore
from magicid.training.engine import AdamState


def checkpoint(step: int) -> Checkpoint:
    random = torch.Generator().manual_seed(step)
    parts = [{f"block.{i}.lora_A.weight": torch.randn(2, 3, generator=random) for i in range(2)} for _ in range(3)]
    return Checkpoint(
        step=step,
        lora=parts[0],
        adam=AdamState(step, parts[1], parts[2]),
        reference_sha256="r",
        settings_sha256="s",
        seed=3,
        reference_errors={"b/0": (0.25, 0.5), "a/1": (float(torch.tensor(0.1)), 2.0)},
        history=[{"step": 1.0, "loss": 0.5}],
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    store, written = CheckpointStore(str(tmp_path), "hpo"), checkpoint(4)
    store.save(written)
    read = store.resume("r", "s")
    assert read is not None
    for name, tensor in written.lora.items():
        assert torch.equal(read.lora[name], tensor)
        assert torch.equal(read.adam.exp_avg[name], written.adam.exp_avg[name])
        assert torch.equal(read.adam.exp_avg_sq[name], written.adam.exp_avg_sq[name])
    assert (read.step, read.adam.step, read.seed) == (4, 4, 3)
    assert read.reference_errors == written.reference_errors
    assert read.history == written.history


def test_the_last_two_are_kept_and_stages_are_apart(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "hpo")
    assert store.load() is None
    CheckpointStore(str(tmp_path), "sft").save(checkpoint(99))
    for step in (2, 4, 6):
        store.save(checkpoint(step))
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "hpo-00000004.safetensors",
        "hpo-00000006.safetensors",
        "sft-00000099.safetensors",
    ]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(str(tmp_path), "hpo")
    store.save(checkpoint(2))
    newest = Path(store.save(checkpoint(4)))
    data = newest.read_bytes()
    flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    newest.write_bytes(
        {"truncated": data[: len(data) // 2], "flipped": flipped, "empty": b"", "text": b"not a checkpoint"}[damage]
    )
    read = store.load()
    assert read is not None
    assert read.step == 2
    assert "not whole" in caplog.text
    assert not newest.exists()


def test_damaged_ones_do_not_push_out_the_new_ones(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "hpo")
    for step in (8, 10):
        Path(store.save(checkpoint(step))).write_bytes(b"")
    assert store.load() is None
    for step in (2, 4):
        store.save(checkpoint(step))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hpo-00000002.safetensors", "hpo-00000004.safetensors"]


def test_one_that_cannot_be_read_now_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(tmp_path), "hpo")
    locations = [store.save(checkpoint(step)) for step in (2, 4)]
    down = {locations[1]}

    def read(location: str) -> bytes:
        if location in down:
            raise StorageError(f"cannot read {location}: time-out", "try again")
        return Path(location).read_bytes()

    monkeypatch.setattr("magicid.training.checkpoint.read_bytes", read)
    older = store.load()
    assert older is not None
    assert older.step == 2
    down.update(locations)
    with pytest.raises(StorageError, match="time-out"):  # not None: training would begin anew
        store.load()
    down.clear()
    newest = store.load()
    assert newest is not None
    assert newest.step == 4


def test_the_reference_is_pinned(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), "hpo")
    store.save(checkpoint(2))
    with pytest.raises(ReferenceMovedError):
        store.resume("another", "s")


def test_unwritable_storage_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        CheckpointStore(str(tmp_path / "file"), "hpo").save(checkpoint(1))


def test_works_on_a_url() -> None:
    store = CheckpointStore("memory://checkpoints/anna", "hpo")
    for step in (1, 2, 3):
        store.save(checkpoint(step))
    read = store.load()
    assert read is not None
    assert read.step == 3
