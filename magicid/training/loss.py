"""The preference loss of Hybrid Preference Optimization.

MagicID prints its objective (equations 9 and 27) as E[beta log sigma(+z)] with

    z = (e_w - e_w_ref) - (e_l - e_l_ref),      e = squared error of the predicted velocity.

That cannot be meant literally: minimised, it has no lower bound, and its slope is largest on pairs that are already in
the right order. Its own derivation (equations 5 to 8, as in Diffusion-DPO) gives

    loss = -log sigma(inside),      inside = -0.5 beta z,

which is implemented here: beta stands inside the sigmoid, and a pair in the wrong order gets the larger weight
sigma(-inside). The paper's norm is a sum over millions of latent values, which saturates the sigmoid at once; as in
every public implementation e is the *mean* over C, F, H, W in float32, with a large beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class HpoLoss:
    """The loss and what to watch. All but `loss` are per pair, (B,), float32; only `loss`, `per_pair` and the
    policy's errors carry a gradient.

    Attributes:
        loss: scalar, mean over pairs of -log sigma(inside); exactly ln 2 where policy and reference agree.
        per_pair: the same before the mean, (B,).
        inside: -0.5 beta z; positive where the policy prefers the winner more than the reference does.
        accuracy: 1 where inside > 0, else 0.
        gradient_factor: sigma(-inside), the weight of the pair in the gradient, 0..1.
        policy_winner, policy_loser, reference_winner, reference_loser: the four errors, mean squared velocity error.
    """

    loss: Tensor
    per_pair: Tensor
    inside: Tensor
    accuracy: Tensor
    gradient_factor: Tensor
    policy_winner: Tensor
    policy_loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor


def velocity_error(prediction_BCFHW: Tensor, target_BCFHW: Tensor) -> Tensor:
    """Squared error of a velocity, mean over C, F, H, W in float32: (B, C, F, H, W) twice -> (B,)."""
    return (prediction_BCFHW.float() - target_BCFHW.float()).square().flatten(1).mean(1)


def hpo_loss(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    target_winner: Tensor,
    target_loser: Tensor,
    *,
    beta: float,
) -> HpoLoss:
    """The HPO loss of B pairs from predicted and target velocities, all (B, C, F, H, W).

    The reference is taken as constant. Source: MagicID equations 5 to 8; see the head of this module for why equations
    9 and 27 are not taken as printed.

    Args:
        beta: strength of the tie to the reference, for errors that are means; the gradient of one pair is
            0.5 beta sigma(-inside) (d e_w - d e_l).
    """
    return hpo_loss_from_errors(
        velocity_error(policy_winner, target_winner),
        velocity_error(policy_loser, target_loser),
        velocity_error(reference_winner, target_winner),
        velocity_error(reference_loser, target_loser),
        beta=beta,
    )


def hpo_loss_from_errors(
    policy_winner: Tensor, policy_loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, *, beta: float
) -> HpoLoss:
    """The HPO loss of B pairs from the four errors of `velocity_error`, each (B,); kept reference errors enter here."""
    reference_winner, reference_loser = reference_winner.detach(), reference_loser.detach()
    inside = -0.5 * beta * ((policy_winner - reference_winner) - (policy_loser - reference_loser))
    per_pair = F.softplus(-inside)  # -log sigma(x) = softplus(-x), without overflow
    inside = inside.detach()
    return HpoLoss(
        loss=per_pair.mean(),
        per_pair=per_pair,
        inside=inside,
        accuracy=(inside > 0).float(),
        gradient_factor=torch.sigmoid(-inside),
        policy_winner=policy_winner,
        policy_loser=policy_loser,
        reference_winner=reference_winner,
        reference_loser=reference_loser,
    )
