"""Muon: momentum made orthogonal, for weight matrices and convolutions; Adam for everything else.

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). An update has the same size in
every direction of a layer's input, so the small models of the face world learn in fewer steps than with AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Roughly U V^T of ``matrix`` (..., M, N) = U S V^T, by the quintic Newton-Schulz iteration of the Muon reference.

    On GPUs in bfloat16, as in the reference: the iteration is rough by design. Many CPUs are slower in it.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on groups with ``orthogonal=True``, Adam on the others.

    Args:
        groups: parameter groups, each a dict with ``params``, ``lr`` and ``orthogonal``; ``weight_decay`` is decoupled.
        momentum: of the orthogonal groups (Nesterov).
        betas: of the Adam groups.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; ``closure`` is not supported."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["orthogonal"] else self._adam)(parameters, group)

    def _moments(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = self._moments(parameters, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # one batched product for matrices of one shape
        for parameter, update in zip(parameters, updates):
            matrix = update.flatten(1)
            alike.setdefault(tuple(matrix.shape), []).append((parameter, matrix))
        for (rows, columns), pairs in alike.items():
            scale = max(1.0, rows / columns) ** 0.5
            made = orthogonalised(torch.stack([matrix for _, matrix in pairs])).unbind()
            shaped = [update.view_as(parameter) for (parameter, _), update in zip(pairs, made)]
            torch._foreach_add_([parameter for parameter, _ in pairs], shaped, alpha=-group["lr"] * scale)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        means, squares = self._moments(parameters, "mean"), self._moments(parameters, "square")
        for parameter in parameters:
            self.state[parameter]["step"] = self.state[parameter].get("step", torch.zeros(())) + 1
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - second)
        count = float(self.state[parameters[0]]["step"])  # all have had as many
        sizes = torch._foreach_div(squares, 1 - second**count)
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, 1e-8)
        torch._foreach_addcdiv_(parameters, means, sizes, value=-group["lr"] / (1 - first**count))


def make_muon(model: nn.Module, *, lr: float, adam_lr: float, adam: Callable[[str], bool] = lambda _: False) -> Muon:
    """Muon for the matrices and convolutions of ``model``; Adam for vectors and for the names that ``adam`` picks."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim < 2 or adam(name) else matrices).append(parameter)
    return Muon(
        [
            {"params": matrices, "lr": lr, "orthogonal": True},
            {"params": others, "lr": adam_lr, "orthogonal": False},
        ]
    )
