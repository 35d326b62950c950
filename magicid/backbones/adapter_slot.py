"""One LoRA at a time on a diffusers transformer, for sampling: load, swap by copying, switch off."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from magicid.errors import AdapterError

_PREFIX = "transformer."


def load(transformer: Any, lora_state: dict[str, Tensor] | None, name: str, alpha: float) -> None:
    """Make `lora_state` the only active adapter of a diffusers transformer; None switches all adapters off.

    Args:
        lora_state: published names, `transformer.<module>.lora_A.weight` (r, in) and `lora_B.weight` (out, r).
        name: the PEFT adapter to fill; made when it is not there, replaced when its modules or rank differ.
        alpha: the LoRA's scale is alpha / r.

    Raises:
        AdapterError: a module is not in this transformer, a tensor has another shape, or a half of a LoRA is missing.
    """
    if lora_state is None:
        if getattr(transformer, "peft_config", None):
            transformer.disable_adapters()
        return
    rank = check(transformer, lora_state)
    held = _parameters(transformer, name)
    same_alpha = held and transformer.peft_config[name].lora_alpha == alpha
    if same_alpha and {key: p.shape for key, p in held.items()} == {key: t.shape for key, t in lora_state.items()}:
        with torch.no_grad():
            for key, parameter in held.items():
                parameter.copy_(lora_state[key])
    else:
        if held:
            transformer.delete_adapters(name)
        modules = sorted({module_name(key) for key in lora_state})
        config = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
        transformer.load_lora_adapter(
            dict(lora_state), adapter_name=name, metadata={f"{_PREFIX}{key}": value for key, value in config.items()}
        )
    transformer.set_adapter(name)
    transformer.enable_adapters()
    for parameter in _parameters(transformer, name).values():
        parameter.requires_grad_(False)


def module_name(key: str) -> str:
    """The module that a published tensor adapts."""
    return key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0]


def _parameters(transformer: Any, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by published name."""
    found = {}
    for path, module in transformer.named_modules():
        if isinstance(module, BaseTunerLayer):
            for half in ("lora_A", "lora_B"):
                layers = getattr(module, half)
                if name in layers:
                    found[f"{_PREFIX}{path}.{half}.weight"] = layers[name].weight
    return found


def check(transformer: Any, lora_state: dict[str, Tensor]) -> int:
    """The rank of a LoRA, in published names, that fits a transformer. Raises AdapterError when it does not."""
    action = "use an adapter of this base model, as `magicid.adapters.load` reads it"
    modules = dict(transformer.named_modules())
    ranks = set()
    for key, tensor in lora_state.items():
        module = modules.get(module_name(key))
        half = key.rsplit(".lora_", 1)[-1]
        if not key.startswith(_PREFIX) or half not in ("A.weight", "B.weight") or not hasattr(module, "weight"):
            raise AdapterError(f"{key} is not a LoRA tensor of this transformer", action)
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise AdapterError(f"{key} {tuple(tensor.shape)} is not a matrix with rows and columns", action)
        weight = module.weight  # type: ignore[union-attr]
        rank, width = tensor.shape if half == "A.weight" else tensor.shape[::-1]
        if width != weight.shape[1 if half == "A.weight" else 0]:
            raise AdapterError(f"{key} {tuple(tensor.shape)} does not fit a weight {tuple(weight.shape)}", action)
        ranks.add(rank)
    halves = {
        module_name(key): sum(module_name(other) == module_name(key) for other in lora_state) for key in lora_state
    }
    if not lora_state or len(ranks) != 1 or set(halves.values()) != {2}:
        raise AdapterError(f"the adapter's LoRA is incomplete, or of several ranks {sorted(ranks)}", action)
    return int(ranks.pop())
