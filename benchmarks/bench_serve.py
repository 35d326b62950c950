"""The endpoint's engine against the plain diffusers pipeline: one process, one machine, the shipped face-world model.

    python benchmarks/bench_serve.py [--rounds 5] [--threads N] [--batch 8]

(a) videos a minute: 8 identities in one continuous batch, against loading, generating and unloading one after another;
    also without the plain side's loading, so that what the batch itself gives can be told apart;
(b) 99th percentile of a swap between two adapters in memory, of one video's time;
(c) an adapter read, checked and swapped in for the first time, of one video's time;
(d) one identity alone, of the plain pipeline with its adapter already loaded.

A video is prompt to frames; making the mp4 is left out on both sides. Variants alternate in each round, medians count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline

from magicid import adapters, recipe
from magicid.backbones import load_backbone
from magicid.backbones.mixed_lora import LoraWeights
from magicid.recipe import Recipe
from magicid.training import lora
from magicid.weights import resolve
from serve.adapter_cache import AdapterCache, load_adapter
from serve.engine import Engine
from serve.schema import VideoRequest

GOALS = {"batch": 2.0, "swap": 0.01, "cold": 0.05, "alone": 1.05}
ACTIONS = ["nods", "waves", "walks", "jumps", "turns", "smiles", "dances", "runs"]


@dataclass(frozen=True)
class Video:
    """One identity's adapter folder and its request."""

    location: str
    request: VideoRequest


def publish_videos(run: Path, settings: Recipe, count: int) -> list[Video]:
    """Random adapters of the recipe's rank, published, and a request for each."""
    backbone = load_backbone(settings, parts=("transformer",))
    lora.attach(backbone.transformer, backbone.lora_target_modules(), settings.lora.rank, settings.lora.alpha)
    policy = lora.parameters(backbone.transformer, lora.POLICY)
    sampling, videos = settings.sampling, []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        state = {name: 0.02 * torch.randn(tensor.shape, generator=random) for name, tensor in policy.items()}
        weights = adapters.to_bytes(backbone.lora_state_dict(state), settings.lora.rank, settings.lora.alpha)
        manifest = adapters.AdapterManifest(backbone.base_sha256, "", settings.lora.rank, settings.lora.alpha)
        ref = adapters.publish(str(run), f"person-{number}", weights, manifest)
        prompt = f"a person {ACTIONS[number % len(ACTIONS)]} on the beach"
        request = VideoRequest(
            prompt, sampling.frames, sampling.height, sampling.width, sampling.fps, sampling.steps,
            sampling.guidance_scale, seed=number,
        )  # fmt: skip
        videos.append(Video(ref.location, request))
    return videos


class Plain:
    """The pipeline as anybody would call it."""

    def __init__(self, settings: Recipe) -> None:
        self.settings = settings
        self.pipeline = HunyuanVideoPipeline.from_pretrained(resolve(settings.backbone.path), dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)

    def load(self, location: str) -> None:
        self.pipeline.load_lora_weights(location)

    def unload(self) -> None:
        self.pipeline.unload_lora_weights()

    def generate(self, request: VideoRequest) -> np.ndarray:
        """Frames (F, H, W, 3), 0..1."""
        return self.pipeline(
            request.prompt,
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            prompt_template={"template": self.settings.backbone.prompt_template, "crop_start": 0},
            max_sequence_length=self.settings.backbone.max_sequence_length,
            output_type="np",
        ).frames[0]

    def generate_all(self, videos: list[Video]) -> list[np.ndarray]:
        """Load, generate, unload, one after another."""
        frames = []
        for video in videos:
            self.load(video.location)
            frames.append(self.generate(video.request))
            self.unload()
        return frames


