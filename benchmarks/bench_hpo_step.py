"""One HPO step against a plain implementation on the same backbone: time, peak memory, equality of gradients.

Plain: a second, whole model as the reference and four forward passes (policy and reference on winner and loser).
magicid: the reference as a second adapter on the same base, its errors kept per (pair, draw), winner and loser in one
pass; or, short of memory, one after the other under activation checkpointing. Random weights, float32.

    python benchmarks/bench_hpo_step.py [--rounds 3] [--only large|world]

Times are medians of alternating steps in one process. Memory is the peak resident size of a process that runs one of
the two, measured with everything imported but no model, and above that.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from torch import Tensor

from magicid import recipe
from magicid.backbones.base import TextEmbeddings
from magicid.errors import BackboneError
from magicid.training import lora
from magicid.training.engine import Engine, create_engine
from magicid.training.hpo import load_batch, pair_gradients, reference_errors
from magicid.training.pairs import PairTensors, Visit, generator
from magicid.weights import resolve

TEXT_TOKENS = 16
SHIFT, GUIDANCE = 7.0, 6.0
PAPER_STEPS, PAPER_PAIRS = 5000, 200
GOALS = {"time": 0.7, "memory": 0.6}

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LARGE = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "num_layers": 5,
    "num_single_layers": 9,
    "num_refiner_layers": 1,
    "text_embed_dim": 256,
    "pooled_projection_dim": 64,
}


def build(model: str) -> tuple[HunyuanVideoTransformer3DModel, tuple[int, int, int, int], int]:
    """The random-weight transformer, the shape of its latents and the pairs in a step."""
    torch.manual_seed(0)
    if model == "large":
        return HunyuanVideoTransformer3DModel(**LARGE).eval(), (16, 3, 12, 12), 1
    config = HunyuanVideoTransformer3DModel.load_config(str(resolve("world:video") / "transformer"))
    transformer = HunyuanVideoTransformer3DModel.from_config(config).eval()
    sampling = recipe.load("face-world").sampling
    vae = AutoencoderKLHunyuanVideo.load_config(str(resolve("world:video") / "vae"))
    side = sampling.height // vae["spatial_compression_ratio"]
    shape = (transformer.config.in_channels, (sampling.frames - 1) // 4 + 1, side, side)
    return transformer, shape, recipe.load("face-world").hpo.batch_size


class Backbone:
    """What a training step needs of a backbone."""

    def __init__(self, transformer: HunyuanVideoTransformer3DModel) -> None:
        self.transformer = transformer

    def predict_velocity(self, latents: Tensor, sigma: Tensor, text: TextEmbeddings, guidance_scale: float) -> Tensor:
        guidance = torch.full_like(sigma, 1000 * guidance_scale)
        return self.transformer(
            hidden_states=latents,
            timestep=1000 * sigma,
            encoder_hidden_states=text["prompt_embeds"],
            encoder_attention_mask=text["prompt_attention_mask"],
            pooled_projections=text["pooled_prompt_embeds"],
            guidance=guidance,
            return_dict=False,
        )[0]


class RandomPairs:
    """Random pairs of one shape."""

    def __init__(self, transformer: HunyuanVideoTransformer3DModel, shape: tuple[int, ...], count: int) -> None:
        config = transformer.config
        self.kinds = {f"p{i}": "P_dy" for i in range(count)}
        self.sha256 = ""
        self._pairs = {}
        for name in self.kinds:
            random = generator(0, name)
            text = {
                "prompt_embeds": torch.randn(1, TEXT_TOKENS, config.text_embed_dim, generator=random),
                "prompt_attention_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.long),
                "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=random),
            }
            sides = [torch.randn(shape, generator=random) for _ in range(2)]
            self._pairs[name] = PairTensors(name, "P_dy", sides[0], sides[1], text)

    def __getitem__(self, pair_id: str) -> PairTensors:
        return self._pairs[pair_id]


def settings(pairs: int) -> recipe.Hpo:
    return recipe.Hpo.model_validate({"batch_size": pairs, "beta": 500.0, "noise_draws": 8})


def trained_lora(shapes: dict[str, tuple[int, ...]], seed: int) -> lora.LoraState:
    """A LoRA whose B is not zero, so that policy and reference differ from the base and from each other."""
    state = lora.initial_state(shapes, 0)
    return {
        name: t if ".lora_A." in name else 0.05 * torch.randn(t.shape, generator=generator(seed, name))
        for name, t in state.items()
    }


def start_engine(transformer: HunyuanVideoTransformer3DModel, short_of_memory: bool) -> Engine:
    trainer = recipe.Trainer.model_validate({"precision": "float32", "gradient_checkpointing": short_of_memory})
    engine = create_engine(
        transformer, TARGETS, recipe.Lora(rank=16, alpha=16, blocks="all"), trainer, kind="torch", device="cpu"
    )
    engine.set_reference(trained_lora(engine.shapes, 1))
    engine.reset(trained_lora(engine.shapes, 2), learning_rate=1e-5, weight_decay=1e-4)
    return engine


def magicid_step(
    engine: Engine,
    transformer: HunyuanVideoTransformer3DModel,
    pairs: RandomPairs,
    kept: dict[str, tuple[float, float]],
    short_of_memory: bool,
    update: bool = True,
) -> None:
    """One step as `train_hpo` takes it."""
    backbone, hpo = Backbone(transformer), settings(len(pairs.kinds))
    trainer = recipe.Trainer.model_validate({"shift": SHIFT})
    share = [(Visit(name, 0), 1.0) for name in pairs.kinds]
    for part in [[item] for item in share] if short_of_memory else [share]:
        batch = load_batch(engine, pairs, part, hpo, trainer)
        errors = reference_errors(engine, backbone, batch, GUIDANCE, kept)  # type: ignore[arg-type]
        pair_gradients(engine, backbone, batch, errors, hpo, GUIDANCE, short_of_memory=short_of_memory)  # type: ignore[arg-type]
    if update:
        engine.step()


def plain_step(
    policy: HunyuanVideoTransformer3DModel,
    reference: HunyuanVideoTransformer3DModel,
    pairs: RandomPairs,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    update: bool = True,
) -> None:
    """The same step the plain way; `engine` only lends its seeded draws."""
    hpo = settings(len(pairs.kinds))
    trainer = recipe.Trainer.model_validate({"shift": SHIFT})
    batch = load_batch(engine, pairs, [(Visit(name, 0), 1.0) for name in pairs.kinds], hpo, trainer)
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    errors = {}
    for model, of in ((policy, "policy"), (reference, "reference")):
        for clean, side in ((batch.winner, "winner"), (batch.loser, "loser")):
            with torch.set_grad_enabled(of == "policy"):
                noisy = (1 - sigma) * clean + sigma * batch.noise
                velocity = Backbone(model).predict_velocity(noisy, batch.sigma, batch.text, GUIDANCE)
                errors[of, side] = (velocity - (batch.noise - clean)).square().mean((1, 2, 3, 4))
    z = (errors["policy", "winner"] - errors["reference", "winner"]) - (
        errors["policy", "loser"] - errors["reference", "loser"]
    )
    loss = -torch.nn.functional.logsigmoid(-0.5 * hpo.beta * z).mean()
    optimizer.zero_grad()
    loss.backward()
    if update:
        torch.nn.utils.clip_grad_norm_([p for p in policy.parameters() if p.requires_grad], hpo.max_grad_norm)
        optimizer.step()


def plain_models(
    transformer: HunyuanVideoTransformer3DModel, second: HunyuanVideoTransformer3DModel
) -> torch.optim.Optimizer:
    """Give policy and reference model their LoRA; the optimizer of the policy's."""
    for model, seed in ((transformer, 2), (second, 1)):
        if lora.POLICY not in getattr(model, "peft_config", {}):
            lora.attach(model, TARGETS, 16, 16)
        tensors = lora.parameters(model, lora.POLICY)
        state = trained_lora({name: tuple(p.shape) for name, p in tensors.items()}, seed)
        for name, parameter in tensors.items():
            parameter.data.copy_(state[name])
    second.requires_grad_(False)
    return torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-5, weight_decay=1e-4)


