"""Action prompts: shipped sets, or sampled from a language model (paper: 20 for training, 40 others for evaluation).

A prompt is stored with the literal token `{class_word}` where the person is named; `for_class` fills it. So all people
of one class word share their base clips.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import resources

from magicid import recipe
from magicid.errors import RecipeError
from magicid.schema import Prompt
from magicid.storage import sha256_json

TOKEN = "{class_word}"

_BATCH = 20  # prompts asked for at once
_MAX_LENGTH = 400
_REQUEST = """\
Write {count} different prompts for a text-to-video model. Each is one English sentence about one person who does
something that moves the whole body or the face, in a named place, with light or weather where it helps. Write {token}
for the person, exactly once in each sentence, as in "A {token} jumps over a puddle on a rainy street". No names,
no age, no looks. Answer with a JSON list of {count} strings and nothing else."""
_OTHERS = "\nNone of these again:\n"

Ask = Callable[[str, int], str]  # (request, seed) -> the language model's answer


def load_prompts(settings: recipe.Prompts) -> list[Prompt]:
    """The training prompts, then the held-out ones; all texts differ.

    Raises:
        RecipeError: no such set, too few prompts in it, or a language model that cannot be reached or does not answer
            with enough usable prompts.
    """
    if settings.source == "shipped":
        texts = _shipped(settings)
    else:
        from magicid import prompt_models

        make = prompt_models.openai_model if settings.source == "openai" else prompt_models.transformers_model
        count = settings.training + settings.heldout
        texts = sample_texts(make(settings), count, f"prompts.model {settings.model or settings.url}")
    splits = ["training"] * settings.training + ["heldout"] * settings.heldout
    return [Prompt(sha256_json(text)[:12], text, split) for text, split in zip(texts, splits)]


def for_class(prompt_text: str, class_word: str) -> str:
    """The prompt for one class word; the article before it agrees: "an old man"."""
    if class_word[:1].lower() in "aeiou":
        prompt_text = re.sub(r"\b([Aa]) (?=\{class_word\})", r"\1n ", prompt_text)
    return prompt_text.replace(TOKEN, class_word)


def shipped() -> list[str]:
    """Names of the shipped prompt sets."""
    folder = resources.files("magicid") / "prompt_sets"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def _shipped(settings: recipe.Prompts) -> list[str]:
    if settings.name not in shipped():
        raise RecipeError(f"no prompt set {settings.name!r}", f"set prompts.name to one of {', '.join(shipped())}")
    sets = json.loads((resources.files("magicid") / "prompt_sets" / f"{settings.name}.json").read_text())
    texts: list[str] = []
    for split, count in (("training", settings.training), ("heldout", settings.heldout)):
        if count > len(sets[split]):
            raise RecipeError(
                f"prompts.{split} = {count}, but the set {settings.name} has {len(sets[split])}",
                f"lower prompts.{split}, or set prompts.source to openai or transformers",
            )
        texts += sets[split][:count]
    return texts


def sample_texts(ask: Ask, count: int, name: str) -> list[str]:
    """`count` different prompt texts from a language model, asked in batches until there are enough.

    Args:
        name: of the model, for the error.

    Raises:
        RecipeError: three times as many batches as needed gave too few.
    """
    texts: list[str] = []
    answer = ""
    for seed in range(3 * -(-count // _BATCH)):
        missing = min(_BATCH, count - len(texts))
        request = _REQUEST.format(count=missing, token=TOKEN)
        if texts:
            request += _OTHERS + "\n".join(texts)
        answer = ask(request, seed)
        texts += [text for text in usable(answer) if text not in texts]
        if len(texts) >= count:
            return texts[:count]
    raise RecipeError(
        f"{name} gave {len(texts)} usable prompts of {count}; its last answer began {answer[:80]!r}",
        "use a stronger instruction-tuned model, ask for fewer prompts, or set prompts.source to shipped",
    )


def usable(answer: str) -> list[str]:
    """The usable prompts of a language model's answer: a JSON list, or one prompt per line; different ones, in order.

    Usable: one line with the token exactly once (a single "person" is taken for it), no other braces, up to 400
    characters.
    """
    texts: list[str] = []
    for candidate in _candidates(answer):
        text = " ".join(candidate.split())
        if TOKEN not in text:
            text = re.sub(r"\bperson\b", TOKEN, text)
        rest = text.replace(TOKEN, "", 1)
        words = len(rest.split())
        if rest != text and not set("{}") & set(rest) and words >= 3 and len(text) <= _MAX_LENGTH and text not in texts:
            texts.append(text)
    return texts


def _candidates(answer: str) -> Sequence[str]:
    start, end = answer.find("["), answer.rfind("]")
    if 0 <= start < end:
        try:
            return [item for item in json.loads(answer[start : end + 1]) if isinstance(item, str)]
        except ValueError:
            pass  # not JSON after all: read it line by line
    return [re.sub(r"^[\s\-*]*(\d+[.)])?\s*", "", line).strip(' ",') for line in answer.splitlines()]
