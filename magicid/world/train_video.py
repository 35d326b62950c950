"""Trains the face world's text-to-video model and writes it as a HunyuanVideoPipeline folder.

Flow matching as in production (HunyuanVideo, arXiv 2412.03603): x_s = (1 - s) x_0 + s n, the model predicts n - x_0 at
timestep 1000 s. First at embedded guidance 1 with some empty prompts; then guidance is distilled into its embedding
(Meng et al., arXiv 2210.03142), so that one forward at guidance g gives what classifier-free guidance needs two for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from magicid.world import language, train_vae
from magicid.world.clip_pool import renderers
from magicid.world.muon import make_muon
from magicid.world.renderer import FRAMES, SIZE, render_clips, sample_people
from magicid.world.text_encoders import (
    MAX_SEQUENCE_LENGTH,
    PROMPT_TEMPLATE,
    WIDTH,
    PromptEmbeddings,
    TextEncoders,
    train_text_encoders,
)
from magicid.world.training_loop import (
    Ema,
    autocast,
    choose_device,
    load_checkpoint,
    train_loop,
    written_whole,
)

STEPS = 5400
DISTILL_STEPS = 500
BATCH = {"cpu": 24, "cuda": 512}
CHUNKS = {"cpu": 12, "cuda": 120}
CHUNK_CLIPS = 500
ENCODE_BATCH = {"cpu": 4, "cuda": 125}
STILL_PART, EMPTY_PART = 0.06, 0.1
GUIDANCE_MAX = 6.0
SAMPLING = {"num_inference_steps": 12, "guidance_scale": 2.5, "true_cfg_scale": 1.0}
SHIFT = 3.0


def make_transformer() -> HunyuanVideoTransformer3DModel:
    """An untrained transformer of 5.3 M parameters; its residual branches start at zero (adaLN-Zero)."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=train_vae.LATENT_CHANNELS,
        out_channels=train_vae.LATENT_CHANNELS,
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=4,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(16, 24, 24),
    )
    adaptive = [block.norm1 for block in transformer.transformer_blocks]
    adaptive += [block.norm1_context for block in transformer.transformer_blocks]
    adaptive += [block.norm for block in transformer.single_transformer_blocks]
    for layer in [*(norm.linear for norm in adaptive), transformer.norm_out.linear, transformer.proj_out]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def _is_outer(name: str) -> bool:
    """Whether a parameter belongs to the embedders, the modulation or the output, which Adam trains and not Muon."""
    return "norm" in name or name.startswith(("x_embedder", "time_text_embed", "context_embedder", "proj_out"))