def timed(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure_time(model: str, rounds: int) -> dict[str, float]:
    """Medians of alternating steps, and the largest difference of gradients relative to the largest gradient."""
    transformer, shape, count = build(model)
    second = copy.deepcopy(transformer)
    pairs = RandomPairs(transformer, shape, count)
    engine = start_engine(transformer, short_of_memory=False)
    optimizer = plain_models(transformer, second)
    kept: dict[str, tuple[float, float]] = {}

    plain_step(transformer, second, pairs, optimizer, engine, update=False)
    expected = [p.grad.clone() for p in lora.parameters(transformer, lora.POLICY).values() if p.grad is not None]
    largest = max(float(g.abs().max()) for g in expected)
    difference = 0.0
    for short_of_memory in (False, True):
        magicid_step(engine, transformer, pairs, kept, short_of_memory, update=False)
        found = engine._sum or []
        difference = max([difference, *(float((a - b).abs().max()) for a, b in zip(expected, found))])
        engine.discard()

    times: dict[str, list[float]] = {"plain": [], "magicid": [], "magicid_first_visit": [], "magicid_one_side": []}
    for _ in range(rounds):
        times["plain"].append(timed(lambda: plain_step(transformer, second, pairs, optimizer, engine)))
        times["magicid"].append(timed(lambda: magicid_step(engine, transformer, pairs, kept, False)))
        times["magicid_first_visit"].append(timed(lambda: magicid_step(engine, transformer, pairs, {}, False)))
        transformer.enable_gradient_checkpointing()
        times["magicid_one_side"].append(timed(lambda: magicid_step(engine, transformer, pairs, kept, True)))
        transformer.disable_gradient_checkpointing()
    parameters = sum(p.numel() for p in second.parameters())
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "difference": difference / largest, "parameters": parameters, "pairs": count}


