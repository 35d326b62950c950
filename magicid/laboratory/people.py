"""People of the face world who were in no training: their photos, and what they are asked to do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magicid.prompts import for_class, load_prompts
from magicid.recipe import Recipe
from magicid.world import language
from magicid.world.renderer import photo_places, render_photos, sample_people

CLASS_WORD = "person"
SEED = 880_000  # far from the seeds of every training


@dataclass(frozen=True)
class Person:
    """One person.

    Attributes:
        name: `dev-0`, ... for choosing settings, `test-0`, ... for what is reported.
        photos: uint8 RGB (P, 96, 96, 3).
        captions: what each photo shows: the person in its place.
    """

    name: str
    photos: NDArray[np.uint8]
    captions: tuple[str, ...]


def people(group: str, count: int, photos: int = 6) -> list[Person]:
    """`count` people of the group `dev` or `test`; the groups share nobody."""
    offset = {"dev": 0, "test": 1}[group]
    looks = sample_people(count, SEED + offset)
    found = []
    for i, look in enumerate(looks):
        seed = SEED + 10 * i + offset
        captions = tuple(language.caption(None, place, class_word=CLASS_WORD) for place in photo_places(photos, seed))
        found.append(Person(f"{group}-{i}", render_photos(look, photos, seed), captions))
    return found


def heldout_actions(recipe: Recipe, group: str) -> tuple[list[int], list[int], list[int]]:
    """Actions, places and noise seeds of the held-out prompts that name both: what the renderer can be asked."""
    pairs = [language.parse(prompt) for prompt in heldout_prompts(recipe, group)]
    known = [(action, place) for action, place in pairs if action is not None and place is not None]
    seeds = [recipe.evaluation.seed + i for i in range(len(known))]
    return [action for action, _ in known], [place for _, place in known], seeds


def heldout_prompts(recipe: Recipe, group: str) -> list[str]:
    """The held-out prompts of a group: the first half for `dev`, the second for `test`."""
    heldout = [for_class(p.text, CLASS_WORD) for p in load_prompts(recipe.prompts) if p.split == "heldout"]
    half = len(heldout) // 2
    return heldout[:half] if group == "dev" else heldout[half:]
