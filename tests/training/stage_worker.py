"""One worker that trains the same steps with every ZeRO stage; `python stage_worker.py RANK WORLD_SIZE FOLDER STAGES`.

The first worker leaves `<stage>.safetensors` in the folder: the LoRA after the first step and after all steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from tiny_backbone import LORA, MemoryPairs, TinyBackbone, hpo_settings, trainer_settings
from torch import Tensor

from magicid import recipe
from magicid.errors import NonFiniteLossError, StorageError
from magicid.training import lora
from magicid.training.engine import Engine, create_engine
from magicid.training.hpo import train_hpo
from magicid.training.pairs import PairTensors

STEPS = 3


def reference_for(engine: Engine) -> lora.LoraState:
    """An SFT LoRA whose B is not zero."""
    state = lora.initial_state(engine.shapes, 5)
    random = torch.Generator().manual_seed(1)
    return {n: t if ".lora_A." in n else 0.1 * torch.randn(t.shape, generator=random) for n, t in state.items()}


def settings() -> recipe.Hpo:
    """Two visits of a kept draw within the steps; three pairs do not divide over two workers."""
    return hpo_settings(steps=STEPS, batch_size=3, noise_draws=1, anchor=0.1, weight_decay=0.01)


def train(kind: str, stage: int, checkpointing: bool) -> dict[str, Tensor]:
    """Train twice on one engine, with a broken identity between; the LoRA after one step and after all."""
    backbone = TinyBackbone()
    trainer = trainer_settings(zero_stage=stage, gradient_checkpointing=checkpointing)
    engine = create_engine(backbone.transformer, backbone.lora_target_modules(), LORA, trainer, kind=kind, device="cpu")
    reference = reference_for(engine)
    one = settings().model_copy(update={"steps": 1})
    first = train_hpo(engine, backbone, MemoryPairs(2, 3), reference, one, trainer, 6.0)
    try:
        broken = MemoryPairs(2, 3, broken={"dy0", "dy1", "dy2"})
        train_hpo(engine, backbone, broken, lora.initial_state(engine.shapes, 9), settings(), trainer, 6.0)
    except NonFiniteLossError:
        pass
    else:
        raise AssertionError("a NaN winner did not stop the training")
    result = train_hpo(engine, backbone, MemoryPairs(2, 3), reference, settings(), trainer, 6.0)
    adam = engine.adam_state()
    assert adam.step == STEPS
    found = {f"first/{n}": t for n, t in first.lora_state.items()}
    found |= {f"last/{n}": t for n, t in result.lora_state.items()}
    found |= {f"exp_avg/{n}": t for n, t in adam.exp_avg.items()}
    found |= {f"exp_avg_sq/{n}": t for n, t in adam.exp_avg_sq.items()}
    # The state goes out and in again without a change, and training goes on from it.
    engine.reset(result.lora_state, adam, learning_rate=1e-3, weight_decay=0.0)
    again = engine.adam_state()
    assert again.step == STEPS
    assert all(torch.equal(again.exp_avg_sq[n], t) for n, t in adam.exp_avg_sq.items())
    assert all(torch.equal(engine.lora_state()[n], t) for n, t in result.lora_state.items())
    return found


class AwayOnTheSecond(MemoryPairs):
    """Pairs whose storage fails the second worker only, at its first pair."""

    def __getitem__(self, pair_id: str) -> PairTensors:
        if dist.get_rank() == 1:
            raise StorageError(f"cannot read {pair_id}", "look")
        return super().__getitem__(pair_id)


def stop_together() -> None:
    """What one worker alone meets, loading a pair or keeping a validation clip, stops both at once."""
    backbone, trainer = TinyBackbone(), trainer_settings()
    engine = create_engine(
        backbone.transformer, backbone.lora_target_modules(), LORA, trainer, kind="torch", device="cpu"
    )

    def full(_: int) -> None:
        if engine.rank == 0:
            raise StorageError("cannot write the clip", "look")

    validating = settings().model_copy(update={"validate_every": 1})
    for pairs, message in ((AwayOnTheSecond(), "cannot read"), (MemoryPairs(), "cannot write the clip")):
        try:
            train_hpo(engine, backbone, pairs, reference_for(engine), validating, trainer, 6.0, validate=full)
        except StorageError as error:
            if message not in error.problem:
                raise
        else:
            raise AssertionError(f"nothing stopped worker {engine.rank}")
    assert [float(x) for x in engine.sum_over_workers(torch.ones(2))] == [2.0, 2.0]  # the workers are still in step


def main() -> None:
    rank, world_size, folder, stages = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for stage in map(int, stages):
        found = train("deepspeed", stage, checkpointing=False)
        if rank == 0:
            safetensors.torch.save_file(found, folder / f"{stage}.safetensors")
    found = train("torch", 0, checkpointing=True)
    if rank == 0:
        safetensors.torch.save_file(found, folder / "torch.safetensors")
    stop_together()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
