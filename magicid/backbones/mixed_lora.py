"""A LoRA of its own for each row of a batch, on one transformer that stays as it is.

Forward hooks add each row's scale * B A x to the outputs of the linear layers; module names and weights do not change.
Rows take their LoRA from standing buffers, so that a swap is a copy: nothing is allocated, renamed or compiled anew.
Ranks may differ; the missing ones are zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from magicid.backbones import adapter_slot
from magicid.errors import AdapterError

_ACTION = "use an adapter of this base model, as `magicid.adapters.load` reads it"


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """One LoRA in memory, ready for `MixedLora`.

    Attributes:
        tensors: module name -> (A (r, in), B (out, r)), on the transformer's device and in its dtype.
        scale: factor on B A x; alpha / r as trained.
        source: stands for the tensors, so that what was copied can be told without keeping them alive.
    """

    tensors: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    source: object = field(default_factory=object, repr=False)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], alpha: float, transformer: nn.Module) -> LoraWeights:
        """Take the tensors of an adapter file.

        Args:
            state: published names, `transformer.<module>.lora_A.weight` (r, in) and `lora_B.weight` (out, r).

        Raises:
            AdapterError: the tensors do not fit this transformer, or they or `alpha` are not finite numbers.
        """
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):  # it comes out of a file, too
            raise AdapterError(f"alpha is {alpha!r}, which is not a finite number", "publish the adapter again")
        rank = adapter_slot.check(transformer, state)
        broken = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
        if broken is not None:
            raise AdapterError(f"{broken} holds numbers that are not finite", "train the adapter again")
        tensors = {}
        for name in sorted({adapter_slot.module_name(key) for key in state}):
            weight: Any = transformer.get_submodule(name).weight
            a, b = (
                state[f"transformer.{name}.lora_{half}.weight"].to(weight.device, weight.dtype) for half in ("A", "B")
            )
            tensors[name] = (a, b)
        return cls(tensors, alpha / rank)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for pair in self.tensors.values() for tensor in pair)

    def scaled(self, factor: float) -> LoraWeights:
        """The same tensors at `factor` times the scale."""
        return self if factor == 1 else replace(self, scale=self.scale * factor)


@dataclass
class _Site:
    """One adapted linear layer. Buffers are (rows, rank, width), so that both rows and ranks are leading slices."""

    a: Tensor  # (rows, rank, in)
    b: Tensor  # (rows, rank, out): B transposed, times the scale
    held: list[tuple[object, float] | None] = field(default_factory=list)  # source and scale in each row
    rank: int = 0  # of the forward to come; 0: no row has a LoRA here


class MixedLora:
    """Gives each row of a transformer's batch its own LoRA.

    Not safe for several threads. The transformer must not carry PEFT adapters of its own while it is used so.

    Args:
        target_modules: regular expression over whole module names: the linear layers that may be adapted.
        keep_ranks: compute with the highest rank that came so far, also for lower ones: shapes that compiled code sees
            do not change with the identity.

    Raises:
        AdapterError: it matches no linear layer.
    """

    def __init__(self, transformer: nn.Module, target_modules: str, *, keep_ranks: bool = False) -> None:
        self._sites: dict[str, _Site] = {}
        self._rows = 0  # of the forward to come
        self._shared = False
        self.swaps = 0  # rows whose LoRA was exchanged so far
        self._keep_ranks = keep_ranks
        pattern = re.compile(target_modules)
        for name, module in transformer.named_modules():
            if pattern.fullmatch(name) and isinstance(module, nn.Linear):
                weight = module.weight
                a, b = weight.new_zeros((0, 0, module.in_features)), weight.new_zeros((0, 0, module.out_features))
                site = self._sites[name] = _Site(a, b)
                module.register_forward_hook(partial(self._add, site))
        if not self._sites:
            raise AdapterError(f"no linear layer matches {target_modules}", "correct lora.blocks")

    def check(self, lora: LoraWeights) -> None:
        """Raise AdapterError when a module of `lora` is not one of those that are adapted here."""
        foreign = sorted(lora.tensors.keys() - self._sites.keys())
        if foreign:
            raise AdapterError(f"{foreign[0]} is not adapted by this endpoint's recipe", "correct lora.blocks")

    @torch.no_grad()
    def set_rows(self, rows: Sequence[LoraWeights | None]) -> None:
        """Set the LoRA of each row of the forwards to come; None: that row is the base model.

        Raises:
            AdapterError: a LoRA adapts modules that are not adapted here; the rows are as before.
        """
        for lora in rows:
            if lora is not None:
                self.check(lora)
        # One LoRA for all rows needs no batched product, and only one copy.
        self._shared = len({_key(lora) for lora in rows}) == 1
        self._rows = len(rows)
        needed = rows[:1] if self._shared else rows
        swaps = 0
        for name, site in self._sites.items():
            ranks = [len(lora.tensors[name][0]) for lora in needed if lora and name in lora.tensors]
            site.rank = max([*ranks, site.a.shape[1] if self._keep_ranks else 0])
            if site.rank:
                swaps = max(swaps, _fill(site, name, needed))
        self.swaps += swaps

    def _add(self, site: _Site, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output (B, N, out) with each row's LoRA added, in place: nobody else has it yet."""
        rank, x = site.rank, inputs[0]
        if not rank:
            return output
        if len(x) != self._rows:
            raise ValueError(f"set_rows was called for {self._rows} rows, not {len(x)}")
        if self._shared:
            low = x.flatten(0, -2) @ site.a[0, :rank].T
            output.view(-1, output.shape[-1]).addmm_(low, site.b[0, :rank])
            return output
        low = torch.bmm(x, site.a[: self._rows, :rank].transpose(1, 2))
        return output.baddbmm_(low, site.b[: self._rows, :rank])


def _key(lora: LoraWeights | None) -> tuple[object, float] | None:
    return None if lora is None else (lora.source, lora.scale)


def _fill(site: _Site, name: str, rows: Sequence[LoraWeights | None]) -> int:
    """Copy what the rows need and the buffers do not hold yet; returns how many rows that were."""
    copied = 0
    if len(rows) > len(site.held) or site.rank > site.a.shape[1]:
        size = (max(len(rows), len(site.held)), max(site.rank, site.a.shape[1]))
        with torch.inference_mode(False):  # or they could be written in inference mode only
            site.a = site.a.new_zeros((*size, site.a.shape[2]))
            site.b = site.b.new_zeros((*size, site.b.shape[2]))
        site.held = [None] * size[0]
    for row, lora in enumerate(rows):
        held, site.held[row] = site.held[row], _key(lora)
        if site.held[row] == held:
            continue
        copied += 1
        rank = 0
        if lora is not None and name in lora.tensors:
            a, b = lora.tensors[name]
            rank = len(a)
            site.a[row, :rank] = a
            torch.mul(b.T, lora.scale, out=site.b[row, :rank])
        # Both halves: zero times what was left of a broken LoRA would not be zero.
        site.a[row, rank:] = 0
        site.b[row, rank:] = 0
    return copied