def measure_memory(model: str, variant: str) -> dict[str, float]:
    """Peak resident bytes of two steps of one variant, and resident bytes before any model exists."""
    torch.randn(64, 64) @ torch.randn(64, 64)
    start = psutil.Process().memory_info().rss
    transformer, shape, count = build(model)
    pairs = RandomPairs(transformer, shape, count)
    engine = start_engine(transformer, short_of_memory=variant == "magicid_one_side")
    if variant == "plain":
        second, _, _ = build(model)
        optimizer = plain_models(transformer, second)
    kept: dict[str, tuple[float, float]] = {}
    for _ in range(2):
        if variant == "plain":
            plain_step(transformer, second, pairs, optimizer, engine)
        else:
            magicid_step(engine, transformer, pairs, kept, variant == "magicid_one_side")
    return {"start": start, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_process(*arguments: str) -> dict[str, float]:
    """Run a measurement of this file in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(model: str, rounds: int) -> None:
    """Measure one model and print the ratios."""
    times = in_process("--time", model, "--rounds", str(rounds))
    variants = ("plain", "magicid", "magicid_one_side")
    memory = {variant: in_process("--memory", variant, "--model", model) for variant in variants}
    plain = times["plain"]
    print(f"\n{model}: {times['parameters'] / 1e6:.0f} M parameters, {times['pairs']:.0f} pair(s) a step")
    print(f"  largest difference of gradients, relative: {times['difference']:.1e}")
    visits = PAPER_STEPS / (PAPER_PAIRS * settings(1).noise_draws)
    amortised = times["magicid"] + (times["magicid_first_visit"] - times["magicid"]) / visits
    rows = [
        ("plain, four forward passes", plain),
        ("magicid, reference errors kept", times["magicid"]),
        ("magicid, first visit of a draw", times["magicid_first_visit"]),
        (f"magicid, mean over the paper's {visits:.1f} visits a draw", amortised),
        ("magicid, one side at a time, activations recomputed", times["magicid_one_side"]),
    ]
    for name, seconds in rows:
        print(f"  {name:<58} {seconds:8.3f} s   {seconds / plain:5.2f} of plain")
    for variant in variants:
        peak, above = memory[variant]["peak"], memory[variant]["peak"] - memory[variant]["start"]
        ratio = peak / memory["plain"]["peak"]
        ratio_above = above / (memory["plain"]["peak"] - memory["plain"]["start"])
        print(
            f"  peak memory, {variant:<45} {peak / 1e6:8.0f} MB  {ratio:5.2f} of plain"
            f"   ({above / 1e6:.0f} MB above the start, {ratio_above:.2f})"
        )
    print(f"  goals: time <= {GOALS['time']}, memory <= {GOALS['memory']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["large", "world"])
    parser.add_argument("--time", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="large", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        print(json.dumps(measure_time(options.time, options.rounds)))
    elif options.memory:
        print(json.dumps(measure_memory(options.model, options.memory)))
    else:
        for model in [options.only] if options.only else ["large", "world"]:
            try:
                if model == "world":
                    resolve("world:video")
            except BackboneError as error:
                print(f"\nworld: not measured: {error}")
                continue
            report(model, options.rounds)


if __name__ == "__main__":
    main()
