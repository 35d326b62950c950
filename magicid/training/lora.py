"""Two LoRA adapters on one base transformer: "policy" learns, "reference" is the frozen copy of the SFT result.

Keeping the reference as an adapter costs tens of megabytes instead of a second model. Tensors are named as PEFT names
them without the adapter, `transformer_blocks.0.attn.to_q.lora_A.weight`.
"""

from __future__ import annotations

import math
import warnings
from typing import Final, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from magicid.errors import TrainingError
from magicid.storage import sha256_bytes, sha256_json
from magicid.training.pairs import generator

AdapterName = Literal["policy", "reference"]

POLICY: Final = "policy"
REFERENCE: Final = "reference"

LoraState = dict[str, Tensor]  # name -> float32 CPU tensor


def attach(transformer: nn.Module, target_modules: list[str] | str, rank: int, alpha: float) -> None:
    """Freeze the base and add both adapters, float32, the policy active. A second call changes nothing.

    Raises:
        TrainingError: no module matches `target_modules`.
    """
    transformer.requires_grad_(False)
    if POLICY not in getattr(transformer, "peft_config", {}):
        for name in (POLICY, REFERENCE):
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, init_lora_weights=True)  # type: ignore[arg-type]
            try:
                with warnings.catch_warnings():  # PEFT warns of a second adapter, which is the point here
                    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                    inject_adapter_in_model(config, transformer, name)
            except ValueError as error:
                raise TrainingError(f"no LoRA can be attached: {error}", "correct lora.blocks") from error
    for name in (POLICY, REFERENCE):
        for parameter in parameters(transformer, name).values():
            # Updates of 1e-5 vanish in bfloat16; the base keeps its own dtype.
            parameter.data = parameter.data.float()
    activate(transformer, POLICY)


def parameters(transformer: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by name, in a fixed order."""
    found = {}
    for name, parameter in transformer.named_parameters():
        parts = name.split(".")
        if adapter in parts and any(part.startswith("lora_") for part in parts):
            found[".".join(part for part in parts if part != adapter)] = parameter
    return dict(sorted(found.items()))


def activate(transformer: nn.Module, adapter: AdapterName) -> None:
    """Make one adapter the only active one. Gradients stay as they must be: the policy's on, all others off.

    PEFT's own switch turns gradients on for whatever it activates, also for the reference, and off for the policy.
    """
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter)
    for parameter in parameters(transformer, POLICY).values():
        parameter.requires_grad_(True)
    for parameter in parameters(transformer, REFERENCE).values():
        parameter.requires_grad_(False)


def initial_state(shapes: dict[str, tuple[int, ...]], seed: int) -> LoraState:
    """A fresh LoRA: A uniform as PEFT draws it (Kaiming, a = sqrt 5), B zero, so that the model starts unchanged."""
    state = {}
    for name, shape in shapes.items():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
            state[name] = (torch.rand(shape, generator=generator(seed, "lora", name)) * 2 - 1) * bound
        else:
            state[name] = torch.zeros(shape)
    return state


def state_sha256(state: LoraState) -> str:
    """Content hash of LoRA tensors: names, shapes and float32 values."""
    return sha256_json(
        {
            name: [list(tensor.shape), sha256_bytes(tensor.detach().cpu().float().contiguous().numpy().tobytes())]
            for name, tensor in state.items()
        }
    )
