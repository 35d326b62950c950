"""Captions of reference photos, by the vision-language model that rates clips too.

What a photo is captioned decides what an adapter learns of it (docs/results.md): under what the photo shows, only the
person is new. Whatever the model calls the person is replaced by `{class_word}`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from magicid.clips import inflate_photo
from magicid.errors import MagicIDError
from magicid.manifests import ManifestRow
from magicid.photos import check_size, decode_photo
from magicid.prompts import TOKEN, for_class
from magicid.recipe import Recipe
from magicid.rewards.semantics import SemanticsReward
from magicid.schema import Rejected
from magicid.storage import file_size, public_name, read_bytes

_PEOPLE = ("person", "woman", "man", "girl", "boy")  # what a model may call somebody whom it was told to call otherwise


def caption_row(
    row: ManifestRow, model: SemanticsReward, recipe: Recipe, told: Callable[[], None] = lambda: None
) -> tuple[ManifestRow, list[Rejected]]:
    """The row with a caption for each photo that has none, and the photos that cannot be captioned, with reasons.

    Args:
        model: from the recipe's `rewards.semantics`.
        told: called after each photo.
    """
    captions, rejected = [], []
    for place, location in enumerate(row.photos):
        caption = row.captions[place] if row.captions else ""
        if not caption:
            try:
                caption = _caption(location, row.class_word, model, recipe)
            except MagicIDError as error:
                rejected.append(Rejected("photo", public_name(location), error.problem, error.action))
        captions.append(caption)
        told()
    return dataclasses.replace(row, captions=captions), rejected


def with_token(caption: str, class_word: str) -> str:
    """The caption with `{class_word}` where it first names the person; unchanged where it does not.

    "An old man in a kitchen." -> "An old {class_word} in a kitchen"
    """
    caption = caption.strip().rstrip(".")
    for word in (class_word, *_PEOPLE):
        named, found = re.subn(rf"\b{re.escape(word)}\b", TOKEN, caption, count=1, flags=re.IGNORECASE)
        if found:
            return named
    return caption


def record(row: ManifestRow) -> dict[str, Any]:
    """The row as one of a JSON-lines manifest; columns without a value are left out."""
    from datetime import UTC, datetime

    columns: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(row).items() if value not in (None, [], {})
    }
    if row.deadline is not None:
        columns["deadline"] = datetime.fromtimestamp(row.deadline, UTC).isoformat()
    return columns


def _caption(location: str, class_word: str, model: SemanticsReward, recipe: Recipe) -> str:
    sampling, limits = recipe.sampling, recipe.identities
    name = "/".join(public_name(location).rsplit("/", 2)[-2:])
    check_size(file_size(location), name, limits)
    photo = decode_photo(read_bytes(location), name, limits)
    clip = inflate_photo(photo, recipe.rewards.semantics_frames, sampling.height, sampling.width)
    return with_token(model.answer(clip, for_class(limits.caption_question, class_word), sampling.fps), class_word)
