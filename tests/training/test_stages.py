"""DeepSpeed ZeRO 0 to 3, one worker and two, against plain torch: the same LoRA after one step and after three."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import stage_worker
import torch
from torch import Tensor

HERE = Path(__file__).parent
STAGES = "0123"
# Of weights that a step moves by 1e-2. AdamW divides a gradient by its own size, so where it is next to nothing
# rounding, which differs from one kind of CPU to the next, moves a single weight further than all the others.
ON_AVERAGE, AT_MOST = 1e-6, 1e-4


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """Plain torch, one process, the whole batch at once."""
    return stage_worker.train("torch", 0, checkpointing=False)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two workers over gloo, started once, left what each stage trained."""
    folder = tmp_path_factory.mktemp("stages")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    logs = [folder / f"worker{rank}.log" for rank in range(2)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(HERE / "stage_worker.py"), str(rank), "2", str(folder), STAGES]
            with log.open("wb") as output:
                workers.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert codes == [0, 0], "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    return folder


def same(trained: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert trained.keys() == plain.keys()
    for key, tensor in trained.items():
        difference = (tensor - plain[key]).abs()
        assert float(difference.mean()) < ON_AVERAGE, key
        assert float(difference.max()) < AT_MOST, key


@pytest.mark.parametrize("name", [*STAGES, "torch"])
def test_two_workers_equal_plain_torch(plain: dict[str, Tensor], two_workers: Path, name: str) -> None:
    """ "torch" is the plain engine with activation checkpointing, one pair and one side at a time."""
    same(safetensors.torch.load_file(two_workers / f"{name}.safetensors"), plain)


@pytest.mark.parametrize("stage", range(4))
def test_one_worker_equals_plain_torch(plain: dict[str, Tensor], stage: int) -> None:
    same(stage_worker.train("deepspeed", stage, checkpointing=stage == 3), plain)


def test_one_side_at_a_time_equals_both_at_once(plain: dict[str, Tensor]) -> None:
    same(stage_worker.train("torch", 0, checkpointing=True), plain)


def test_every_lora_b_moves(plain: dict[str, Tensor]) -> None:
    """With a frozen base under it; the loss of the first step alone moves all of them."""
    from tiny_backbone import LORA, TinyBackbone, trainer_settings

    from magicid.training.engine import create_engine

    backbone = TinyBackbone()
    engine = create_engine(
        backbone.transformer, backbone.lora_target_modules(), LORA, trainer_settings(), kind="torch", device="cpu"
    )
    for name, start in stage_worker.reference_for(engine).items():
        if ".lora_B." in name:
            assert float((plain[f"first/{name}"] - start).abs().max()) > 1e-3, name
    assert torch.equal(engine.lora_state()[name], torch.zeros_like(start))
