"""R_sem: how well a clip follows its prompt, as the expected rating of a vision-language model.

Source: MagicID, the semantics reward. The paper asks for a number; a number as text would be an integer and tie almost
everything, so the expectation is taken over the model's probabilities of the ten answers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from magicid.errors import RewardError
from magicid.rewards.frames import checked_frames, evenly_spaced

RATING_QUESTION = (
    'On a scale from 1 to 10, how well does this video match the prompt: "{prompt}"? Answer with one number.'
)
RATINGS = tuple(range(1, 11))

Tokens = tuple[int, ...]


class SemanticsReward:
    """A Qwen-VL-type model that rates clips. Make it with `from_pretrained`.

    Args:
        model: of an image-text-to-text class of transformers.
        processor: its processor, with a chat template.
        frames: frames shown, at most.
    """

    def __init__(self, model: Any, processor: Any, frames: int = 8) -> None:
        self.model = model.eval()
        self.processor = processor
        self.frames = frames
        self.answers = answer_tokens(processor.tokenizer)
        self._limits_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, frames: int = 8, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> SemanticsReward:
        """Load a transformers folder (safetensors only); nothing is downloaded.

        Args:
            folder: read by AutoProcessor and AutoModelForImageTextToText.
            frames: frames shown to the model, evenly spaced.
            dtype: None is bfloat16 on a GPU and float32 on a CPU.

        Raises:
            RewardError: not such a folder.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = Path(folder).expanduser()
        action = "put a Qwen-VL-type model with its processor there, or point the recipe at another folder"
        if not folder.is_dir():  # transformers would take it for the name of a hosted model
            raise RewardError(f"no vision-language model folder {folder}", action)
        chosen = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        try:
            with _no_progress_bar():
                processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
                model: Any = AutoModelForImageTextToText.from_pretrained(
                    folder, dtype=chosen, use_safetensors=True, local_files_only=True
                )
            return cls(model.to(device), processor, frames)
        except Exception as error:
            raise RewardError(f"cannot load the vision-language model {folder}: {error}", action) from error

    @torch.no_grad()
    def score(self, frames_FHWC: NDArray[np.uint8], prompt: str, fps: float) -> float:
        """R_sem: the expected rating of the clip under its prompt, 1..10.

        Args:
            frames_FHWC: uint8 RGB (F, H, W, 3).
            prompt: what the clip should show.
            fps: frames per second of the clip.

        Raises:
            RewardError: frames of another form, or a model that fails or answers with non-finite numbers.
        """
        frames = checked_frames(frames_FHWC)
        try:
            inputs = rating_inputs(self.processor, frames, prompt, fps, self.frames)
            log_probs = self._log_probs(inputs)
        except Exception as error:
            raise RewardError(f"the vision-language model failed: {error}", "check its folder and the clip") from error
        return expected_rating(log_probs, self.answers)

    @torch.no_grad()
    def answer(self, frames_FHWC: NDArray[np.uint8], question: str, fps: float, tokens: int = 64) -> str:
        """What the model says of a clip, its likeliest words, on one line.

        Args:
            frames_FHWC: uint8 RGB (F, H, W, 3).
            fps: frames per second of the clip.
            tokens: the longest answer.

        Raises:
            RewardError: frames of another form, or a model that fails.
        """
        frames = checked_frames(frames_FHWC)
        try:
            inputs = question_inputs(self.processor, frames, question, fps, self.frames)
            device = next(self.model.parameters()).device
            asked = {name: tensor.to(device) for name, tensor in inputs.items()}
            said = self.model.generate(**asked, max_new_tokens=tokens, do_sample=False)[
                0, asked["input_ids"].shape[1] :
            ]
            return " ".join(self.processor.tokenizer.decode(said, skip_special_tokens=True).split())
        except Exception as error:
            raise RewardError(f"the vision-language model failed: {error}", "check its folder and the clip") from error

    def _log_probs(self, inputs: Mapping[str, Tensor]) -> dict[Tokens, NDArray[np.float64]]:
        """Log-probabilities (V,) of the next token after each proper beginning of an answer.

        The longest beginnings are appended to the question, one forward pass each (for digits one: the "1" of "10");
        the logits on the way are those of the shorter ones.
        """
        device = next(self.model.parameters()).device
        result: dict[Tokens, NDArray[np.float64]] = {}
        for beginning in _longest_beginnings(self.answers):
            extended = {name: tensor.to(device) for name, tensor in _extended(inputs, beginning).items()}
            count = len(beginning) + 1
            keep = {"logits_to_keep": count} if self._limits_logits else {}
            logits = self.model(**extended, use_cache=False, **keep).logits[0, -count:]
            rows = logits.double().log_softmax(-1).cpu().numpy()
            for length, row in enumerate(rows):
                result.setdefault(beginning[:length], row)
        return result


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def rating_inputs(
    processor: Any, frames_FHWC: NDArray[np.uint8], prompt: str, fps: float, frames: int = 8
) -> dict[str, Tensor]:
    """The model's inputs (batch 1) for RATING_QUESTION about a clip; see `question_inputs`."""
    return question_inputs(processor, frames_FHWC, RATING_QUESTION.format(prompt=prompt), fps, frames)


