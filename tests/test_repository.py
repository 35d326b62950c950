"""What clips a run wants of a person's photos."""

from __future__ import annotations

from magicid import recipe as recipes
from magicid.repository import moving_clips, static_clips
from magicid.schema import Identity

PERSON = Identity(
    "ada", "x", ["1.png", "2.png"], class_word="woman", captions=["a {class_word} stands in the snow", ""]
)
BASE = "0" * 64


def test_photos_are_under_their_captions_and_moving_copies_are_not() -> None:
    recipe = recipes.load("face-world", {"sft.moving": 1, "sft.prompt": "a {class_word}"})
    photos, copies = static_clips(recipe, BASE, PERSON), moving_clips(recipe, BASE, PERSON)
    assert [clip.prompt for clip in photos] == ["a woman stands in the snow", "a woman"]
    assert [clip.prompt for clip in copies] == ["a woman", "a woman"]  # nobody stands in a picture that moves
    assert len({clip.clip_id for clip in (*photos, *copies)}) == 4


def test_captions_can_be_turned_off_and_another_caption_is_another_clip() -> None:
    told, untold = (recipes.load("face-world", {"sft.captions": value}) for value in (True, False))
    (first, second), (first_untold, second_untold) = (static_clips(r, BASE, PERSON) for r in (told, untold))
    assert first_untold.prompt == second_untold.prompt == "a woman"
    assert first.clip_id != first_untold.clip_id
    assert second.clip_id == second_untold.clip_id
