"""Many LoRAs on one frozen transformer: K adapters are trained, and sampled from, in one batch.

Row group k of a batch, of the same size for every k, passes through adapter k. Each adapter has its own learning rate,
clipping and AdamW state, so that it learns what it would learn alone (to rounding).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from magicid.training import lora
from magicid.training.engine import BETAS, EPSILON
from magicid.training.lora import LoraState

Stack = dict[str, Tensor]  # PEFT's tensor name -> (K, r, in) for A, (K, out, r) for B


class StackedLora:
    """Adds the LoRA of its group to each row of the linear layers that a pattern names.

    Args:
        transformer: frozen, without adapters of its own.
        target_modules: regular expression over whole module names.
        scale: alpha / rank.
    """

    def __init__(self, transformer: nn.Module, target_modules: str, *, rank: int, scale: float) -> None:
        self.scale = scale
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stack: Stack | None = None
        pattern = re.compile(target_modules)
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear) and pattern.fullmatch(name):
                self.shapes[f"{name}.lora_A.weight"] = (rank, module.in_features)
                self.shapes[f"{name}.lora_B.weight"] = (module.out_features, rank)
                module.register_forward_hook(partial(self._add, name))

    @contextmanager
    def active(self, stack: Stack | None) -> Iterator[None]:
        """Adapters of the forwards inside the block; None: the base model."""
        before, self._stack = self._stack, stack
        try:
            yield
        finally:
            self._stack = before

    def _add(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self._stack is None:
            return output
        a, b = self._stack[f"{name}.lora_A.weight"], self._stack[f"{name}.lora_B.weight"]
        count, x = len(a), inputs[0]
        grouped = x.reshape(count, -1, x.shape[-1])  # (K, rows * tokens, in)
        low = torch.bmm(grouped, a.mT)
        return output + self.scale * torch.bmm(low, b.mT).view_as(output)

    def initial(self, seeds: Sequence[int], device: torch.device) -> Stack:
        """Fresh adapters, each drawn from its seed as the trainer draws it."""
        return stack([lora.initial_state(self.shapes, seed) for seed in seeds], device)


def stack(states: Sequence[LoraState], device: torch.device) -> Stack:
    """Single adapters as one stack."""
    return {name: torch.stack([state[name] for state in states]).to(device) for name in states[0]}


def take(stack: Stack, rows: Sequence[int]) -> Stack:
    """A copy of some adapters, in this order, repeats allowed."""
    index = torch.tensor(list(rows))
    return {name: tensor.detach()[index.to(tensor.device)].clone() for name, tensor in stack.items()}


class Population:
    """K adapters and their AdamW states. All arguments but the stack have one value for each adapter.

    Args:
        weights: where training starts; taken over, and changed in place.
        learning_rates, max_grad_norm: as in the trainer's engine.
    """

    def __init__(
        self,
        weights: Stack,
        learning_rates: Sequence[float],
        *,
        weight_decay: float,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.weights = {name: tensor.detach().requires_grad_(True) for name, tensor in weights.items()}
        self._parameters = list(self.weights.values())
        device = self._parameters[0].device
        self._rates = torch.tensor(learning_rates, dtype=torch.float32, device=device).view(-1, 1, 1)
        self._decay, self._most = weight_decay, max_grad_norm
        self._mean = [torch.zeros_like(p) for p in self._parameters]
        self._square = [torch.zeros_like(p) for p in self._parameters]
        self._steps = 0

    def __len__(self) -> int:
        return len(self._parameters[0])

    def step(self, loss: Tensor) -> Tensor:
        """Differentiate a sum of losses, each of one adapter, and update all; returns the gradient norms (K,)."""
        gradients: list[Any] = list(torch.autograd.grad(loss, self._parameters))
        squares = torch.stack([g.square().sum((1, 2)) for g in gradients]).sum(0)
        norms = squares.sqrt()
        factors = (self._most / (norms + 1e-6)).clamp(max=1.0).view(-1, 1, 1)  # as torch's clip_grad_norm_
        self._steps += 1
        first, second = BETAS
        with torch.no_grad():
            torch._foreach_mul_(gradients, [factors] * len(gradients))
            torch._foreach_lerp_(self._mean, gradients, 1 - first)
            torch._foreach_mul_(self._square, second)
            torch._foreach_addcmul_(self._square, gradients, gradients, 1 - second)
            below = torch._foreach_div(self._square, 1 - second**self._steps)
            torch._foreach_sqrt_(below)
            torch._foreach_add_(below, EPSILON)
            updates = torch._foreach_div(self._mean, below)
            torch._foreach_mul_(updates, [self._rates / (1 - first**self._steps)] * len(updates))
            torch._foreach_mul_(self._parameters, [1 - self._rates * self._decay] * len(updates))
            torch._foreach_sub_(self._parameters, updates)
        return norms.detach()

    def snapshot(self) -> Stack:
        """A copy of all adapters as they are."""
        return {name: tensor.detach().clone() for name, tensor in self.weights.items()}
