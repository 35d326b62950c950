"""One small training loop for every model of the face world.

A loop is resumable: its whole state (weights, moving average, optimizer moments, step) is written as safetensors and
JSON into a folder that appears by one rename, so a checkpoint that exists is complete. Every step draws its numbers
from (seed, step) alone, so a resumed run sees the batches that an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

StepFunction = Callable[[int, np.random.Generator], Mapping[str, Tensor]]


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA where there is one and the CPU otherwise."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device | str, enabled: bool = True) -> AbstractContextManager[Any]:
    """bfloat16 autocast for ``device``: three to four times as fast as float32; not on CPUs that only emulate it."""
    kind = torch.device(device).type
    native = kind != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=enabled and native)


def warmup_cosine(step: int, steps: int, *, warmup: int = 100, final: float = 0.02) -> float:
    """Learning-rate factor in 0..1 at ``step`` of ``steps``: linear warm-up, then half a cosine down to ``final``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class Ema:
    """Exponential moving average of a module's floating-point state, kept in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().float().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model``; the decay ramps up over the first steps so that the random start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = model.state_dict()
        floating = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.shadow[k] for k in floating], [state[k].float() for k in floating], 1 - decay)
        for key in state.keys() - floating:
            self.shadow[key] = state[key].detach().clone()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the state of ``model`` with the average."""
        model.load_state_dict({k: self.shadow[k].to(v.dtype) for k, v in model.state_dict().items()})

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Lend the average to ``model`` inside the ``with`` block, and give its own weights back afterwards."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.copy_to(model)
        try:
            yield
        finally:
            model.load_state_dict(own)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target`` that takes its place when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, info: dict[str, Any]
) -> Path:
    """Write ``folder/step-NNNNNNNN`` atomically, then drop older checkpoints. ``info`` must be JSON."""
    target = folder / f"step-{step:08d}"
    with written_whole(target) as temporary:
        parts: dict[str, Mapping[str, Tensor]] = {"model": model.state_dict()}
        parts["optimizer"] = _optimizer_tensors(optimizer)
        if ema is not None:
            parts["ema"] = ema.shadow
        for name, tensors in parts.items():
            cpu = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            save_file(cpu, str(temporary / f"{name}.safetensors"))
        (temporary / "state.json").write_text(json.dumps({"step": step, **info}))
    for other in folder.glob("step-*"):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step under ``folder``, or None."""
    found = sorted(folder.glob("step-*/state.json"))
    return found[-1].parent if found else None


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, ema: Ema | None = None
) -> dict[str, Any] | None:
    """Load the newest checkpoint under ``folder`` in place; return its JSON state (with ``step``), or None."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return None
    model.load_state_dict(load_file(str(checkpoint / "model.safetensors")))
    if optimizer is not None:
        _load_optimizer(optimizer, load_file(str(checkpoint / "optimizer.safetensors")))
    if ema is not None and (checkpoint / "ema.safetensors").exists():
        device = next(model.parameters()).device
        ema.shadow = {k: v.to(device) for k, v in load_file(str(checkpoint / "ema.safetensors")).items()}
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


class _Report:
    """A rich progress bar on a terminal, one plain line now and then elsewhere."""

    def __init__(self, name: str, step: int, steps: int) -> None:
        self.name, self.steps, self.start, self.began = name, steps, step, time.monotonic()
        self.sums: dict[str, list[Tensor]] = {}
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            text = TextColumn("{task.fields[text]}")
            self.bar = Progress(TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
            self.bar.start()
            self.task = self.bar.add_task(name, total=steps, completed=step, text="")

    def step(self, step: int, values: Mapping[str, Tensor], flush: bool) -> None:
        """Take the values of a step. They are read, and checked, on ``flush`` only: reading one waits for a GPU."""
        for key, value in values.items():
            self.sums.setdefault(key, []).append(value.detach())
        if self.bar is not None:
            self.bar.update(self.task, completed=step)
        if flush:
            means = {key: float(torch.stack(v).float().mean()) for key, v in self.sums.items()}
            self.sums.clear()
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(f"{self.name}: the loss is {means['loss']} at or before step {step}")
            text = " ".join(f"{key} {value:.4g}" for key, value in means.items())
            if self.bar is not None:
                self.bar.update(self.task, text=text)
            else:
                pace = (time.monotonic() - self.began) / max(1, step - self.start)
                left = pace * (self.steps - step) / 60
                line = f"{self.name} {step}/{self.steps} {text} {pace * 1e3:.0f} ms/step {left:.1f} min left"
                print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def train_loop(
    name: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step_function: StepFunction,
    *,
    steps: int,
    folder: Path,
    seed: int = 0,
    schedule: Callable[[int, int], float] = warmup_cosine,
    ema: Ema | None = None,
    clip_norm: float = 1.0,
    log_every: int = 50,
    save_seconds: float = 120.0,
    after_save: Callable[[int], None] | None = None,
    seconds: float | None = None,
) -> int:
    """Train ``model`` up to ``steps`` optimizer steps in all, from the newest checkpoint in ``folder`` if there is one.

    ``step_function(step, rng)`` returns scalars by name and must include ``loss``, which is minimised; autocast is its
    own affair. ``schedule(step, steps)`` scales the learning rates that the optimizer was made with, and
    ``after_save(step)`` runs after every checkpoint (every ``save_seconds`` and at the end). With ``seconds`` the loop
    ends after that time at the latest, and the schedule runs by the clock where that is ahead of the steps. Returns the
    number of steps done by this call.
    Raises FloatingPointError when the loss is not finite; the last good checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = load_checkpoint(folder, model, optimizer, ema)
    first = int(state["step"]) if state else 0
    report = _Report(name, first, steps)
    began = saved = time.monotonic()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    done = first
    try:
        for step in range(first, steps):
            torch.manual_seed((seed << 32) + step)
            clock = step
            if seconds is not None:
                clock = max(step, min(steps - 1, int(steps * (time.monotonic() - began) / seconds)))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * schedule(clock, steps)
            values = step_function(step, np.random.default_rng([seed, step]))
            optimizer.zero_grad(set_to_none=True)
            values["loss"].backward()
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            if ema is not None:
                ema.update(model, step)
            done = step + 1
            last = done == steps or clock >= steps - 1
            save = last or time.monotonic() - saved > save_seconds
            report.step(done, values, flush=save or done % log_every == 0)
            if save:
                save_checkpoint(folder, done, model, optimizer, ema, {"name": name, "steps": steps, "seed": seed})
                if after_save is not None:
                    after_save(done)
                saved = time.monotonic()
            if last:
                break
    finally:
        report.close()
    return done - first
