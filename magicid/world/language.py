"""The closed language of the face world: captions for (action, place) pairs and their parser."""

from __future__ import annotations

import re

ACTIONS: tuple[str, ...] = (
    "nods",
    "shakes the head",
    "walks across",
    "jumps",
    "turns around",
    "leans in",
    "talks",
    "tilts the head",
)
_ACTIONS_ONGOING: tuple[str, ...] = (
    "nodding",
    "shaking the head",
    "walking across",
    "jumping",
    "turning around",
    "leaning in",
    "talking",
    "tilting the head",
)
PLACES: tuple[str, ...] = ("kitchen", "beach", "forest", "city at night", "desert", "office", "snow", "garden")
PLACE_PHRASES: tuple[str, ...] = (
    "in the kitchen",
    "on the beach",
    "in the forest",
    "in the city at night",
    "in the desert",
    "in the office",
    "in the snow",
    "in the garden",
)
CLASS_WORDS: tuple[str, ...] = ("person", "man", "woman", "boy", "girl")
VARIANTS = 4
STILL = -1
"""Action index of a clip in which nobody does anything (``caption(None, ...)``)."""

# The first word of each phrase decides; both verb forms are accepted.
_ACTION_WORDS = {form.split()[0]: index for forms in (ACTIONS, _ACTIONS_ONGOING) for index, form in enumerate(forms)}
_PLACE_WORDS = {name.split()[0]: index for index, name in enumerate(PLACES)}


def caption(action: int | None, place: int, *, class_word: str = "person", variant: int = 0) -> str:
    """Prompt that names one action and one place.

    Args:
        action: index into ``ACTIONS``; ``None`` or ``STILL`` for a person who does nothing.
        place: index into ``PLACES``.
        class_word: the noun for the person, normally one of ``CLASS_WORDS``.
        variant: 0 is canonical, 1 .. ``VARIANTS`` - 1 are paraphrases.

    Raises:
        IndexError: ``action``, ``place`` or ``variant`` out of range.
    """
    if not 0 <= place < len(PLACES):
        raise IndexError(f"place {place} is not in 0..{len(PLACES) - 1}")
    if not 0 <= variant < VARIANTS:
        raise IndexError(f"variant {variant} is not in 0..{VARIANTS - 1}")
    where = PLACE_PHRASES[place]
    if action is None or action == STILL:
        return (
            f"a {class_word} {where}",
            f"{where}, a {class_word}",
            f"a video of a {class_word} {where}",
            f"a {class_word} is {where}",
        )[variant]
    if not 0 <= action < len(ACTIONS):
        raise IndexError(f"action {action} is not in 0..{len(ACTIONS) - 1}")
    does, doing = ACTIONS[action], _ACTIONS_ONGOING[action]
    return (
        f"a {class_word} {does} {where}",
        f"{where}, a {class_word} {does}",
        f"a video of a {class_word} who {does} {where}",
        f"a {class_word} is {doing} {where}",
    )[variant]


def parse(prompt: str) -> tuple[int | None, int | None]:
    """(action, place) named by ``prompt``; ``None`` where none, or more than one, is named."""
    words = re.findall(r"[a-z]+", prompt.lower())
    actions = {_ACTION_WORDS[word] for word in words if word in _ACTION_WORDS}
    places = {_PLACE_WORDS[word] for word in words if word in _PLACE_WORDS}
    return (
        actions.pop() if len(actions) == 1 else None,
        places.pop() if len(places) == 1 else None,
    )


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted, plus a few words for plain descriptions of photos."""
    words = set(CLASS_WORDS) | {"photo", "portrait", "face", "and", "the", "of"}
    for action in (None, *range(len(ACTIONS))):
        for place in range(len(PLACES)):
            for variant in range(VARIANTS):
                words.update(re.findall(r"[a-z]+", caption(action, place, variant=variant)))
    return sorted(words)
