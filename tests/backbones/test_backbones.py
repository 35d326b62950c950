"""Both backbones against the plain diffusers pipelines they stand on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, WanPipeline

from magicid.backbones import base_sha256, load_backbone
from magicid.errors import BackboneError
from tests.tiny_models import tiny_recipe

RECIPES = ["hunyuan-480p", "hunyuan-paper", "wan-480p"]
PROMPTS, SEEDS = ["a person nods in the kitchen", "a man jumps"], [3, 4]


def plain_pipeline(recipe: Any) -> Any:
    """The pipeline as anybody would load it, with the recipe's scheduler."""
    cls = HunyuanVideoPipeline if recipe.backbone.kind == "hunyuan" else WanPipeline
    pipeline = cls.from_pretrained(recipe.backbone.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.sampling.shift)
    return pipeline


def plain_call(pipeline: Any, recipe: Any, output_type: str = "latent") -> Any:
    """One ordinary call of the pipeline with the recipe's numbers, for PROMPTS and SEEDS."""
    sampling = recipe.sampling
    arguments: dict[str, Any] = {"guidance_scale": sampling.guidance_scale}
    if recipe.backbone.kind == "hunyuan":
        arguments["prompt_template"] = {"template": "{}", "crop_start": 0}
        arguments["true_cfg_scale"] = sampling.true_cfg_scale
    if sampling.true_cfg_scale > 1 or recipe.backbone.kind == "wan":
        arguments["negative_prompt"] = [sampling.negative_prompt] * 2
    return pipeline(
        PROMPTS,
        height=sampling.height,
        width=sampling.width,
        num_frames=sampling.frames,
        num_inference_steps=sampling.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        max_sequence_length=recipe.backbone.max_sequence_length,
        output_type=output_type,
        **arguments,
    ).frames


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hunyuan-480p", {}),
        ("hunyuan-480p", {"sampling__shift": 3.0, "sampling__guidance_scale": 2.0}),
        ("hunyuan-paper", {"sampling__true_cfg_scale": 4.0, "sampling__negative_prompt": "snow"}),
        ("wan-480p", {"sampling__negative_prompt": "snow"}),
        ("wan-480p", {"sampling__guidance_scale": 1.0}),
    ],
)
def test_samples_equal_a_plain_pipeline_call(folders: dict[str, Path], name: str, changes: dict[str, Any]) -> None:
    recipe = tiny_recipe(name, folders[name], **changes)
    backbone = load_backbone(recipe)
    latents = backbone.sample(PROMPTS, SEEDS)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, *backbone.latent_shape()) == (2, 4, 2, 4, 6)
    torch.testing.assert_close(latents, plain_call(plain_pipeline(recipe), recipe), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_clip_does_not_depend_on_its_batch_or_on_earlier_calls(folders: dict[str, Path], name: str) -> None:
    backbone = load_backbone(tiny_recipe(name, folders[name]))
    together = backbone.sample(PROMPTS, SEEDS)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS)):
        torch.testing.assert_close(backbone.sample([prompt], [seed])[0], together[row], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().mean() > 0.1


def test_settings_change_the_sample(folders: dict[str, Path]) -> None:
    name = "hunyuan-480p"
    base = load_backbone(tiny_recipe(name, folders[name])).sample(PROMPTS[:1], [0])
    for changes in ({"sampling__shift": 2.0}, {"sampling__guidance_scale": 1.0}, {"sampling__true_cfg_scale": 3.0}):
        other = load_backbone(tiny_recipe(name, folders[name], **changes)).sample(PROMPTS[:1], [0])
        assert (other - base).abs().max() > 1e-3, changes


@pytest.mark.parametrize("name", RECIPES)
def test_decoding_equals_the_pipelines_own(folders: dict[str, Path], name: str) -> None:
    recipe = tiny_recipe(name, folders[name])
    backbone = load_backbone(recipe)
    frames = backbone.decode(backbone.sample(PROMPTS, SEEDS))
    assert frames.dtype == np.uint8
    assert frames.shape == (2, 5, 32, 48, 3)
    expected = np.asarray(plain_call(plain_pipeline(recipe), recipe, "np"))
    assert np.abs(frames - expected * 255).max() <= 0.51


@pytest.mark.parametrize("name", RECIPES)
def test_a_clip_alone_is_encoded_and_decoded_as_in_a_batch(folders: dict[str, Path], name: str) -> None:
    backbone = load_backbone(tiny_recipe(name, folders[name]))
    latents = backbone.sample(PROMPTS, SEEDS)
    frames = backbone.decode(latents)
    encoded = backbone.encode_video(frames)
    for row in range(2):
        alone = backbone.decode(latents[row : row + 1])
        assert alone.shape == (1, 5, 32, 48, 3)
        assert np.abs(alone[0].astype(int) - frames[row]).max() <= 1  # rounding to a grey level
        torch.testing.assert_close(backbone.encode_video(frames[row : row + 1])[0], encoded[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["hunyuan-480p", "wan-480p"])
def test_encoding_is_the_posteriors_mode_in_the_transformers_scale(folders: dict[str, Path], name: str) -> None:
    backbone = load_backbone(tiny_recipe(name, folders[name]), parts=("vae",))
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 48, 3), dtype=np.uint8)
    latents = backbone.encode_video(frames)
    vae = backbone.pipeline.vae
    with torch.no_grad():
        video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1
        raw = vae.encode(video).latent_dist.mode()
    if name == "wan-480p":
        mean, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        expected = (raw - mean) / std
    else:
        expected = raw * 0.476986
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    assert torch.equal(latents, backbone.encode_video(frames))
    assert torch.allclose(backbone._to_vae_scale(latents), raw, atol=1e-5)