class Ours:
    """The engine with its cache, as a replica uses them."""

    def __init__(self, settings: Recipe, max_batch: int) -> None:
        backbone = load_backbone(settings)
        self.base_sha256, self.transformer = backbone.base_sha256, backbone.transformer
        self.max_batch, self.engine = max_batch, Engine(backbone, max_batch=max_batch)
        self.cache = self.new_cache()

    def new_cache(self) -> AdapterCache:
        return AdapterCache(lambda location: load_adapter(location, self.base_sha256, self.transformer), 1 << 30)

    def generate_all(self, videos: list[Video]) -> list[np.ndarray]:
        """All in one continuous batch: as many as it holds, the next when one leaves."""
        waiting = list(enumerate(videos))
        frames: dict[int, np.ndarray] = {}
        while len(frames) < len(videos):
            while waiting and len(self.engine.progress()) < self.max_batch:
                number, video = waiting.pop(0)
                self.engine.admit(str(number), video.request, self.cache.acquire(video.location))
            finished = {}
            for sample in self.engine.step():
                if sample.latents is None:
                    raise SystemExit(str(sample.error))
                video = videos[int(sample.key)]
                self.cache.release(video.location)
                finished[int(sample.key)] = (sample.latents, video.request)
            frames |= dict(zip(finished, self.engine.decode_all(list(finished.values()))))
        return [frames[number] for number in range(len(videos))]


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def swap_times(ours: Ours, videos: list[Video], count: int) -> list[float]:
    """Seconds from asking the cache for a resident adapter until the next forward would use it."""

    def swap(location: str) -> None:
        ours.engine._lora.set_rows([ours.cache.acquire(location)])
        ours.cache.release(location)

    return [timed(lambda n=n: swap(videos[n % len(videos)].location)) for n in range(count)]  # type: ignore[misc]


def cold_times(ours: Ours, videos: list[Video]) -> list[float]:
    """Seconds from asking an empty cache until the next forward would use the adapter."""

    def start(video: Video) -> LoraWeights:
        weights = ours.new_cache().acquire(video.location)
        ours.engine._lora.set_rows([weights])
        return weights

    return [timed(lambda video=video: start(video)) for video in videos]  # type: ignore[misc]


def largest_difference(ours: list[np.ndarray], plain: list[np.ndarray]) -> float:
    """Of all pixels, on a scale of 255."""
    return max(float(np.abs(a - 255 * b).max()) for a, b in zip(ours, plain))


def measure(settings: Recipe, rounds: int, batch: int) -> None:
    """Measure and print everything."""
    with tempfile.TemporaryDirectory() as folder:
        videos = publish_videos(Path(folder), settings, 8)
        plain, ours = Plain(settings), Ours(settings, batch)
        difference = largest_difference(ours.generate_all(videos), plain.generate_all(videos))  # warms both up, too
        times: dict[str, list[float]] = {name: [] for name in ("batch", "sequential", "ours alone", "plain alone")}
        plain_loaded = Plain(settings)
        plain_loaded.load(videos[0].location)
        plain_loaded.generate(videos[0].request)
        for _ in range(rounds):
            times["batch"].append(timed(lambda: ours.generate_all(videos)))
            times["sequential"].append(timed(lambda: plain.generate_all(videos)))
            for video in [videos[0]] * 3:
                times["ours alone"].append(timed(lambda: ours.generate_all([video])))  # noqa: B023
                times["plain alone"].append(timed(lambda: plain_loaded.generate(video.request)))  # noqa: B023
        swaps = swap_times(ours, videos, 40 * rounds)
        cold = [seconds for _ in range(rounds) for seconds in cold_times(ours, videos)]
    median = {name: statistics.median(values) for name, values in times.items()}
    one, count = median["ours alone"], len(videos)
    print(f"largest difference from the plain pipeline's pixels: {difference:.2f} of 255")
    for name in ("batch", "sequential"):
        print(f"  {name:<12} {60 * count / median[name]:8.1f} videos/min   ({median[name]:.2f} s for {count})")
    for name in ("ours alone", "plain alone"):
        print(f"  {name:<12} {median[name]:8.3f} s a video")
    ratio = median["sequential"] / median["batch"]
    print(f"(a) batch against load, generate, unload     {ratio:8.2f}   goal >= {GOALS['batch']}")
    print(f"    against generating alone, nothing loaded {count * median['plain alone'] / median['batch']:8.2f}")
    print(
        f"(b) swap, p99                                {np.quantile(swaps, 0.99) / one:8.4f}   goal <= {GOALS['swap']}"
    )
    print(
        f"(c) cold adapter, p99                        {np.quantile(cold, 0.99) / one:8.4f}   goal <= {GOALS['cold']}"
    )
    print(f"(d) one identity against the plain pipeline  {one / median['plain alone']:8.2f}   goal <= {GOALS['alone']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"face-world, float32, {options.threads} threads, batch of {options.batch}, {options.rounds} rounds")
    measure(recipe.load("face-world"), options.rounds, options.batch)


if __name__ == "__main__":
    main()
