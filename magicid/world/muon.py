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
    """Roughly U V^T of ``matrix`` (M, N) = U S V^T, by the quintic Newton-Schulz iteration of the Muon reference.

    In bfloat16, as in the reference: the iteration is rough by design, and this is several times as fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrix.dtype)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if group["weight_decay"]:
                        parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._muon if group["orthogonal"] else self._adam)(parameter, parameter.grad, group)

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        parameter.add_(orthogonalised(update).view_as(parameter), alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].lerp_(gradient.square(), 1 - second)
        count = float(state["step"])
        size = (state["square"] / (1 - second**count)).sqrt_().add_(1e-8)
        parameter.addcdiv_(state["mean"], size, value=-group["lr"] / (1 - first**count))


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
