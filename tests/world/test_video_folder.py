"""The shipped text-to-video folder loads with the production class and does what the face world needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline

from magicid.world import language, train_vae
from magicid.world.clip_pool import clip_pool
from magicid.world.text_encoders import MAX_SEQUENCE_LENGTH, PROMPT_TEMPLATE
from magicid.world.train_video import quick_attention, sample_clips

FOLDER = Path(train_vae.__file__).parent / "weights" / "video"


@pytest.fixture(scope="module")
def pipeline() -> HunyuanVideoPipeline:
    loaded = HunyuanVideoPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_is_a_small_model_with_the_latents_the_world_asks_for(pipeline: HunyuanVideoPipeline) -> None:
    modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    assert 2e6 < parameters < 10e6
    assert pipeline.transformer.config.guidance_embeds
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 17e6


def test_latents_of_unseen_clips_are_normal_and_decode_to_the_clip(pipeline: HunyuanVideoPipeline) -> None:
    frames = clip_pool(6, seed=971_000).frames
    with torch.no_grad():
        latents = pipeline.vae.encode(train_vae.to_video(frames)).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert latents.shape == (6, pipeline.transformer.config.in_channels, 4, 12, 12)
    assert abs(float(latents.mean())) < 0.2
    assert 0.7 < float(latents.std()) < 1.3
    assert train_vae.reconstruction_psnr(pipeline.vae, frames) > 23.0
    assert train_vae.reconstruction_psnr(pipeline.vae, train_vae.photo_clips(6, 1, seed=971_000)) > 27.0


def test_every_word_of_the_language_is_one_token_and_any_text_has_tokens(pipeline: HunyuanVideoPipeline) -> None:
    for word in language.vocabulary():
        assert len(pipeline.tokenizer.tokenize(word)) == 1
        assert len(pipeline.tokenizer_2.tokenize(word)) == 1
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert len(tokenizer("Zoë, 42 % 漢字").input_ids) > 8
        assert tokenizer.unk_token_id not in tokenizer("zebra 7").input_ids[1:-1]
    longest = max(
        len(pipeline.tokenizer(language.caption(action, place, class_word=word, variant=variant)).input_ids)
        for action in range(len(language.ACTIONS))
        for place in range(len(language.PLACES))
        for word in language.CLASS_WORDS
        for variant in range(language.VARIANTS)
    )
    assert longest <= MAX_SEQUENCE_LENGTH


def test_paraphrases_are_closer_than_other_actions(pipeline: HunyuanVideoPipeline) -> None:
    prompts = [language.caption(0, 0), language.caption(0, 0, variant=2), language.caption(1, 0)]
    with torch.no_grad():
        _, pooled, mask = pipeline.encode_prompt(
            prompts, prompt_template=PROMPT_TEMPLATE, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
    paraphrase, other = (float((pooled[0] - pooled[i]).norm()) for i in (1, 2))
    assert paraphrase < other
    assert mask.sum(1).tolist() == [len(prompt.split()) + 1 for prompt in prompts]


def test_a_clip_is_decided_by_its_seed(pipeline: HunyuanVideoPipeline) -> None:
    prompt = language.caption(2, 1)
    first, again, other = (sample_clips(pipeline, [prompt], seed=seed, num_inference_steps=3)[0] for seed in (5, 5, 6))
    assert first.shape == (13, 48, 48, 3)
    assert np.array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 2


def test_quick_attention_equals_the_fused_one(pipeline: HunyuanVideoPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 10, 16, generator=generator) for _ in range(3))
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[1, ..., 6:] = False
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with quick_attention(torch.device("cpu")):
        plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.allclose(fused, plain, atol=1e-5)


def test_no_config_says_where_it_was_trained() -> None:
    for file in FOLDER.parent.rglob("*.json"):
        assert '"_name_or_path": "/' not in file.read_text(), file
