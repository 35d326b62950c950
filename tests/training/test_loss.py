"""The loss against an independent statement of the mathematics, by value and by gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magicid.training.loss import hpo_loss, hpo_loss_from_errors, velocity_error

SHAPE = (5, 3, 2, 4, 4)


def straightforward(pw: Tensor, pl: Tensor, rw: Tensor, rl: Tensor, tw: Tensor, tl: Tensor, beta: float) -> Tensor:
    """The derived objective, pair by pair and value by value, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(pw)):
        errors = []
        for prediction, target in ((pw, tw), (rw, tw), (pl, tl), (rl, tl)):
            difference = prediction[b].double() - target[b].double()
            errors.append((difference * difference).sum() / difference.numel())
        z = (errors[0] - errors[1]) - (errors[2] - errors[3])
        total = total - torch.log(1 / (1 + torch.exp(0.5 * beta * z)))
    return total / len(pw)


def six(seed: int, spread: float = 1.0) -> list[Tensor]:
    torch.manual_seed(seed)
    tensors = [spread * torch.randn(SHAPE) for _ in range(6)]
    for tensor in tensors[:2]:
        tensor.requires_grad_(True)
    return tensors


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.5, 5.0, 40.0])
def test_equals_the_straightforward_loss_in_value_and_gradient(seed: int, beta: float) -> None:
    tensors = six(seed)
    loss = hpo_loss(*tensors, beta=beta).loss
    expected = straightforward(*tensors, beta=beta)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6, rel=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(loss, tensors[:2], retain_graph=True), torch.autograd.grad(expected, tensors[:2])
    ):
        assert torch.allclose(mine, theirs.float(), atol=1e-6, rtol=1e-5)


def test_by_hand() -> None:
    """Errors 1 and 4 against reference errors 2 and 3: z = -1 - 1 = -2, inside = 0.5 * 3 * 2 = 3."""
    one = torch.ones(1, 1, 1, 1, 1)
    result = hpo_loss(one, 2 * one, math.sqrt(2) * one, math.sqrt(3) * one, 0 * one, 0 * one, beta=3.0)
    assert float(result.inside) == pytest.approx(3.0, abs=1e-5)
    assert float(result.loss) == pytest.approx(math.log(1 + math.exp(-3)), abs=1e-6)
    assert float(result.gradient_factor) == pytest.approx(1 / (1 + math.exp(3)), abs=1e-6)
    assert result.accuracy.tolist() == [1.0]
    errors = (result.policy_winner, result.policy_loser, result.reference_winner, result.reference_loser)
    assert [round(float(e.detach()), 5) for e in errors] == [1.0, 4.0, 2.0, 3.0]


def test_is_exactly_ln_2_where_policy_is_the_reference() -> None:
    pw, pl, _, _, tw, tl = six(0)
    result = hpo_loss(pw, pl, pw.detach(), pl.detach(), tw, tl, beta=2000.0)
    assert float(result.loss.detach()) == float(torch.tensor(2.0).log())
    assert result.inside.tolist() == [0.0] * 5
    assert result.gradient_factor.tolist() == [0.5] * 5


def test_gradient_is_the_derived_factor() -> None:
    """d loss / d e_w = 0.5 beta sigma(-inside) / B, and the opposite for the loser."""
    beta = 7.0
    errors = [torch.rand(4, requires_grad=True) for _ in range(2)]
    result = hpo_loss_from_errors(*errors, torch.rand(4), torch.rand(4), beta=beta)
    winner, loser = torch.autograd.grad(result.loss, errors)
    factor = 0.5 * beta * result.gradient_factor / 4
    assert torch.allclose(winner, factor, atol=1e-6)
    assert torch.allclose(loser, -factor, atol=1e-6)


def test_wrong_pairs_weigh_more() -> None:
    zero = torch.zeros(2)
    result = hpo_loss_from_errors(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]), zero, zero, beta=5.0)
    assert result.accuracy.tolist() == [1.0, 0.0]
    assert result.gradient_factor[1] > 0.99
    assert result.gradient_factor[0] < 0.01


def test_a_step_moves_toward_the_winner_relative_to_the_loser() -> None:
    tensors = six(3)
    before = hpo_loss(*tensors, beta=5.0)
    gradients = torch.autograd.grad(before.loss, tensors[:2])
    moved = [(t - 0.5 * g).detach() for t, g in zip(tensors[:2], gradients)]
    after = hpo_loss(*moved, *tensors[2:], beta=5.0)
    assert bool((after.inside > before.inside).all())
    assert bool((after.policy_winner < before.policy_winner).all())
    assert bool((after.policy_loser > before.policy_loser).all())


def test_large_margins_neither_overflow_nor_vanish() -> None:
    winner = torch.tensor([1e4, 0.0], requires_grad=True)
    result = hpo_loss_from_errors(winner, torch.tensor([0.0, 1e4]), torch.zeros(2), torch.zeros(2), beta=5000.0)
    assert float(result.per_pair[0].detach()) == pytest.approx(0.5 * 5000 * 1e4)
    assert bool(torch.isfinite(torch.autograd.grad(result.loss, winner)[0]).all())


def test_the_reference_gets_no_gradient() -> None:
    tensors = six(1)
    tensors[2].requires_grad_(True)
    assert torch.autograd.grad(hpo_loss(*tensors, beta=5.0).loss, tensors[2], allow_unused=True) == (None,)


def test_error_is_the_mean_in_float32() -> None:
    prediction = torch.full((2, 4, 3, 8, 8), 1.5, dtype=torch.bfloat16)
    error = velocity_error(prediction, torch.zeros_like(prediction))
    assert error.dtype == torch.float32
    assert error.tolist() == [2.25, 2.25]
