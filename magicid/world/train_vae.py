"""Trains the face world's video autoencoder, a small AutoencoderKLHunyuanVideo (4x4 pixels and 4 frames per latent).

It is convolutional and causal, so most steps see a few frames; the last ones see whole clips, because the group norms'
statistics depend on the length. Thirteen frames of 48 x 48 pixels become latents of (16, 4, 12, 12).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from numpy.typing import NDArray
from torch import Tensor

from magicid.world.clip_pool import clip_pool
from magicid.world.muon import make_muon
from magicid.world.renderer import FRAMES, SIZE, render_photos, sample_people
from magicid.world.training_loop import Ema, autocast, choose_device, train_loop, written_whole

STEPS = 3600
LATENT_CHANNELS = 16
PIECE_FRAMES = 5
PIECE_BATCH = {"cpu": 3, "cuda": 64}
WHOLE_BATCH = {"cpu": 2, "cuda": 32}
CLIPS = {"cpu": 1600, "cuda": 8000}
WHOLE_FROM = 0.6  # part of the first phase after which it sees whole clips
DECODER_PART = 1.0  # steps of the second phase, decoder alone, relative to the first
LATENT_NOISE = 0.05
MOVING_WEIGHT = 4.0
KL_WEIGHT = 1e-4
L1_WEIGHT, GRADIENT_WEIGHT = 0.1, 0.1
TEST_SEED = 970_000


def make_vae() -> AutoencoderKLHunyuanVideo:
    """An untrained autoencoder of about 1.9 M parameters, without attention.

    Few groups in the norms, since a narrow group would lose the colour of the whole clip; residual branches that start
    at zero and orthogonal convolutions around them, so that the picture passes through from the first step on.
    """
    widths = (16, 32, 64)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * len(widths),
        up_block_types=("HunyuanVideoUpBlock3D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv3d):
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith("conv2.conv"):
                torch.nn.init.zeros_(module.weight)
            else:
                torch.nn.init.orthogonal_(module.weight)
    # Posteriors start narrow, with a deviation of 0.05.
    torch.nn.init.zeros_(vae.quant_conv.weight[LATENT_CHANNELS:])
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -6.0)
    return vae


def to_video(frames_BFHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 clips (B, F, H, W, 3) to the autoencoder's float32 (B, 3, F, H, W) in -1..1."""
    video = torch.from_numpy(np.ascontiguousarray(frames_BFHWC)).permute(0, 4, 1, 2, 3)
    return video.float().div(127.5).sub(1).contiguous()


