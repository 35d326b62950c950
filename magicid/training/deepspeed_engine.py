"""The DeepSpeed engine: ZeRO 0 to 3 around the same local gradients.

DeepSpeed gets one loss per step, sum(parameter * gradient) over the LoRA, whose gradient is the accumulated one; from
there reduction, partitioning, clipping and the update are its own. Under ZeRO 0, 1 and 2, where the frozen base is
whole on every worker anyway, it is given the LoRA alone, in float32, and never casts or walks the base. Under ZeRO-3 it
is given the transformer, whose parameters it partitions.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from magicid.training.engine import AdamState, Engine
from magicid.training.lora import LoraState

_MOMENTS = ("exp_avg", "exp_avg_sq")

# DeepSpeed's shared-memory all-reduce for CPUs is compiled at first use, which takes minutes and needs a C++ compiler;
# gloo does the same work here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class _Parameters(nn.Module):
    """The LoRA parameters alone."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(parameters)


class DeepSpeedEngine(Engine):
    """See `magicid.training.engine.Engine`."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        zero_stage: Literal[0, 1, 2, 3],
        precision: Literal["float32", "bfloat16"],
        device: torch.device,
    ) -> None:
        if not dist.is_initialized():  # one worker outside a launcher: DeepSpeed wants a process group all the same
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.zero_stage = zero_stage
        super().__init__(transformer, precision=precision, device=device)

    def _build(self) -> None:
        os.environ.setdefault("LOCAL_RANK", str(self.device.index or 0))
        model: nn.Module = self.transformer
        if self.zero_stage < 3:
            self.transformer.to(self.device)
            model = _Parameters(list(self._policy.values()))
        self._deepspeed: Any
        self._deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=self._config(), dist_init_required=False
        )
        self._warm_up()

    def _config(self) -> dict[str, Any]:
        largest = max(parameter.numel() for parameter in self._policy.values())
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "zero_optimization": {
                "stage": self.zero_stage,
                # LoRA tensors stay whole: they are read in every forward pass, and partitioning them saves nothing.
                "stage3_param_persistence_threshold": max(100_000, largest),
                "contiguous_gradients": False,
                "overlap_comm": False,
            },
        }

    def _update(self, gradients: list[Tensor]) -> float:
        parameters = list(self._policy.values())
        with self._gathered(parameters):
            loss = torch.stack([(p * g.to(p)).sum() for p, g in zip(parameters, gradients)]).sum()
            self._deepspeed.backward(loss)
        norm: Any = None
        if self.zero_stage == 0:  # reduced gradients lie in the parameters, and clipping returns no norm
            self._deepspeed._config.gradient_clipping = self._max_grad_norm
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
        else:
            self._deepspeed.optimizer.clip_grad = self._max_grad_norm
        self._deepspeed.step()
        if norm is None:
            norm = self._deepspeed.get_global_grad_norm()
        return float(norm)

    def _gathered(self, parameters: list[nn.Parameter], writer: int | None = None) -> Any:
        """Whole parameters inside the block under ZeRO-3; with a writer, what it wrote goes to all."""
        if self.zero_stage == 3:
            # A module whose inputs need no gradient is never told that its backward pass is over, and neither is any
            # after a step that was not taken: release what they still hold.
            self._deepspeed.optimizer.empty_partition_cache()
        return GatheredParameters(parameters, modifier_rank=writer, enabled=self.zero_stage == 3)

    def lora_state(self) -> LoraState:
        with self._gathered(list(self._policy.values())):
            return super().lora_state()

    def set_reference(self, lora_state: LoraState) -> None:
        with self._gathered(list(self._reference.values()), writer=0):
            super().set_reference(lora_state)

    def _write_policy(self, state: LoraState) -> None:
        with self._gathered(list(self._policy.values()), writer=0):
            super()._write_policy(state)
        if self.zero_stage > 0:  # the optimizer steps a float32 copy of its own
            for name, parameter in self._policy.items():
                safe_set_full_fp32_param(parameter, state[name].to(self.device))

    def adam_state(self) -> AdamState:
        if self.zero_stage == 0:
            return super().adam_state()
        moments = []
        for key in _MOMENTS:
            full = {name: safe_get_full_optimizer_state(p, key) for name, p in self._policy.items()}
            moments.append({n: t.detach().cpu().float().view(self.shapes[n]).clone() for n, t in full.items()})
        return AdamState(int(self._flat_states()[0]["step"]), *moments)

    def _write_adam(self, adam: AdamState) -> None:
        if self.zero_stage == 0:
            super()._write_adam(adam)
            return
        for key in _MOMENTS:
            for name, parameter in self._policy.items():
                safe_set_full_optimizer_state(parameter, getattr(adam, key)[name].to(self.device), key)
        for state in self._flat_states():
            state["step"].fill_(adam.step)

    def _flat_states(self) -> list[dict[str, Tensor]]:
        """AdamW's state of this worker's flat partitions."""
        return [state for state in self._optimizer.state.values() if "step" in state]
