"""ConsisID's clips, from a tiny ConsisIDPipeline; the face models need packages and weights that are not here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
)
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from magicid import recipe
from magicid.clips import decode_mp4
from magicid.errors import BackboneError, PhotoError
from magicid.evaluation.consisid import PACKAGES, ConsisID, Face, held_out, load_faces, load_pipeline, main, make_clips
from magicid.evaluation.folder import list_clips
from magicid.manifests import ManifestRow

SIZES = {"height": 16, "width": 16, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}


def tiny_faces(photo: np.ndarray) -> Face:
    """Numbers that follow from the photo; a black one shows nobody."""
    if not photo.any():
        raise PhotoError("ConsisID finds no face", "give another photo first")
    generator = torch.Generator().manual_seed(int(photo.sum()))
    hidden = [torch.randn(1, 2, 2, generator=generator)]
    return Face(Image.fromarray(photo), torch.randn(1, 2, generator=generator), hidden)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    transformer = ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2,
        text_embed_dim=16, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True, cross_attn_interval=1, is_kps=False, is_train_face=True,
        cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2, LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8,
        LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1, LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=1,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    tokens = T5Tokenizer(vocab=pieces + [(chr(c), -5.0) for c in range(ord("a"), ord("z") + 1)], extra_ids=0)
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokens), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    folder = tmp_path_factory.mktemp("consisid")
    ConsisIDPipeline(
        tokenizer=tokens, text_encoder=encoder.eval(), vae=vae, transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_clips_lie_as_evaluate_reads_them_and_are_made_once(weights, tmp_path) -> None:
    model = ConsisID(load_pipeline(weights, "cpu", torch.float32), tiny_faces, **SIZES)
    rng = np.random.default_rng(0)
    people = {name: rng.integers(1, 255, (16, 16, 3), np.uint8) for name in ("ann", "bob")}
    people["nobody"] = np.zeros((16, 16, 3), np.uint8)
    asked = {name: [("a man nods", 7), ("a man jumps", 8)] for name in people}
    out, said = str(tmp_path), []
    assert make_clips(model, people, asked, out, said.append) == 4
    assert "nobody is set aside" in said[-1]
    found = list_clips(out)
    assert [(clip.identity_id, clip.prompt, clip.seed) for clip in found] == [
        (name, prompt, seed) for name in ("ann", "bob") for prompt, seed in asked[name]
    ]

    def file(name: str, seed: int) -> Path:
        (one,) = (tmp_path / name).glob(f"{seed}-*.mp4")
        return one

    data = {(clip.identity_id, clip.seed): file(clip.identity_id, clip.seed).read_bytes() for clip in found}
    frames, fps = decode_mp4(data["ann", 7])
    assert (frames.shape, fps) == ((9, 16, 16, 3), 8)
    assert len(set(data.values())) == 4  # every person and seed is another clip
    file("bob", 8).unlink()
    assert make_clips(model, people, asked, out, said.append) == 1
    assert file("bob", 8).read_bytes() == data["bob", 8]
    asked["bob"] = [("a man waves", 7), ("a man jumps", 8)]  # another prompt is another clip
    assert make_clips(model, people, asked, out, said.append) == 1
    assert ("bob", "a man waves") in {(clip.identity_id, clip.prompt) for clip in list_clips(out)}


def test_prompts_and_seeds_are_those_of_a_run() -> None:
    settings = recipe.load("face-world", {"evaluation.clips": 3})
    asked = held_out(settings, [ManifestRow("ann", [], class_word="woman"), ManifestRow("bob", [])])
    assert asked["ann"] == [
        ("a woman nods on the beach", 1000),
        ("a woman shakes the head in the desert", 1001),
        ("a woman walks across in the garden", 1002),
    ]
    assert asked["bob"][0] == ("a person nods on the beach", 1000)


@pytest.mark.skipif(all(importlib.util.find_spec(name) for name in PACKAGES), reason="the packages are installed")
def test_missing_packages_are_named(tmp_path, capsys) -> None:
    with pytest.raises(BackboneError, match="facexlib"):
        load_faces(tmp_path, "cpu")
    (tmp_path / "ann").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "ann" / "1.png")
    with pytest.raises(SystemExit):
        main(["--weights", str(tmp_path), "--identities", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "pip install facexlib consisid_eva_clip" in capsys.readouterr().err


def test_a_folder_without_weights_is_told(tmp_path) -> None:
    with pytest.raises(BackboneError, match="cannot load ConsisID"):
        load_pipeline(tmp_path, "cpu", torch.float32)
