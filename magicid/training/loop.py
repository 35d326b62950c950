"""What both training loops share: start or resume, agree over workers, log, checkpoint."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from magicid import recipe
from magicid.backbones.base import TextEmbeddings
from magicid.errors import NonFiniteLossError, TrainingError
from magicid.training.checkpoint import Checkpoint, CheckpointStore, ReferenceErrors
from magicid.training.engine import Engine
from magicid.training.lora import LoraState

LogRow = dict[str, float]
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingResult:
    """The trained LoRA (PEFT names, float32, CPU), steps done, and the log rows of all of them."""

    lora_state: LoraState
    steps: int
    history: list[LogRow]


class Progress:
    """The bookkeeping of one training, on every worker alike."""

    def __init__(
        self,
        engine: Engine,
        checkpoints: CheckpointStore | None,
        trainer: recipe.Trainer,
        seed: int,
        *,
        settings_sha256: str,
        reference_sha256: str = "",
    ) -> None:
        self.engine = engine
        self.checkpoints = checkpoints
        self.trainer = trainer
        self.seed = seed
        self.settings_sha256 = settings_sha256
        self.reference_sha256 = reference_sha256
        self.reference_errors: ReferenceErrors = {}
        self.history: list[LogRow] = []

    def begin(self, start: LoraState | None, *, learning_rate: float, weight_decay: float, max_grad_norm: float) -> int:
        """Set the engine to the newest checkpoint, or to `start` (None: a fresh LoRA); returns the steps done.

        Raises:
            ReferenceMovedError, TrainingError: see `CheckpointStore.resume`; on all workers together.
        """
        found: Checkpoint | None = self.engine.from_first(self.together(self._resume))
        self.engine.reset(
            found.lora if found else start,
            found.adam if found else None,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=self.seed,
        )
        if found:
            self.reference_errors, self.history = dict(found.reference_errors), list(found.history)
        return found.step if found else 0

    def _resume(self) -> Checkpoint | None:
        if self.engine.rank != 0 or self.checkpoints is None:
            return None
        return self.checkpoints.resume(self.reference_sha256, self.settings_sha256)

    def together(self, call: Callable[[], T]) -> T:
        """Call on every worker; an error of one is raised on all, so that none waits for a worker that has left.

        `call` must not need the other workers before it fails. With one worker it is a plain call.

        Raises:
            Exception: of the first worker that has one; a TrainingError with its text where it cannot be sent.
        """
        if self.engine.world_size == 1:
            return call()
        value, problem = None, None
        try:
            value = call()
        except Exception as error:
            problem = error
        for found in self.engine.gather(_sendable(problem)):
            if found is not None:
                raise found from problem
        return value  # type: ignore[return-value]  # no worker has a problem, so there is a value

    def micro_batches(self, items: Sequence[T]) -> Iterator[list[T]]:
        """This worker's share in parts that fit: one by one where memory is short, which is when activations are
        checkpointed; else all at once."""
        size = 1 if self.trainer.gradient_checkpointing else len(items)
        for first in range(0, len(items), size):
            yield list(items[first : first + size])

    def agree(self, means: Tensor, step: int) -> Tensor:
        """Sum every worker's part of the step's means; all workers raise together when anything is not finite.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite; the step is not taken.
        """
        whole = torch.cat([means, torch.tensor([0.0 if self.engine.finite() else math.nan], dtype=means.dtype)])
        whole = self.engine.sum_over_workers(whole)
        if not bool(torch.isfinite(whole).all()):
            self.engine.discard()
            raise NonFiniteLossError(
                f"the loss or its gradient is not finite at step {step}",
                "lower the learning rate or beta of this stage; the last checkpoint before it is kept",
            )
        return whole[:-1]

    def after_step(self, done: int, total: int, row: LogRow, on_log: Callable[[LogRow], None]) -> None:
        """Log and checkpoint when due; the last step always is."""
        last = done == total
        if done % self.trainer.log_every == 0 or last:
            self.history.append({"step": float(done), **row})
            row = self.history[-1]
            self.together(lambda: on_log(row) if self.engine.rank == 0 else None)
        if self.checkpoints is not None and (done % self.trainer.checkpoint_every == 0 or last):
            self._save(done)

    def _save(self, step: int) -> None:
        for found in self.engine.gather(self.reference_errors):  # each worker kept those of its own pairs
            self.reference_errors = {**found, **self.reference_errors}
        checkpoint = Checkpoint(
            step=step,
            lora=self.engine.lora_state(),
            adam=self.engine.adam_state(),
            reference_sha256=self.reference_sha256,
            settings_sha256=self.settings_sha256,
            seed=self.seed,
            reference_errors=self.reference_errors,
            history=self.history,
        )
        self.together(lambda: self._write(checkpoint))

    def _write(self, checkpoint: Checkpoint) -> None:
        if self.engine.rank == 0 and self.checkpoints is not None:
            self.checkpoints.save(checkpoint)

    def result(self, steps: int) -> TrainingResult:
        """The end state."""
        return TrainingResult(self.engine.lora_state(), steps, self.history)


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one with its text where pickling would lose it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TrainingError(f"{type(error).__name__}: {error}", "see the logs of the workers")
    return error


def to_device(text: TextEmbeddings, device: torch.device) -> TextEmbeddings:
    """Text embeddings on a device."""
    return {name: tensor.to(device) for name, tensor in text.items()}