def photo_clips(people: int, photos: int, seed: int) -> NDArray[np.uint8]:
    """Inflated photos, uint8 (people * photos, F, H, W, 3): each one photo, at clip size, repeated in every frame."""
    stills = []
    for i, person in enumerate(sample_people(people, seed)):
        for photo in render_photos(person, photos, seed + i):
            stills.append(cv2.resize(photo, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    return np.repeat(np.stack(stills)[:, None], FRAMES, axis=1)


@dataclass(frozen=True)
class Pieces:
    """Runs of frames of clips, one in six of them from a photo, half of them mirrored.

    moving and still: uint8 (N, F, H, W, 3), on the device that trains.
    """

    moving: Tensor
    still: Tensor

    def draw(self, rng: np.random.Generator, batch: int, frames: int) -> Tensor:
        """Float32 (batch, 3, frames, H, W) in -1..1."""
        first = int(rng.integers(0, FRAMES - frames + 1))
        stills = int(rng.binomial(batch, 1 / 6))
        parts = []
        for source, count in ((self.still, stills), (self.moving, batch - stills)):
            rows = torch.from_numpy(rng.integers(0, len(source), count)).to(source.device)
            parts.append(source[rows, first : first + frames])
        video = torch.cat(parts).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)
        mirrored = torch.from_numpy(rng.random(batch) < 0.5).to(video.device)
        return torch.where(mirrored.view(-1, 1, 1, 1, 1), video.flip(-1), video).contiguous()


def training_pieces(where: torch.device) -> Pieces:
    """The autoencoder's training data, on ``where``."""
    clips = CLIPS[where.type]
    moving, still = clip_pool(clips, seed=51).frames, photo_clips(clips // 10, 2, seed=52)
    return Pieces(torch.from_numpy(moving).to(where), torch.from_numpy(still).to(where))


def reconstruction_loss(output: Tensor, video: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean square, plus L1 of the pixels and of their differences along x and y, which keeps eyes and glasses sharp.

    ``weight`` multiplies the pixel terms, (B, 1, 1, H, W).
    """
    error = output - video
    loss = (weight * (error.square() + L1_WEIGHT * error.abs())).mean()
    for axis in (-1, -2):
        loss = loss + GRADIENT_WEIGHT * error.diff(dim=axis).abs().mean()
    return loss


def moving_weight(video: Tensor) -> Tensor:
    """Weights (B, 1, 1, H, W) of mean 1, MOVING_WEIGHT times as large where anything moves: on the person."""
    change = (video.amax(2, keepdim=True) - video.amin(2, keepdim=True)).amax(1, keepdim=True)
    weight = torch.where(change > 0.15, MOVING_WEIGHT, 1.0)
    return weight / weight.mean()


@torch.no_grad()
def normalise_latents(vae: AutoencoderKLHunyuanVideo, frames_BFHWC: NDArray[np.uint8], batch: int = 16) -> None:
    """Give every latent channel zero mean and unit deviation by an exact change of the two 1x1 convolutions.

    The output of ``quant_conv`` is shifted and scaled and the input of ``post_quant_conv`` shifted and scaled back, so
    reconstructions stay as they are and ``scaling_factor`` stays 1.
    """
    device = next(vae.parameters()).device
    means = [
        vae.encode(to_video(frames_BFHWC[i : i + batch]).to(device)).latent_dist.mean
        for i in range(0, len(frames_BFHWC), batch)
    ]
    latents = torch.cat(means)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0, 0] @ mean
    post.weight *= std[None, :, None, None, None]
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLHunyuanVideo, frames_BFHWC: NDArray[np.uint8], batch: int = 8) -> float:
    """Mean over clips of the peak signal-to-noise ratio in dB of decoded against given frames."""
    parameter = next(vae.parameters())
    ratios = []
    for i in range(0, len(frames_BFHWC), batch):
        video = to_video(frames_BFHWC[i : i + batch]).to(parameter.device)
        output = vae.decode(vae.encode(video.to(parameter.dtype)).latent_dist.mode()).sample
        error = ((output.float().clamp(-1, 1) - video) / 2).square().mean((1, 2, 3, 4))
        ratios.append(-10 * error.log10())
    return float(torch.cat(ratios).mean())


def measure(vae: AutoencoderKLHunyuanVideo, clips: int = 48) -> dict[str, float]:
    """PSNR in dB on clips and on inflated photos of unseen people."""
    return {
        "psnr_clips": reconstruction_psnr(vae, clip_pool(clips, TEST_SEED).frames),
        "psnr_photos": reconstruction_psnr(vae, photo_clips(clips, 1, TEST_SEED)),
    }


def train_whole(vae: AutoencoderKLHunyuanVideo, pieces: Pieces, work: Path, steps: int, where: torch.device) -> None:
    """First phase: encoder and decoder together, on short runs of frames and then on whole clips."""
    ema = Ema(vae, 0.998)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        whole = step >= WHOLE_FROM * steps
        shape = (WHOLE_BATCH[where.type], FRAMES) if whole else (PIECE_BATCH[where.type], PIECE_FRAMES)
        video = pieces.draw(rng, *shape)
        with autocast(where):
            posterior = vae.encode(video).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = -10 * ((output - video) / 2).square().mean().log10()
        return {"loss": reconstruction_loss(output, video) + KL_WEIGHT * kl, "kl": kl, "psnr": psnr}

    optimizer = make_muon(vae, lr=8e-3, adam_lr=1e-3)
    train_loop("vae", vae, optimizer, step_function, steps=steps, folder=work / "whole", ema=ema)
    ema.copy_to(vae)


def train_decoder(vae: AutoencoderKLHunyuanVideo, pieces: Pieces, work: Path, steps: int, where: torch.device) -> None:
    """Second phase: the decoder alone, on whole clips with slightly noisy latents; the latents stay what they are.

    So it can be repeated for as long as anybody likes, without a word to the transformer.
    """
    decoder = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    ema = Ema(decoder, 0.998)

    def step_function(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        video = pieces.draw(rng, WHOLE_BATCH[where.type], FRAMES)
        with autocast(where):
            with torch.no_grad():
                latents = vae.encode(video).latent_dist.mean
            output = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample.float()
        psnr = -10 * ((output - video) / 2).square().mean().log10()
        return {"loss": reconstruction_loss(output, video, moving_weight(video)), "psnr": psnr}

    optimizer = make_muon(decoder, lr=5e-3, adam_lr=1e-3)
    train_loop("decoder", decoder, optimizer, step_function, steps=steps, folder=work / "decoder", seed=3, ema=ema)
    ema.copy_to(decoder)


def train(out: Path, work: Path, device: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Train the autoencoder and write the folder ``out`` (config.json, float16 weights).

    Args:
        out: folder to make; the pipeline's ``vae``.
        work: folder for checkpoints; an interrupted training goes on from there.
        device: ``auto``, ``cpu`` or ``cuda``.
        steps: optimizer steps of the first phase; the second takes DECODER_PART times as many.

    Returns:
        The figures of `measure`.
    """
    steps = steps or STEPS
    where = choose_device(device)
    torch.manual_seed(0)
    vae = make_vae().to(where)
    pieces = training_pieces(where)
    train_whole(vae, pieces, work, steps, where)
    vae.eval()
    normalise_latents(vae, pieces.moving[:256].cpu().numpy())
    train_decoder(vae, pieces, work, round(DECODER_PART * steps), where)
    with written_whole(out) as temporary:
        vae.half().save_pretrained(temporary)
        forget_origin(temporary)
    return measure(AutoencoderKLHunyuanVideo.from_pretrained(out))


def forget_origin(folder: Path) -> None:
    """Take the path a model was loaded from out of the configs below ``folder``: it says nothing to anybody else."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def refine(folder: Path, work: Path, device: str = "auto", steps: int = STEPS) -> dict[str, float]:
    """Train the decoder of the autoencoder in ``folder`` up to ``steps`` steps and put it back; the latents stay.

    ``work`` is the folder that `train` had, so the second phase goes on where it stopped. Returns `measure`'s figures.
    """
    where = choose_device(device)
    vae = AutoencoderKLHunyuanVideo.from_pretrained(folder).to(where).eval()
    train_decoder(vae, training_pieces(where), work, steps, where)
    with written_whole(folder) as temporary:
        vae.half().save_pretrained(temporary)
        forget_origin(temporary)
    return measure(AutoencoderKLHunyuanVideo.from_pretrained(folder))
