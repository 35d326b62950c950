"""The update of the LoRA, behind one small interface: plain torch here, DeepSpeed in `deepspeed_engine`.

An engine is made once per worker group and serves many identities, SFT and HPO alike: `reset` swaps the LoRA and the
optimizer's state, the base model stays where it is.

Gradients are taken of the LoRA only, per worker, into a float32 buffer of the LoRA's size (tens of megabytes); workers
meet once per step. So the number of backward passes in a step is free, each pair's gradient can be weighted after it
is known, and nothing reaches the optimizer before every worker has seen finite losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from magicid import recipe
from magicid.errors import TrainingError
from magicid.training import lora
from magicid.training.lora import POLICY, REFERENCE, LoraState

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class AdamState:
    """AdamW's state: steps taken and both moments, by LoRA tensor name, float32 on the CPU."""

    step: int
    exp_avg: LoraState
    exp_avg_sq: LoraState

    @classmethod
    def zero(cls, lora_state: LoraState) -> AdamState:
        """The state before the first step."""
        zeros = {name: torch.zeros_like(tensor) for name, tensor in lora_state.items()}
        return cls(0, zeros, {name: tensor.clone() for name, tensor in zeros.items()})


class Engine:
    """Plain torch: AdamW over the policy LoRA, gradients averaged over the workers of the default process group.

    Every method is called by all workers alike. `gradients`, `accumulate` and `backward` communicate nothing (but the
    parameter gathering of ZeRO-3), `step` does.
    """

    def __init__(self, transformer: nn.Module, *, precision: Literal["float32", "bfloat16"], device: torch.device):
        """Take a transformer with both adapters attached (`lora.attach`). See `create_engine`."""
        self.transformer = transformer
        self.device = device
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self._precision = precision
        self._policy = lora.parameters(transformer, POLICY)
        self._reference = lora.parameters(transformer, REFERENCE)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._policy.items()}
        self._sum: list[Tensor] | None = None
        self._max_grad_norm = 1.0
        self._optimizer = torch.optim.AdamW(list(self._policy.values()), lr=0.0, betas=BETAS, eps=EPSILON)
        self._build()

    def _build(self) -> None:
        """Place the model and prepare the optimizer."""
        self.transformer.to(self.device)
        self._warm_up()

    # --- forward -----------------------------------------------------------------------------------------------

    def use(self, adapter: lora.AdapterName) -> None:
        """Make one adapter active; gradients stay on for the policy and off for the reference."""
        lora.activate(self.transformer, adapter)

    def autocast(self) -> AbstractContextManager[Any]:
        """The recipe's arithmetic: bfloat16 autocast over float32 LoRA, or float32."""
        if self._precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    # --- gradients ---------------------------------------------------------------------------------------------

    def gradients(self, value: Tensor) -> list[Tensor]:
        """Gradient of a scalar by each LoRA tensor, in this worker only; the graph is freed."""
        found = torch.autograd.grad(value, list(self._policy.values()), allow_unused=True)
        shapes = self.shapes.values()
        return [
            torch.zeros(shape, device=self.device) if gradient is None else gradient.float()
            for gradient, shape in zip(found, shapes)
        ]

    def accumulate(self, gradients: Sequence[Tensor], weight: float = 1.0) -> None:
        """Add weighted gradients to this worker's sum; `step` takes the mean of the sums over the workers."""
        if self._sum is None:
            self._sum = [gradient * weight for gradient in gradients]
        else:
            for total, gradient in zip(self._sum, gradients):
                total.add_(gradient, alpha=weight)

    def backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Add the gradient of a scalar loss to this worker's sum."""
        self.accumulate(self.gradients(loss), weight)

    def discard(self) -> None:
        """Forget the gradients of the step."""
        self._sum = None

    def finite(self) -> bool:
        """Whether all gradients of this worker are finite."""
        return all(bool(torch.isfinite(total).all()) for total in self._sum or [])

    # --- update ------------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Average over workers, clip, update; returns the gradient norm before clipping."""
        if self._sum is None:
            raise TrainingError("a step without gradients", "call backward first")
        gradients, self._sum = self._sum, None
        return self._update(gradients)

    def _update(self, gradients: list[Tensor]) -> float:
        if self.world_size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self.world_size
            parts = flat.split([gradient.numel() for gradient in gradients])
            gradients = [part.view_as(gradient) for part, gradient in zip(parts, gradients)]
        for parameter, gradient in zip(self._policy.values(), gradients):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(list(self._policy.values()), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def reset(
        self,
        lora_state: LoraState | None,
        adam_state: AdamState | None = None,
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Start on another identity or stage, with nothing left of the one before.

        Args:
            lora_state: the policy; None is a fresh LoRA drawn from `seed`.
            adam_state: None starts AdamW anew.
            max_grad_norm: gradients are clipped to this global norm.

        Raises:
            TrainingError: the tensors are not those of this LoRA.
        """
        self.discard()
        state = lora_state if lora_state is not None else lora.initial_state(self.shapes, seed)
        self._check(state)
        self._max_grad_norm = max_grad_norm
        self._write_policy(state)
        self._write_adam(adam_state or AdamState.zero(state))
        self._set_hyperparameters(learning_rate, weight_decay)
        self.use(POLICY)

    def lora_state(self) -> LoraState:
        """The policy, the same on any number of workers."""
        return {name: parameter.detach().cpu().float().clone() for name, parameter in self._policy.items()}

    def adam_state(self) -> AdamState:
        """AdamW's state, the same on any number of workers."""
        states = {name: self._optimizer.state[parameter] for name, parameter in self._policy.items()}
        step = int(next(iter(states.values()))["step"])
        moments = [
            {name: state[key].detach().cpu().clone() for name, state in states.items()}
            for key in ("exp_avg", "exp_avg_sq")
        ]
        return AdamState(step, *moments)

    def set_reference(self, lora_state: LoraState) -> None:
        """Copy LoRA tensors into the frozen reference adapter."""
        self._check(lora_state)
        with torch.no_grad():
            for name, parameter in self._reference.items():
                parameter.copy_(lora_state[name])

    def _write_policy(self, state: LoraState) -> None:
        with torch.no_grad():
            for name, parameter in self._policy.items():
                parameter.copy_(state[name])

    def _write_adam(self, adam: AdamState) -> None:
        for name, parameter in self._policy.items():
            state = self._optimizer.state[parameter]
            state["step"].fill_(adam.step)
            state["exp_avg"].copy_(adam.exp_avg[name])
            state["exp_avg_sq"].copy_(adam.exp_avg_sq[name])

    def _set_hyperparameters(self, learning_rate: float, weight_decay: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"], group["weight_decay"] = learning_rate, weight_decay

    def _warm_up(self) -> None:
        """One step of zero gradient and zero learning rate: it changes nothing, and AdamW's state exists after it."""
        self._set_hyperparameters(0.0, 0.0)
        self._update([torch.zeros(shape, device=self.device) for shape in self.shapes.values()])

    def _check(self, state: LoraState) -> None:
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != self.shapes:
            names = sorted(set(found.items()) ^ set(self.shapes.items()))
            raise TrainingError(
                f"LoRA tensors do not fit this model: {names[0][0]} and {len(names) - 1} more differ",
                "use the rank, blocks and base model it was trained with",
            )

    # --- workers -----------------------------------------------------------------------------------------------

    def sum_over_workers(self, values: Tensor) -> Tensor:
        """Element-wise sum over all workers, on the CPU."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def gather(self, value: Any) -> list[Any]:
        """A small Python value of every worker, in rank order, known to all."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first worker's Python value, on all."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def create_engine(
    transformer: nn.Module,
    target_modules: list[str] | str,
    lora_settings: recipe.Lora,
    trainer: recipe.Trainer,
    *,
    kind: Literal["deepspeed", "torch"] = "deepspeed",
    device: torch.device | str | None = None,
) -> Engine:
    """Attach both adapters and make the engine of a worker group; once per process, before the first identity.

    With several workers the default process group must exist (Ray Train makes it; `gloo` on CPUs, `nccl` on GPUs).

    Args:
        transformer: of the backbone, as loaded.
        target_modules: `backbone.lora_target_modules()`.
        device: default: this process's current CUDA device, or the CPU.
    """
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    lora.attach(transformer, target_modules, lora_settings.rank, lora_settings.alpha)
    transformer.train(False)  # no dropout: winner, loser and reference must see the same network
    if trainer.gradient_checkpointing:
        # Not reentrant: reentrant checkpointing of frozen inputs gives the LoRA no gradient. The check of shapes is off
        # because under ZeRO-3 a saved parameter is empty until it is gathered again.
        transformer.enable_gradient_checkpointing(  # type: ignore[operator]
            partial(checkpoint, use_reentrant=False, determinism_check="none")
        )
    if kind == "torch":
        return Engine(transformer, precision=trainer.precision, device=torch.device(device))
    from magicid.training.deepspeed_engine import DeepSpeedEngine  # importing DeepSpeed takes seconds

    return DeepSpeedEngine(
        transformer, zero_stage=trainer.zero_stage, precision=trainer.precision, device=torch.device(device)
    )
