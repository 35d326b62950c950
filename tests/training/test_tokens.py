"""Extended tokens and short photo clips, on tiny folders of the production classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from magicid.backbones import load_backbone
from magicid.clips import inflate_photo
from magicid.errors import TrainingError
from magicid.training.sft import first_frames
from magicid.training.tokens import TOKENS, first_tokens, train_tokens, with_tokens
from tests.tiny_models import tiny_hunyuan_folder, tiny_recipe, tiny_wan_folder


@pytest.fixture(scope="module", params=["hunyuan-480p", "wan-480p"])
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make = tiny_wan_folder if request.param.startswith("wan") else tiny_hunyuan_folder
    recipe = tiny_recipe(
        request.param, make(folder), sft__steps=12, sft__tokens=2, sft__learning_rate=0.3, hpo__steps=0,
        trainer__log_every=1, sft__batch_size=2,
    )  # fmt: skip
    return load_backbone(recipe, parts=("transformer", "vae", "text"))


def photo_latents(backbone, frames: int = 5) -> torch.Tensor:
    photo = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    return backbone.encode_video(inflate_photo(photo, frames, 32, 48)[None])[0]


def test_tokens_come_before_the_text_and_are_not_masked() -> None:
    text = {
        "encoder_hidden_states": torch.arange(12.0).reshape(1, 3, 4),
        "encoder_attention_mask": torch.tensor([[1, 1, 0]]),
        "pooled_projections": torch.zeros(1, 2),
    }
    found = with_tokens(text, torch.full((2, 4), 7.0))
    assert found["encoder_hidden_states"][0, :, 0].tolist() == [7, 7, 0, 4, 8]
    assert found["encoder_attention_mask"].tolist() == [[1, 1, 1, 1, 0]]
    assert found["pooled_projections"] is text["pooled_projections"]
    start = first_tokens(text, 500, 0)
    assert start.mean(0) == pytest.approx(
        torch.tensor([2.0, 3, 4, 5]), abs=0.1
    )  # of the two tokens that are no padding
    with pytest.raises(TrainingError, match="do not fit text embeddings of width 4"):
        with_tokens(text, torch.zeros(2, 5))


def test_tokens_learn_and_the_base_stays(backbone) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.transformer.state_dict().items()}
    settings = backbone.recipe.sft
    text = backbone.encode_prompts(["a person"])
    clips, texts = {"photo": photo_latents(backbone)}, {"photo": text}
    steps: list[int] = []
    result = train_tokens(backbone, clips, texts, settings, backbone.recipe.trainer, on_step=steps.append)
    assert steps == list(range(1, 13))
    tokens = result.lora_state[TOKENS]
    start = first_tokens(text, settings.tokens, settings.seed)
    assert tokens.shape == start.shape
    assert float((tokens - start).abs().max()) > 0.1
    again = train_tokens(backbone, clips, texts, settings, backbone.recipe.trainer)
    assert torch.equal(again.lora_state[TOKENS], tokens)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.transformer.state_dict().items())
    plain, named = (backbone.sample_text(t, [1]) for t in (text, with_tokens(text, tokens)))
    assert plain.shape == named.shape
    assert not torch.allclose(plain, named)


def test_tokens_follow_the_gradient(backbone) -> None:
    """The loss on the training draws is lower with trained tokens than with untrained ones."""
    texts, clips = {"photo": backbone.encode_prompts(["a person"])}, {"photo": photo_latents(backbone)}
    settings = backbone.recipe.sft.model_copy(update={"steps": 40, "learning_rate": 0.05})
    trained = train_tokens(backbone, clips, texts, settings, backbone.recipe.trainer)
    frozen = settings.model_copy(update={"learning_rate": 1e-12})
    still = train_tokens(backbone, clips, texts, frozen, backbone.recipe.trainer)
    late = [np.mean([row["loss"] for row in result.history[-20:]]) for result in (trained, still)]
    assert late[0] < late[1]


def test_the_first_latents_of_a_photo_clip_are_a_shorter_photo_clip(backbone) -> None:
    long = photo_latents(backbone, 9)
    for frames in (1, 5):
        assert torch.allclose(first_frames(long, frames), photo_latents(backbone, frames), atol=1e-4)
    assert first_frames(long, 0) is long
