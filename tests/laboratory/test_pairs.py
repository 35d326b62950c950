"""Other readings of the pairs, on clips whose rewards are written down by hand."""

from __future__ import annotations

from magicid import recipe, schema
from magicid.laboratory.clips import still_copy
from magicid.laboratory.methods import BOTH, ONLY_DYNAMIC, ONLY_STATIC, Variant
from magicid.laboratory.pairs import make_pairs
from magicid.schema import ScoredClip

SETTINGS = recipe.load("face-world", {"selection.still_pairs": 0}).selection


def clip(name: str, kind: str, identity: float, motion: float, semantics: float, **more: object) -> ScoredClip:
    owner = None if kind == schema.BASE_CLIP else "ada"
    fields: dict[str, object] = {"prompt": f"at {name}", "seed": 0, **more}
    return ScoredClip(
        clip_id=name, kind=kind, identity_id=owner, method="", prompt_id="", latents_uri="memory", embeddings=[[1.0]],
        identity_reward=identity, motion_reward=motion, semantics_reward=semantics, **fields,
    )  # type: ignore[arg-type]  # fmt: skip


STILL = clip("photo", schema.STATIC_CLIP, 0.9, 0.0, 5.0)
BASE = clip("base", schema.BASE_CLIP, 0.0, 0.5, 5.0)
GOOD = clip("good", schema.TRAINED_CLIP, 0.3, 0.6, 9.0)
STIFF = clip("stiff", schema.TRAINED_CLIP, 0.4, 0.1, 9.5)
CLIPS = [STILL, BASE, GOOD, STIFF]


def sides(readings: str, pairs: str = BOTH, foreign: tuple[ScoredClip, ...] = ()) -> set[tuple[str, str]]:
    variant = Variant("hpo", pairs, readings=frozenset(readings.split()))
    made = make_pairs(variant, "ada", CLIPS, foreign, SETTINGS)
    return {(pair.winner_id, pair.loser_id) for pair in made}


def test_the_letter_takes_the_widest_gap_even_where_motion_is_lost() -> None:
    assert ("stiff", "base") in sides("")


def test_dominating_winners_move_more_than_their_losers() -> None:
    assert sides("dominates") == {("photo", "base"), ("good", "base")}
    assert sides("by-motion") == {("photo", "base"), ("good", "base")}
    assert sides("dominates", ONLY_STATIC) == {("photo", "base")}


def test_still_copies_are_the_trainers_own_in_every_reading() -> None:
    clips, settings = [*CLIPS, *map(still_copy, (GOOD, STIFF))], SETTINGS.model_copy(update={"still_pairs": 1})
    for readings in ("", "by-motion"):
        made = make_pairs(Variant("hpo", readings=frozenset(readings.split())), "ada", clips, (), settings)
        assert [(p.winner_id, p.loser_id) for p in made if p.kind == "P_still"] == [("good", "good/still")]
    assert {p.kind for p in make_pairs(Variant("p_dy", ONLY_DYNAMIC), "ada", clips, (), settings)} == {"P_dy"}


def test_a_winner_encoded_again_differs_from_its_still_copy_in_motion_alone() -> None:
    clips, settings = [*CLIPS, still_copy(GOOD)], SETTINGS.model_copy(update={"still_pairs": 1})
    made = make_pairs(Variant("hpo", readings=frozenset({"reencoded"})), "ada", clips, (), settings)
    assert [(p.winner_id, p.loser_id) for p in made if p.kind == "P_still"] == [("good/again", "good/still")]


def test_a_moving_copy_of_the_photo_wins_where_the_photo_would() -> None:
    moving = [clip(name, schema.MOVING_CLIP, 0.0, 0.0, 0.0, prompt="a person") for name in ("one", "two")]
    made = make_pairs(Variant("hpo", readings=frozenset({"panned"})), "ada", [*CLIPS, *moving], (), SETTINGS)
    assert [(p.winner_id, p.loser_id, p.winner_kind) for p in made if p.kind == "P_id"] == [("one", "base", "V_mov")]
    assert {(p.winner_id, p.loser_id) for p in made if p.kind == "P_dy"} == sides("", ONLY_DYNAMIC)


def test_a_floor_keeps_out_winners_that_are_less_like_the_person_than_half_of_the_clips() -> None:
    unlike = clip(
        "unlike", schema.TRAINED_CLIP, 0.1, 0.9, 9.9
    )  # on the upper front for its motion, under the median of 0.3
    clips, settings = [*CLIPS, unlike], SETTINGS
    letter = make_pairs(Variant("hpo", ONLY_DYNAMIC), "ada", clips, (), settings)
    floored = make_pairs(Variant("hpo", ONLY_DYNAMIC, readings=frozenset({"floor"})), "ada", clips, (), settings)
    assert {p.winner_id for p in letter} == {"stiff", "good", "unlike"}
    assert {p.winner_id for p in floored} == {"stiff", "good"}
    few = settings.model_copy(update={"dynamic_pairs": 1})
    assert len(make_pairs(Variant("hpo", ONLY_DYNAMIC, readings=frozenset({"floor"})), "ada", clips, (), few)) == 1


def test_another_person_of_the_same_prompt_and_seed_loses() -> None:
    same = clip("bo", schema.TRAINED_CLIP, 0.0, 0.6, 9.0, prompt=GOOD.prompt)
    other = clip("cy", schema.TRAINED_CLIP, 0.0, 0.6, 9.0, prompt=GOOD.prompt, seed=1)
    assert {pair for pair in sides("others", foreign=(other, same)) if pair[1] in ("bo", "cy")} == {("good", "bo")}


def test_a_setting_names_what_differs() -> None:
    variant = Variant(
        "hpo", overrides={"hpo.beta": 600.0, "sft.steps": 120}, readings=frozenset(["others", "dominates"])
    )
    assert variant.setting == "hpo.beta=600, sft.steps=120, dominates, others"
    assert Variant("hpo", overrides={"hpo.beta": 600.0}, named=False).setting == ""
