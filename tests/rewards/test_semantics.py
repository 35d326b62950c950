"""The expected rating: by hand-made probabilities, and through a tiny Qwen2.5-VL against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from magicid.errors import RewardError
from magicid.rewards.semantics import (
    RATING_QUESTION,
    SemanticsReward,
    answer_probabilities,
    answer_tokens,
    expected_rating,
    rating_inputs,
)
from tests.rewards.folders import semantics_folder

DIGITS = [(d,) for d in range(1, 10)]  # tokens 0..9 are the digits
TWO_TOKENS = [*DIGITS, (1, 0)]
ONE_TOKEN = [*DIGITS, (10,)]


def log_row(size: int = 12, **probabilities: float) -> np.ndarray:
    """Log-probabilities with the given ones (`t3=0.5` is token 3), 0 elsewhere."""
    row = np.zeros(size)
    for name, value in probabilities.items():
        row[int(name[1:])] = value
    with np.errstate(divide="ignore"):
        return np.log(row)


def test_ten_as_two_tokens_by_hand() -> None:
    log_probs = {(): log_row(t1=0.4, t2=0.1, t11=0.5), (1,): log_row(t0=0.75, t11=0.25)}
    # P(1) = 0.4 * 0.25, P(2) = 0.1, P(10) = 0.4 * 0.75, normalised by 0.5; token 11 is no answer
    expected = np.zeros(10)
    expected[[0, 1, 9]] = [0.2, 0.2, 0.6]
    np.testing.assert_allclose(answer_probabilities(log_probs, TWO_TOKENS), expected, atol=1e-12)
    assert expected_rating(log_probs, TWO_TOKENS) == pytest.approx(0.2 * 1 + 0.2 * 2 + 0.6 * 10)


def test_ten_as_one_token_by_hand() -> None:
    log_probs = {(): log_row(t1=0.4, t10=0.1, t11=0.5)}
    assert expected_rating(log_probs, ONE_TOKEN) == pytest.approx((0.4 * 1 + 0.1 * 10) / 0.5)


def test_a_tokenizer_that_puts_a_space_in_front() -> None:
    space = 11
    answers = [(space, *answer) for answer in TWO_TOKENS]
    log_probs = {
        (): log_row(t11=0.2, t5=0.8),
        (space,): log_row(t1=0.5, t7=0.5),
        (space, 1): log_row(t0=0.5, t3=0.5),
    }
    assert expected_rating(log_probs, answers) == pytest.approx(0.25 * 1 + 0.25 * 10 + 0.5 * 7)


@pytest.mark.parametrize("rating", range(1, 11))
def test_certainty_is_that_rating(rating: int) -> None:
    first = "t1" if rating == 10 else f"t{rating}"
    log_probs = {(): log_row(**{first: 1.0}), (1,): log_row(**{"t0" if rating == 10 else "t11": 1.0})}
    assert expected_rating(log_probs, TWO_TOKENS) == pytest.approx(rating)


def test_vanishing_probabilities_still_give_a_rating() -> None:
    row = np.full(12, -2000.0)
    row[3], row[4] = -1000.0, -1000.0
    assert expected_rating({(): row, (1,): row}, TWO_TOKENS) == pytest.approx(3.5)


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_no_probability_is_an_error_not_a_number(value: float) -> None:
    row = np.full(12, value)
    with pytest.raises(RewardError, match="no rating a finite probability"):
        expected_rating({(): row, (1,): row}, TWO_TOKENS)


@pytest.fixture(scope="module", params=[False, True], ids=["ten-in-two", "ten-in-one"])
def model(request, tmp_path_factory) -> SemanticsReward:
    folder = semantics_folder(tmp_path_factory.mktemp("models") / "vlm", ten_is_one_token=request.param)
    return SemanticsReward.from_pretrained(folder, frames=4)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)


def brute_force(model: SemanticsReward, inputs) -> np.ndarray:
    """Each answer's probability by appending its tokens one at a time, each with a forward pass of its own."""
    tokenizer = model.processor.tokenizer
    result = []
    for rating in range(1, 11):
        ids, mask, types = inputs["input_ids"], inputs["attention_mask"], inputs["mm_token_type_ids"]
        probability = 1.0
        for token in tokenizer(str(rating), add_special_tokens=False)["input_ids"]:
            given = {**inputs, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
            with torch.no_grad():
                probability *= float(model.model(**given).logits[0, -1].softmax(-1)[token])
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            mask, types = torch.cat([mask, mask[:, :1]], 1), torch.cat([types, types[:, :1] * 0], 1)
        result.append(probability)
    values = np.array(result)
    if len(model.answers[9]) == 2:
        values[0] -= values[9]
    return values / values.sum()


def test_score_is_the_expectation_over_the_models_answers(model: SemanticsReward, frames) -> None:
    inputs = rating_inputs(model.processor, frames, "a person nods", 8, 4)
    expected = brute_force(model, inputs) @ np.arange(1, 11)
    assert model.score(frames, "a person nods", 8) == pytest.approx(expected, abs=1e-4)
    assert 1 < expected < 10
    assert abs(model.score(frames, "a person jumps", 8) - expected) > 1e-4
    assert abs(model.score(255 - frames, "a person nods", 8) - expected) > 1e-4


def test_the_question_goes_through_the_chat_template(model: SemanticsReward, frames) -> None:
    inputs = rating_inputs(model.processor, frames, "a person nods", 8, 4)
    text = model.processor.tokenizer.decode(inputs["input_ids"][0])
    pads = "<|video_pad|>" * 8  # 4 frames in twos, 16 px in patches of 4 merged by twos: 2 * 2 * 2
    question = RATING_QUESTION.format(prompt="a person nods")
    assert text == (
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    shown = rating_inputs(model.processor, frames[[0, 2, 4, 6]], "a person nods", 4, 4)
    assert torch.equal(shown["pixel_values_videos"], inputs["pixel_values_videos"])


def test_ten_is_as_many_tokens_as_the_tokenizer_makes_of_it(model: SemanticsReward, request) -> None:
    lengths = [len(answer) for answer in answer_tokens(model.processor.tokenizer)]
    assert lengths == [1] * 9 + [2 if "ten-in-two" in request.node.name else 1]


def test_a_folder_that_cannot_be_used_is_refused(tmp_path) -> None:
    with pytest.raises(RewardError, match="no vision-language model folder"):
        SemanticsReward.from_pretrained(tmp_path / "absent")
    with pytest.raises(RewardError, match="cannot load the vision-language model"):
        SemanticsReward.from_pretrained(tmp_path)


def test_frames_of_another_form_are_refused(model: SemanticsReward) -> None:
    with pytest.raises(RewardError, match="uint8 RGB"):
        model.score(np.zeros((2, 8, 8, 3)), "a person nods", 8)


def test_loading_says_nothing(tmp_path, capfd) -> None:
    folder = semantics_folder(tmp_path / "vlm")
    capfd.readouterr()
    SemanticsReward.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")