def warmup_then_decay(step: int, steps: int, warmup: int = 100, decay_from: float = 0.7) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear down to a twentieth over the last part."""
    progress = (step / steps - decay_from) / (1 - decay_from)
    return min((step + 1) / warmup, 1.0, 1 - 0.95 * progress)


@contextmanager
def quick_attention(device: torch.device) -> Iterator[None]:
    """On CPUs, attention as three matrix products: in bfloat16 its backward pass is 3 times as fast as the fused."""
    if device.type != "cpu":
        yield
        return

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -1e4)
        return torch.matmul(scores.softmax(-1), value)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


@dataclass(frozen=True)
class LatentPool:
    """Encoded clips: latents (N, C, F, H, W) float16, actions (N,) with -1 for nobody moving, places (N,)."""

    latents: Tensor
    actions: NDArray[np.int64]
    places: NDArray[np.int64]


RenderedChunk = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


def _chunk_file(work: Path, index: int) -> Path:
    return work / "latents" / f"{index:03d}.safetensors"


@torch.no_grad()
def encode_chunk(work: Path, vae: AutoencoderKLHunyuanVideo, index: int, rendered: RenderedChunk) -> Path:
    """Encode chunk ``index`` of the pool into its file."""
    target = _chunk_file(work, index)
    target.parent.mkdir(parents=True, exist_ok=True)
    frames, actions, places = rendered
    where = next(vae.parameters()).device
    latents = []
    for start in range(0, CHUNK_CLIPS, ENCODE_BATCH[where.type]):
        part = frames[start : start + ENCODE_BATCH[where.type]]
        with autocast(where):
            mean = vae.encode(train_vae.to_video(part).to(where)).latent_dist.mean
        latents.append((mean.float() * vae.config.scaling_factor).half().cpu())
    tensors = {"latents": torch.cat(latents), "actions": torch.from_numpy(actions), "places": torch.from_numpy(places)}
    temporary = target.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(temporary))
    temporary.rename(target)
    return target


def render_chunk(index: int) -> RenderedChunk:
    """Frames (N, F, H, W, 3), actions and places (N,) of chunk ``index``; a few people do nothing."""
    seed = 100_000 + index
    rng = np.random.default_rng(seed)
    people = sample_people(CHUNK_CLIPS, seed)
    actions = rng.permutation(np.arange(CHUNK_CLIPS) % len(language.ACTIONS))
    actions[rng.random(CHUNK_CLIPS) < STILL_PART] = language.STILL
    places = rng.permutation(np.arange(CHUNK_CLIPS) % len(language.PLACES))
    seeds = rng.integers(0, 2**31, CHUNK_CLIPS)
    return render_clips(people, actions, places, seeds).frames, actions, places


def latent_pool(work: Path, vae: AutoencoderKLHunyuanVideo) -> LatentPool:
    """All chunks of encoded clips, on the device of ``vae``; those that are missing in ``work`` are made."""
    where = next(vae.parameters()).device
    files = [_chunk_file(work, index) for index in range(CHUNKS[where.type])]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    with renderers(bool(missing)) as pool:
        for index, rendered in zip(missing, pool.map(render_chunk, missing) if pool else ()):
            encode_chunk(work, vae, index, rendered)
    parts = [load_file(str(file)) for file in files]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return LatentPool(joined["latents"].to(where), joined["actions"].numpy(), joined["places"].numpy())


class CaptionTable:
    """Embeddings of every caption of the language, computed once, and of the empty prompt (row 0)."""

    def __init__(self, encoders: TextEncoders) -> None:
        prompts, self.rows = [""], {}
        for action in (language.STILL, *range(len(language.ACTIONS))):
            for place in range(len(language.PLACES)):
                self.rows[action, place] = len(prompts)
                prompts += [
                    language.caption(action, place, class_word=word, variant=variant)
                    for word in language.CLASS_WORDS
                    for variant in range(language.VARIANTS)
                ]
        self.wordings = len(language.CLASS_WORDS) * language.VARIANTS
        with torch.no_grad():
            self.embeddings = encoders.embed(prompts)

    def draw(self, rng: np.random.Generator, actions: NDArray[np.int64], places: NDArray[np.int64]) -> Tensor:
        """Rows of one wording for each (action, place)."""
        first = np.array([self.rows[int(a), int(p)] for a, p in zip(actions, places)])
        return torch.from_numpy(first + rng.integers(0, self.wordings, len(first)))


def velocity(
    transformer: HunyuanVideoTransformer3DModel, x: Tensor, sigma: Tensor, text: PromptEmbeddings, guidance: Tensor
) -> Tensor:
    """Predicted n - x_0 (B, C, F, H, W) at noise levels ``sigma`` (B,) in 0..1 and guidance ``guidance`` (B,)."""
    output: Tensor = transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=text.tokens,
        encoder_attention_mask=text.mask,
        pooled_projections=text.pooled,
        guidance=1000 * guidance,
        return_dict=False,
    )[0]
    return output.float()


def draw_sigmas(rng: np.random.Generator, count: int) -> Tensor:
    """Noise levels, logit-normal and a little towards noise, where action and place are decided; a tenth uniform."""
    sigma = 1 / (1 + np.exp(-rng.normal(0.4, 1.0, count)))
    sigma = np.where(rng.random(count) < 0.1, rng.random(count), sigma)
    return torch.from_numpy(sigma.astype(np.float32))


class VideoTraining:
    """The steps of both phases over one pool of encoded clips."""

    def __init__(self, pool: LatentPool, captions: CaptionTable, device: torch.device) -> None:
        self.pool, self.captions, self.device = pool, captions, device

    def _batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, their noise levels, the true velocity and the caption rows of ``size`` clips."""
        rows = rng.integers(0, len(self.pool.latents), size)
        clean = self.pool.latents[torch.from_numpy(rows).to(self.device)].float()
        noise = torch.randn_like(clean)
        sigma = draw_sigmas(rng, size).to(self.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        text = self.captions.draw(rng, self.pool.actions[rows], self.pool.places[rows])
        return (1 - level) * clean + level * noise, sigma, noise - clean, text

    def matching_step(self, transformer: HunyuanVideoTransformer3DModel, rng: np.random.Generator) -> dict[str, Tensor]:
        """Flow matching at guidance 1; some prompts are empty."""
        size = BATCH[self.device.type]
        x, sigma, target, text = self._batch(rng, size)
        text[torch.from_numpy(rng.random(size) < EMPTY_PART)] = 0
        with autocast(self.device), quick_attention(self.device):
            output = velocity(transformer, x, sigma, self.captions.embeddings[text], torch.ones_like(sigma))
        return {"loss": F.mse_loss(output, target)}

    def distillation_step(
        self,
        transformer: HunyuanVideoTransformer3DModel,
        teacher: HunyuanVideoTransformer3DModel,
        rng: np.random.Generator,
    ) -> dict[str, Tensor]:
        """Match the teacher's classifier-free guidance at scales 1..GUIDANCE_MAX; a sixth of the batch stays at 1."""
        size = BATCH[self.device.type]
        x, sigma, _, text = self._batch(rng, size)
        scale = rng.uniform(1, GUIDANCE_MAX, size)
        scale[rng.random(size) < 1 / 6] = 1
        guidance = torch.from_numpy(scale.astype(np.float32)).to(self.device)
        both = torch.cat([text, torch.zeros_like(text)])
        embeddings = self.captions.embeddings
        with autocast(self.device), quick_attention(self.device):
            with torch.no_grad():
                ones = torch.ones(2 * size, device=self.device)
                asked, empty = velocity(
                    teacher, torch.cat([x, x]), torch.cat([sigma, sigma]), embeddings[both], ones
                ).chunk(2)
                target = empty + guidance.view(-1, 1, 1, 1, 1) * (asked - empty)
            output = velocity(transformer, x, sigma, embeddings[text], guidance)
        return {"loss": F.mse_loss(output, target)}


def export_pipeline(
    out: Path, vae: AutoencoderKLHunyuanVideo, encoders: TextEncoders, transformer: HunyuanVideoTransformer3DModel
) -> None:
    """Write the pipeline folder ``out`` in one go: video models in float16, the tiny text encoders in float32."""
    pipeline = HunyuanVideoPipeline(
        text_encoder=encoders.llama,
        tokenizer=encoders.llama_tokens,
        transformer=copy.deepcopy(transformer).half(),
        vae=copy.deepcopy(vae).half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder_2=encoders.clip,
        tokenizer_2=encoders.clip_tokens,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as temporary:
        pipeline.save_pretrained(temporary)
        train_vae.forget_origin(temporary)


def sample_clips(pipeline: HunyuanVideoPipeline, prompts: list[str], seed: int, **options: Any) -> NDArray[np.uint8]:
    """Clips (B, F, H, W, 3) uint8 of ``prompts`` at the recommended settings; ``options`` override them."""
    settings = {**SAMPLING, "prompt_template": PROMPT_TEMPLATE, "max_sequence_length": MAX_SEQUENCE_LENGTH, **options}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    frames = pipeline(
        prompts, height=SIZE, width=SIZE, num_frames=FRAMES, generator=generators, output_type="np", **settings
    ).frames
    return np.round(np.asarray(frames) * 255).astype(np.uint8)


def measure(folder: Path, classifier: Path | None = None, clips: int = 128, **options: Any) -> dict[str, float]:
    """Reconstruction, motion and, with a classifier folder, how often the asked action and place are seen.

    ``motion`` is the mean absolute difference of neighbouring frames relative to that of rendered clips.
    """
    pipeline = HunyuanVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    figures = train_vae.measure(pipeline.vae)
    actions = np.arange(clips) % len(language.ACTIONS)
    places = np.arange(clips) // len(language.ACTIONS) % len(language.PLACES)
    prompts = [language.caption(int(a), int(p)) for a, p in zip(actions, places)]
    made = np.concatenate([sample_clips(pipeline, prompts[i : i + 16], seed=i, **options) for i in range(0, clips, 16)])
    true = render_clips(sample_people(clips, train_vae.TEST_SEED), actions, places, np.arange(clips)).frames
    change = [np.abs(np.diff(frames.astype(np.float32), axis=1)).mean() for frames in (made, true)]
    figures["motion"] = float(change[0] / change[1])
    if classifier is not None and classifier.exists():
        from magicid.world.classifier import ActionPlaceClassifier

        action, place = ActionPlaceClassifier.from_pretrained(classifier).predict(made)
        figures["action"] = float((action.argmax(1) == actions).mean())
        figures["place"] = float((place.argmax(1) == places).mean())
    return figures


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train autoencoder, text encoders and transformer, and write the pipeline folder ``out``.

    Args:
        out: folder to make, for ``HunyuanVideoPipeline.from_pretrained``.
        work: folder for checkpoints and encoded clips; an interrupted training goes on from there.
        device: ``auto``, ``cpu`` or ``cuda``.
        steps: optimizer steps of the first phase; the others shrink alongside when it is below STEPS.

    Returns:
        The figures of `measure`; action and place with the classifier that lies beside ``out``, if there is one.
    """
    steps = steps or STEPS
    part = min(1.0, steps / STEPS)
    where = choose_device(device)
    vae_folder = work / "vae_out"
    if not (vae_folder / "config.json").exists():
        train_vae.train(vae_folder, work / "vae", device, round(train_vae.STEPS * part))
    vae = AutoencoderKLHunyuanVideo.from_pretrained(vae_folder).to(where).eval()
    encoders = train_text_encoders(work, device)
    captions = CaptionTable(encoders)
    training = VideoTraining(latent_pool(work, vae), captions, where)

    torch.manual_seed(0)
    transformer = make_transformer().to(where)
    ema = Ema(transformer, 0.998)
    train_loop(
        "video",
        transformer,
        make_muon(transformer, lr=2e-2, adam_lr=1e-3, adam=_is_outer),
        lambda _, rng: training.matching_step(transformer, rng),
        steps=steps,
        folder=work / "transformer",
        seed=1,
        schedule=warmup_then_decay,
        ema=ema,
    )
    ema.copy_to(transformer)

    teacher = copy.deepcopy(transformer).eval().requires_grad_(False)
    ema = Ema(transformer, 0.99)
    train_loop(
        "guidance",
        transformer,
        torch.optim.AdamW(transformer.parameters(), lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0),
        lambda _, rng: training.distillation_step(transformer, teacher, rng),
        steps=round(DISTILL_STEPS * part),
        folder=work / "guidance",
        seed=2,
        ema=ema,
    )
    ema.copy_to(transformer)
    export_pipeline(out, vae, encoders, transformer)
    return measure(out, out.parent / "classifier")


def export_checkpoint(out: Path, work: Path, phase: str = "transformer") -> int:
    """Write the pipeline folder of an unfinished training (``phase``: transformer or guidance); return its step."""
    transformer = make_transformer()
    ema = Ema(transformer, 0.0)
    state = load_checkpoint(work / phase, transformer, ema=ema)
    if state is None:
        raise FileNotFoundError(f"no checkpoint under {work / phase}")
    ema.copy_to(transformer)
    vae = AutoencoderKLHunyuanVideo.from_pretrained(work / "vae_out")
    export_pipeline(out, vae, train_text_encoders(work, "cpu"), transformer)
    return int(state["step"])