@pytest.mark.parametrize("name", ["hunyuan-480p", "wan-480p"])
def test_euler_steps_along_the_predicted_velocity_are_the_sampler(folders: dict[str, Path], name: str) -> None:
    recipe = tiny_recipe(name, folders[name], sampling__guidance_scale=1.0 if name == "wan-480p" else 6.0)
    backbone = load_backbone(recipe)
    text = backbone.encode_prompts(PROMPTS)
    shape = backbone.latent_shape()
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.sampling.shift)
    if name == "wan-480p":
        scheduler.set_timesteps(recipe.sampling.steps)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, recipe.sampling.steps + 1)[:-1])
    for now, after in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:]):
        with torch.no_grad():
            x = x + (after - now) * backbone.predict_velocity(x, now.repeat(2), text, recipe.sampling.guidance_scale)
    torch.testing.assert_close(x, backbone.sample(PROMPTS, SEEDS), atol=1e-5, rtol=0)


def test_velocity_is_differentiable_and_takes_guidance(folders: dict[str, Path]) -> None:
    backbone = load_backbone(tiny_recipe("hunyuan-480p", folders["hunyuan-480p"]))
    text = {key: value.float() for key, value in backbone.encode_prompts(PROMPTS).items()}  # as read from storage
    latents = torch.randn(2, *backbone.latent_shape()).requires_grad_()
    sigma = torch.tensor([0.2, 0.9])
    velocity = backbone.predict_velocity(latents, sigma, text, 6.0)
    velocity.square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0
    with torch.no_grad():
        direct = backbone.transformer(
            hidden_states=latents,
            timestep=torch.tensor([200.0, 900.0]),
            guidance=torch.tensor([6000.0, 6000.0]),
            return_dict=False,
            **text,
        )[0]
        other = backbone.predict_velocity(latents, sigma, text, 1.0)
    torch.testing.assert_close(velocity.detach(), direct)
    assert (other - direct).abs().max() > 1e-6


def test_the_pipelines_own_prompt_template_is_the_default(folders: dict[str, Path]) -> None:
    recipe = tiny_recipe("hunyuan-480p", folders["hunyuan-480p"], backbone__prompt_template=None)
    text = load_backbone(recipe, parts=("text",)).encode_prompts(["a man jumps"])
    tokens, pooled, mask = plain_pipeline(recipe).encode_prompt("a man jumps", max_sequence_length=16)
    assert torch.equal(text["encoder_hidden_states"], tokens)
    assert torch.equal(text["encoder_attention_mask"], mask)
    assert torch.equal(text["pooled_projections"], pooled)


