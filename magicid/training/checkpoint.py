"""Training state on storage: one safetensors file per (identity, stage), for any number of workers.

It holds the LoRA and AdamW's moments in float32 (tens of megabytes, never the base), the step, what pins the run
(reference, settings, pairs) and the kept reference errors. The last two are kept; one that is truncated or corrupt is
removed and the one before is used.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from magicid.errors import ReferenceMovedError, StorageError, TrainingError
from magicid.storage import join, list_files, public_name, read_bytes, remove, sha256_bytes, write_bytes
from magicid.training.engine import AdamState
from magicid.training.lora import LoraState, state_sha256

_KEEP = 2
_META = "magicid"  # one metadata key only: safetensors writes several in random order
_log = logging.getLogger(__name__)

ReferenceErrors = dict[str, tuple[float, float]]  # "<pair id>/<draw>" -> (winner, loser)


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps.

    Attributes:
        reference_sha256: of the frozen reference's LoRA; "" in SFT.
        settings_sha256: of the recipe sections and pairs that shape the training; a resumed run must have the same.
        reference_errors: kept errors of the reference, float32 values.
        history: the log rows so far.
    """

    step: int
    lora: LoraState
    adam: AdamState
    reference_sha256: str
    settings_sha256: str
    seed: int
    reference_errors: ReferenceErrors = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one identity and stage, under `folder` (any fsspec URL)."""

    folder: str
    stage: str

    def save(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint atomically, read it back, drop all but the last two; returns its location.

        Raises:
            StorageError: unwritable, full, or other bytes came back.
        """
        location = join(self.folder, f"{self.stage}-{checkpoint.step:08d}.safetensors")
        digest = write_bytes(location, _to_bytes(checkpoint))
        if sha256_bytes(read_bytes(location)) != digest:
            raise StorageError(
                f"{public_name(location)} reads back other than written", "check the storage, then run again"
            )
        for old in self._files()[:-_KEEP]:
            remove(old)
        return location

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint; None when there is none.

        One that is not whole is removed: left there, its higher step would push out the new ones. One that the storage
        does not give may be whole: it stays, and the one before is used.

        Raises:
            StorageError: none could be used, and the storage did not give all of them; or one could not be removed.
        """
        unread: StorageError | None = None
        for location in reversed(self._files()):
            try:
                data = read_bytes(location)
            except StorageError as error:
                unread = error
                _log.warning("%s; the checkpoint before it is used", error.problem)
                continue
            try:
                return _from_bytes(data)
            except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
                name = public_name(location)
                _log.warning("checkpoint %s is not whole (%s); it is removed and the one before is used", name, error)
                remove(location)
        if unread is not None:
            raise unread  # starting anew would throw away hours of training for a moment's fault of the storage
        return None

    def resume(self, reference_sha256: str, settings_sha256: str) -> Checkpoint | None:
        """The newest whole checkpoint, if training went on from the same reference under the same settings.

        Raises:
            ReferenceMovedError: it was pinned to another reference.
            TrainingError: it was made under other settings or from other pairs.
        """
        checkpoint = self.load()
        if checkpoint is None:
            return None
        if checkpoint.reference_sha256 != reference_sha256:
            raise ReferenceMovedError(
                f"{public_name(self.folder)}: training began from reference {checkpoint.reference_sha256[:12]}, "
                f"but the SFT adapter is now {reference_sha256[:12]}",
                "restore that SFT adapter, or remove this folder to train again from the start",
            )
        if checkpoint.settings_sha256 != settings_sha256:
            raise TrainingError(
                f"{public_name(self.folder)}: the {self.stage} checkpoint was made under other settings or from other "
                "pairs",
                "use the recipe of that run, or remove this folder to train again from the start",
            )
        return checkpoint

    def _files(self) -> list[str]:
        return [f for f in list_files(self.folder, ".safetensors") if f.rsplit("/", 1)[-1].startswith(f"{self.stage}-")]


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    adam = checkpoint.adam
    parts = {"lora": checkpoint.lora, "exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}
    tensors = {f"{part}/{name}": t.contiguous() for part, state in parts.items() for name, t in state.items()}
    keys = sorted(checkpoint.reference_errors)
    tensors["reference_errors"] = torch.tensor([checkpoint.reference_errors[key] for key in keys]).view(-1, 2)
    meta = {
        "step": checkpoint.step,
        "adam_step": adam.step,
        "reference_sha256": checkpoint.reference_sha256,
        "settings_sha256": checkpoint.settings_sha256,
        "seed": checkpoint.seed,
        "reference_error_keys": keys,
        "history": checkpoint.history,
        "content_sha256": state_sha256(tensors),
    }
    return safetensors.torch.save(tensors, metadata={_META: json.dumps(meta, sort_keys=True)})


def _from_bytes(data: bytes) -> Checkpoint:
    tensors = safetensors.torch.load(data)
    meta = json.loads(safetensors_metadata(data)[_META])
    if state_sha256(dict(sorted(tensors.items()))) != meta["content_sha256"]:
        raise ValueError("its content differs from its hash")

    def part(name: str) -> dict[str, Tensor]:
        return {key.split("/", 1)[1]: t for key, t in sorted(tensors.items()) if key.startswith(f"{name}/")}

    errors = tensors["reference_errors"].tolist()
    return Checkpoint(
        step=meta["step"],
        lora=part("lora"),
        adam=AdamState(meta["adam_step"], part("exp_avg"), part("exp_avg_sq")),
        reference_sha256=meta["reference_sha256"],
        settings_sha256=meta["settings_sha256"],
        seed=meta["seed"],
        reference_errors={key: (both[0], both[1]) for key, both in zip(meta["reference_error_keys"], errors)},
        history=meta["history"],
    )


def safetensors_metadata(data: bytes) -> dict[str, Any]:
    """The metadata of a safetensors file: 8 bytes of length, then a JSON header. Raises ValueError."""
    if len(data) < 8:
        raise ValueError("shorter than a safetensors header")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return dict(header.get("__metadata__", {}))