def question_inputs(
    processor: Any, frames_FHWC: NDArray[np.uint8], question: str, fps: float, frames: int
) -> dict[str, Tensor]:
    """The model's inputs (batch 1) for a question about a clip, through the processor's own chat template.

    Args:
        processor: of a Qwen-VL-type model.
        frames_FHWC: uint8 RGB (F, H, W, 3).
        fps: frames per second of the clip.
        frames: frames shown, evenly spaced.
    """
    shown = evenly_spaced(len(frames_FHWC), frames)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    step = (len(frames_FHWC) - 1) / (len(shown) - 1) if len(shown) > 1 else 1.0
    metadata = {
        "total_num_frames": len(shown),
        "fps": fps / step,
        "frames_indices": list(range(len(shown))),
        "duration": len(shown) * step / fps,
        "width": frames_FHWC.shape[2],
        "height": frames_FHWC.shape[1],
    }
    return dict(
        processor(
            text=[text],
            videos=[np.ascontiguousarray(frames_FHWC[shown])],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
    )


def answer_tokens(tokenizer: Any) -> list[Tokens]:
    """The tokens of the answers "1" to "10". Raises RewardError when two of them are the same."""
    answers = [tuple(tokenizer(str(rating), add_special_tokens=False)["input_ids"]) for rating in RATINGS]
    if len(set(answers)) < len(RATINGS) or () in answers:
        raise RewardError("the tokenizer cannot tell the ratings 1 to 10 apart", "use another vision-language model")
    return answers


def answer_probabilities(log_probs: Mapping[Tokens, NDArray[Any]], answers: Sequence[Tokens]) -> NDArray[np.float64]:
    """Probabilities of complete answers, normalised over the answers: (len(answers),).

    An answer's tokens have the product of their conditional probabilities; what goes on to a longer answer is not the
    short one: P("10") = P("1") P("0" | "1") and P("1") is what is left, P("1") (1 - P("0" | "1")), when "10" is two
    tokens. Nothing is left out when it is one.

    Args:
        log_probs: after each proper beginning of an answer, the empty one too: log-probabilities (V,) of the next
            token.
        answers: token sequences, all different.

    Raises:
        RewardError: non-finite probabilities, or none of the answers is possible.
    """
    begins = np.array(
        [sum(float(log_probs[answer[:i]][token]) for i, token in enumerate(answer)) for answer in answers]
    )
    if np.isnan(begins).any() or not begins.max() > -np.inf or begins.max() == np.inf:
        raise RewardError("the vision-language model gives no rating a finite probability", "check its folder")
    probabilities = np.exp(begins - begins.max())
    for short in sorted(range(len(answers)), key=lambda i: -len(answers[i])):
        longer = [
            i for i, other in enumerate(answers) if len(other) > len(answers[short]) and _begins(answers[short], other)
        ]
        probabilities[short] = max(0.0, probabilities[short] - probabilities[longer].sum())
    return np.asarray(probabilities / probabilities.sum())


def expected_rating(log_probs: Mapping[Tokens, NDArray[Any]], answers: Sequence[Tokens]) -> float:
    """The mean of 1..10 under `answer_probabilities`; arguments and errors as there, `answers` in the order 1..10."""
    return float(answer_probabilities(log_probs, answers) @ np.array(RATINGS, dtype=np.float64))


def _begins(short: Tokens, long: Tokens) -> bool:
    return long[: len(short)] == short


def _longest_beginnings(answers: Sequence[Tokens]) -> list[Tokens]:
    """Proper beginnings of answers that begin no other one: together with their own beginnings, all there are."""
    beginnings = {answer[:length] for answer in answers for length in range(len(answer))}
    return sorted(b for b in beginnings if not any(b != other and _begins(b, other) for other in beginnings))


def _extended(inputs: Mapping[str, Tensor], tokens: Tokens) -> dict[str, Tensor]:
    """Inputs with tokens after the question; masks see them as text."""
    shape = inputs["input_ids"].shape
    result = dict(inputs)
    for name, tensor in inputs.items():
        if tokens and tensor.shape == shape:
            fill = {"input_ids": list(tokens), "attention_mask": [1] * len(tokens)}.get(name, [0] * len(tokens))
            result[name] = torch.cat([tensor, tensor.new_tensor([fill])], dim=1)
    return result