@pytest.mark.parametrize("name", RECIPES)
def test_a_trainer_samples_from_kept_text_without_text_encoders(folders: dict[str, Path], name: str) -> None:
    recipe = tiny_recipe(name, folders[name], sampling__negative_prompt="snow")
    whole = load_backbone(recipe)
    kept = {key: value.float() for key, value in whole.encode_prompts(PROMPTS).items()}  # as read from storage
    training = load_backbone(recipe, parts=("transformer",))
    assert torch.equal(training.sample_text(kept, SEEDS), whole.sample(PROMPTS, SEEDS))
    with pytest.raises(ValueError, match="as many seeds"):
        training.sample_text(kept, [1])


@pytest.mark.parametrize("name", RECIPES)
def test_only_the_parts_asked_for_are_loaded(folders: dict[str, Path], name: str) -> None:
    recipe = tiny_recipe(name, folders[name])
    training = load_backbone(recipe, parts=("transformer",))
    loaded = {key for key, part in training.pipeline.components.items() if part is not None}
    assert loaded - {"scheduler"} == {"transformer"}
    assert training.latent_shape() == (4, 2, 4, 6)
    with pytest.raises(BackboneError, match="without its text_encoder"):
        training.encode_prompts(["a man jumps"])
    with pytest.raises(BackboneError, match="without its vae"):
        training.decode(torch.zeros(1, 4, 2, 4, 6))
    with pytest.raises(BackboneError, match="without its transformer"):
        load_backbone(recipe, parts=("text",)).sample(["a man jumps"], [0])
    assert training.base_sha256 == base_sha256(recipe)


def test_settings_that_an_old_folder_does_not_name_take_their_defaults(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["wan-480p"], tmp_path / "old"))
    config = json.loads((folder / "vae" / "config.json").read_text())
    for key in ("scale_factor_temporal", "scale_factor_spatial"):
        del config[key]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    assert load_backbone(tiny_recipe("wan-480p", folder), parts=("transformer",)).latent_shape() == (4, 2, 4, 6)


def test_bfloat16_weights_give_float32_latents(folders: dict[str, Path]) -> None:
    recipe = tiny_recipe("wan-480p", folders["wan-480p"], backbone__dtype="bfloat16")
    backbone = load_backbone(recipe)
    assert backbone.transformer.dtype == torch.bfloat16
    assert backbone.pipeline.vae.dtype == torch.float32
    latents = backbone.sample(PROMPTS[:1], [0])
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()


def test_the_hash_follows_transformer_and_vae_only(folders: dict[str, Path], tmp_path: Path) -> None:
    before = base_sha256(tiny_recipe("wan-480p", folders["wan-480p"]))
    for number, (file, changes) in enumerate([("vae/config.json", True), ("tokenizer/tokenizer_config.json", False)]):
        folder = Path(shutil.copytree(folders["wan-480p"], tmp_path / str(number)))
        (folder / file).write_text((folder / file).read_text() + "\n")
        assert (base_sha256(tiny_recipe("wan-480p", folder)) != before) is changes


def test_what_does_not_fit_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    hunyuan = folders["hunyuan-480p"]
    with pytest.raises(BackboneError, match="no model folder"):
        load_backbone(tiny_recipe("hunyuan-480p", tmp_path / "absent"))
    with pytest.raises(BackboneError, match=r"model_index\.json"):
        load_backbone(tiny_recipe("hunyuan-480p", tmp_path))
    with pytest.raises(BackboneError, match="holds a HunyuanVideoPipeline, not a WanPipeline"):
        load_backbone(tiny_recipe("wan-480p", hunyuan))
    broken = Path(shutil.copytree(hunyuan, tmp_path / "broken"))
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BackboneError, match="cannot load the HunyuanVideoPipeline"):
        load_backbone(tiny_recipe("hunyuan-480p", broken))
    later = Path(shutil.copytree(folders["wan-480p"], tmp_path / "wan22"))
    index = json.loads((later / "model_index.json").read_text())
    (later / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(BackboneError, match=r"Wan 2\.2"):
        load_backbone(tiny_recipe("wan-480p", later))
