"""Selection against a brute-force statement of the paper's sentences, one clip and one pair at a time."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicid import recipe
from magicid.schema import ScoredClip
from magicid.selection import dominates, lower_front, select_pairs, upper_front, with_identity_reward

NAN = math.nan


def clip(name: str, kind: str, identity=0.5, motion=1.0, semantics=5.0, prompt="p", **more) -> ScoredClip:
    values = {
        "clip_id": name, "kind": kind, "identity_id": None if kind == "V_s" else "ann", "method": "m",
        "prompt_id": prompt, "prompt": prompt, "seed": 0,
        "latents_uri": f"{name}.safetensors", "text_uri": f"text/{prompt}",
        "identity_reward": identity, "motion_reward": motion, "semantics_reward": semantics,
    }  # fmt: skip
    return ScoredClip(**{**values, **more})


def rules(**more) -> recipe.Selection:
    return recipe.Selection(**{"motion_tolerance": 1.0, **more})


def names(pairs, kind) -> list[tuple[str, str]]:
    return [(p.winner_id, p.loser_id) for p in pairs if p.kind == kind]


# --- the fronts


def better_in_all(a, b) -> bool:
    if any(math.isnan(x) for x in (*a, *b)):
        return False
    return all(x > y for x, y in zip(a, b))


def brute_fronts(rows):
    complete = [not any(math.isnan(x) for x in row) for row in rows]
    upper = [c and not any(better_in_all(other, row) for other in rows) for c, row in zip(complete, rows)]
    lower = [c and not any(better_in_all(row, other) for other in rows) for c, row in zip(complete, rows)]
    return upper, lower


tied = st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN])
continuous = st.one_of(st.floats(-10, 10), st.just(NAN))
matrices = st.tuples(st.integers(1, 3), st.sampled_from([tied, continuous])).flatmap(
    lambda form: st.lists(st.lists(form[1], min_size=form[0], max_size=form[0]), max_size=14)
)


@settings(max_examples=1500, deadline=None)
@given(matrices)
def test_fronts_are_the_papers_sentences(rows) -> None:
    matrix = np.array(rows, dtype=float).reshape(len(rows), -1 if rows else 3)
    upper, lower = brute_fronts(rows)
    assert upper_front(matrix).tolist() == upper
    assert lower_front(matrix).tolist() == lower


def test_fronts_of_random_and_tied_matrices_larger_than_one_chunk() -> None:
    rng = np.random.default_rng(0)
    for tie in (False, True):
        matrix = rng.integers(0, 12, (700, 3)).astype(float) if tie else rng.normal(size=(700, 3))
        matrix[rng.random(matrix.shape) < 0.02] = NAN
        better = (matrix[:, None] > matrix[None]).all(-1)  # comparisons with NaN are false
        complete = ~np.isnan(matrix).any(1)
        better &= complete[:, None] & complete[None]
        assert (upper_front(matrix) == (complete & ~better.any(0))).all()
        assert (lower_front(matrix) == (complete & ~better.any(1))).all()


def test_fronts_by_hand() -> None:
    rewards = np.array([[3, 3, 3], [1, 1, 1], [2, 2, 2], [3, 0, 3], [NAN, 9, 9], [0, 0, 0]], dtype=float)
    # Row 3 is dominated by nobody: row 0 equals it in the first reward. The row with a NaN dominates nobody.
    assert upper_front(rewards).tolist() == [True, False, False, True, False, False]
    assert lower_front(rewards).tolist() == [False, False, False, True, False, True]


def test_all_equal_and_tiny_inputs() -> None:
    equal = np.ones((4, 3))
    assert upper_front(equal).all()
    assert lower_front(equal).all()
    assert upper_front(np.zeros((0, 3))).shape == (0,)
    assert lower_front(np.ones((1, 3))).tolist() == [True]
    with pytest.raises(ValueError, match="shape"):
        upper_front(np.ones(3))


def test_dominates_is_strict_on_all_rewards() -> None:
    assert dominates(np.array([2.0, 2, 2]), np.array([1.0, 1, 1]))
    assert not dominates(np.array([2.0, 2, 1]), np.array([1.0, 1, 1]))
    assert not dominates(np.array([2.0, NAN, 2]), np.array([1.0, 1, 1]))


# --- the pairs


def brute_pairs(clips, rule):
    """(P_id, P_dy) as lists of (winner, loser), straight from the sentences of the method."""
    complete = [c for c in clips if None not in (c.identity_reward, c.motion_reward, c.semantics_reward)]

    def gap(winner, loser):
        return winner.identity_reward - loser.identity_reward

    def by_gap(pairs):
        return sorted(pairs, key=lambda p: (-gap(*p), p[0].clip_id, p[1].clip_id))

    static = []
    for winner in complete:
        for loser in complete:
            if winner.kind == "V_id" and loser.kind == "V_s":
                loss_of_motion = loser.motion_reward - winner.motion_reward
                if loss_of_motion <= rule.motion_tolerance and gap(winner, loser) > rule.min_identity_gap:
                    static.append((winner, loser))
    sampled = [c for c in complete if c.kind in ("V_s", "V_t")]
    rewards = [(c.identity_reward, c.motion_reward, c.semantics_reward) for c in sampled]
    on_upper, on_lower = brute_fronts(rewards)
    dynamic = []
    for winner, up in zip(sampled, on_upper):
        for loser, low in zip(sampled, on_lower):
            if up and low and winner is not loser and gap(winner, loser) > max(0, rule.min_identity_gap):
                dynamic.append((winner, loser))
    same = by_gap([p for p in dynamic if p[0].prompt == p[1].prompt])
    if rule.same_prompt and len(same) >= rule.dynamic_pairs:
        chosen = same[: rule.dynamic_pairs]
    elif rule.same_prompt:
        cross = by_gap([p for p in dynamic if p[0].prompt != p[1].prompt])
        chosen = by_gap(same + cross[: rule.dynamic_pairs - len(same)])
    else:
        chosen = by_gap(dynamic)[: rule.dynamic_pairs]
    ids = [[(a.clip_id, b.clip_id) for a, b in pairs] for pairs in (by_gap(static)[: rule.static_pairs], chosen)]
    return ids[0], ids[1]


def values(low, high):
    return st.one_of(st.none(), st.integers(low, high).map(float), st.floats(low, high).map(lambda x: round(x, 2)))


drawn_clips = st.lists(
    st.tuples(
        st.sampled_from(["V_s", "V_t", "V_id"]), values(-1, 1), values(0, 4), values(1, 10), st.sampled_from("pq")
    ),
    max_size=14,
)
drawn_rules = st.builds(
    rules,
    static_pairs=st.integers(0, 6),
    dynamic_pairs=st.integers(0, 6),
    motion_tolerance=st.sampled_from([0.0, 0.5, 2.0]),
    min_identity_gap=st.sampled_from([-0.5, 0.0, 0.2]),
    same_prompt=st.booleans(),
)


@settings(max_examples=800, deadline=None)
@given(drawn_clips, drawn_rules, st.integers(0, 9))
def test_pairs_are_the_papers_sentences(drawn, rule, order: int) -> None:
    clips = [clip(f"{i:02d}", k, a, b, c, prompt=p) for i, (k, a, b, c, p) in enumerate(drawn)]
    shuffled = random.Random(order).sample(clips, len(clips))
    selected = select_pairs("ann", shuffled, rule)
    static, dynamic = brute_pairs(clips, rule)
    assert names(selected.pairs, "P_id") == static
    assert names(selected.pairs, "P_dy") == dynamic
    by_id = {c.clip_id: c for c in clips}
    for pair in selected.pairs:
        winner, loser = by_id[pair.winner_id], by_id[pair.loser_id]
        assert pair.prompt == (loser if pair.kind == "P_id" else winner).prompt
        assert pair.text_uri == f"text/{pair.prompt}"
        assert pair.winner_latents_uri == winner.latents_uri
        assert pair.loser_rewards == [loser.identity_reward, loser.motion_reward, loser.semantics_reward]
    assert [p.rank for p in selected.pairs] == [*range(len(static)), *range(len(dynamic))]
    assert selected == select_pairs("ann", clips, rule)
    if not selected.pairs:
        assert any(r.kind == "pair" for r in selected.dropped)


def test_static_pairs_by_hand() -> None:
    photos = [clip("a", "V_id", 0.9, 0.0, prompt="a person"), clip("b", "V_id", 0.8, 0.0, prompt="a person")]
    base = [clip("s", "V_s", 0.1, 0.9, prompt="nods"), clip("t", "V_s", 0.3, 1.0, prompt="jumps")]
    lively = clip("u", "V_s", 0.0, 1.1)
    selected = select_pairs("ann", [*photos, *base, lively], rules(static_pairs=3))
    assert names(selected.pairs, "P_id") == [("a", "s"), ("b", "s"), ("a", "t")]  # u moves too much
    first = selected.pairs[0]
    assert (first.prompt, first.text_uri, first.winner_kind, first.loser_kind) == ("nods", "text/nods", "V_id", "V_s")
    problems = [r.problem for r in selected.dropped]
    assert "2 P_id candidates left out: beyond selection.motion_tolerance" in problems
    assert "1 P_id candidates left out: beyond selection.static_pairs" in problems


def test_dynamic_pairs_prefer_one_prompt_while_there_are_enough() -> None:
    clips = [
        clip("w", "V_t", 0.9, 3, 9, prompt="nods"), clip("x", "V_s", 0.4, 1, 3, prompt="nods"),
        clip("y", "V_s", 0.1, 1, 3, prompt="jumps"),
    ]  # fmt: skip
    for same, count, expected in (
        (True, 1, [("w", "x")]), (True, 2, [("w", "y"), ("w", "x")]), (False, 1, [("w", "y")]),
    ):  # fmt: skip
        selected = select_pairs("ann", clips, rules(dynamic_pairs=count, same_prompt=same))
        assert names(selected.pairs, "P_dy") == expected
        assert {p.prompt for p in selected.pairs} == {"nods"}
        assert (selected.upper, selected.lower) == (["w"], ["x", "y"])


def test_everything_dropped_has_a_reason() -> None:
    clips = [
        clip("a", "V_s", identity=None, identity_error="no face was found in any frame"),
        clip("b", "V_t", motion=NAN, motion_error="it broke"),
        clip("c", "V_t", error="three tries failed", latents_uri=None),
        clip("d", "V_id"),
        clip("e", "V_id", identity_id="bob"),
    ]
    selected = select_pairs("ann", clips, rules())
    assert selected.pairs == selected.upper == selected.lower == []
    reasons = {r.name: r.problem for r in selected.dropped if r.kind == "clip"}
    assert reasons == {
        "a": "V_s: no identity reward: no face was found in any frame",
        "b": "V_t: no motion reward: it broke",
        "c": "V_t: three tries failed",
    }
    problems = [r.problem for r in selected.dropped if r.kind == "pair"]
    assert problems == [
        "no P_id pair: 1 complete V_id and 0 complete V_s clips", "no P_dy pair: no complete V_s or V_t clip",
    ]  # fmt: skip


def test_a_static_winner_without_any_partner_is_named() -> None:
    clips = [clip("still", "V_id", 0.9, 0.0), clip("alike", "V_id", 0.1, 3.0), clip("s", "V_s", 0.2, 2.0)]
    reasons = {r.name: r.problem for r in select_pairs("ann", clips, rules()).dropped if r.kind == "clip"}
    assert reasons == {
        "still": "V_id: no P_id pair: every V_s clip moves more than 1 px per frame more than it",
        "alike": "V_id: no P_id pair: the gap in R_id is not above 0",
    }


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_equal_clips_make_no_pair(count: int) -> None:
    clips = [clip(f"{i}", kind) for i, kind in enumerate(["V_t", "V_s", "V_id", "V_t", "V_s"][:count])]
    selected = select_pairs("ann", clips, rules())
    assert selected.pairs == []
    assert {r.problem.split(":")[0] for r in selected.dropped if r.kind == "pair"} >= {"no P_id pair", "no P_dy pair"}


def test_pair_ids_are_content_addresses() -> None:
    clips = [clip("a", "V_id", 0.9), clip("s", "V_s", 0.1)]
    (pair,) = select_pairs("ann", clips, rules()).pairs
    (same,) = select_pairs("ann", [dataclasses.replace(c, motion_reward=0.7) for c in clips], rules()).pairs
    (other,) = select_pairs("ann", [clips[0], clip("s", "V_s", 0.1, prompt="q")], rules()).pairs
    assert pair.pair_id == same.pair_id
    assert len({pair.pair_id, other.pair_id}) == 2
    assert len(pair.pair_id) == 32


def test_identity_rewards_are_dot_products() -> None:
    clips = [
        clip("a", "V_s", None, embeddings=[[1.0, 0.0], None, [0.6, 0.8]]),
        clip("b", "V_s", None, embeddings=[None, None]),
        clip("c", "V_s", None, identity_error="the face detector failed"),
        clip("d", "V_s", None, embeddings=[[1.0, 0.0, 0.0]]),
    ]
    a, b, c, d = with_identity_reward(clips, [[1.0, 0.0], [0.0, 1.0]])
    assert a.identity_reward == pytest.approx((1.0 + 0.0 + 0.6 + 0.8) / 4)
    assert (a.identity_error, b.identity_reward, c.identity_reward, d.identity_reward) == (None, None, None, None)
    assert b.identity_error == "no face was found in any frame"
    assert c.identity_error == "the face detector failed"
    assert "do not fit the references" in (d.identity_error or "")
    assert clips[0].identity_reward is None


def test_thousands_of_clips_are_selected_quickly() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(4000, 3))
    assert 0 < upper_front(matrix).sum() < 400
    assert 0 < lower_front(matrix).sum() < 400


# --- fewer rewards: the rows of Table 3


def test_by_identity_alone_all_clips_are_in_one_order() -> None:
    clips = [clip("s", "V_id", 0.9, motion=None, semantics=None), clip("b", "V_s", 0.1, motion=9.0, semantics=None)]
    clips += [clip(f"t{i}", "V_t", r, motion=None, semantics=None) for i, r in enumerate((0.2, 0.3, 0.6))]
    found = select_pairs("ann", clips, rules(rewards="id", motion_tolerance=0.0, dynamic_pairs=4)).pairs
    assert names(found, "P_id") == [("s", "b")]  # no tolerance where motion does not count
    assert names(found, "P_dy") == [("t2", "b"), ("t2", "t0"), ("t2", "t1"), ("t1", "b")]


def test_without_the_prompt_reward_two_decide() -> None:
    # fast dominates slow in identity and motion, and is the worse in the prompt
    clips = [
        clip("fast", "V_t", 0.6, 2.0, 1.0),
        clip("slow", "V_t", 0.5, 1.0, 9.0),
        clip("none", "V_t", 0.4, 0.5, None),
    ]
    assert names(select_pairs("ann", clips, rules(rewards="id+dy")).pairs, "P_dy") == [("fast", "none")]
    both = select_pairs("ann", clips, rules(rewards="all"))
    assert ("fast", "slow") in names(both.pairs, "P_dy")  # neither dominates: each is on both fronts
    assert [rejected.name for rejected in both.dropped if rejected.kind == "clip"] == ["none"]


def test_one_kind_of_pair_alone() -> None:
    clips = [clip("s", "V_id", 0.9), clip("b", "V_s", 0.1), clip("t", "V_t", 0.5, 2.0, 9.0)]
    assert {p.kind for p in select_pairs("ann", clips, rules(dynamic_pairs=0)).pairs} == {"P_id"}
    assert {p.kind for p in select_pairs("ann", clips, rules(static_pairs=0)).pairs} == {"P_dy"}


def test_a_static_winner_is_trained_under_its_losers_prompt_or_its_own() -> None:
    photo, base = clip("photo", "V_id", 0.9, prompt="a person"), clip("base", "V_s", 0.1, prompt="a person nods")
    for static_prompt, prompt in (("loser", "a person nods"), ("own", "a person")):
        (pair,) = select_pairs("ann", [photo, base], rules(static_prompt=static_prompt)).pairs
        assert (pair.winner_id, pair.prompt, pair.text_uri) == ("photo", prompt, f"text/{prompt}")


def test_a_moving_clip_is_preferred_to_its_own_first_frame() -> None:
    clips = [clip("slow", "V_t", motion=1.0), clip("fast", "V_t", motion=3.0), clip("mid", "V_t", motion=2.0)]
    clips += [clip("blind", "V_t", None, 9.0, identity_error="no face"), clip("alone", "V_t", motion=8.0)]
    clips += [
        clip(f"{name}-still", "V_still", None, None, None, source_id=name) for name in ("slow", "fast", "mid", "blind")
    ]
    chosen = select_pairs("ann", clips, rules(still_pairs=2, static_pairs=0, dynamic_pairs=0))
    assert names(chosen.pairs, "P_still") == [("fast", "fast-still"), ("mid", "mid-still")]
    assert [(p.rank, p.prompt, p.text_uri, p.loser_kind) for p in chosen.pairs] == [
        (0, "p", "text/p", "V_still"),
        (1, "p", "text/p", "V_still"),
    ]
    assert [p.loser_latents_uri for p in chosen.pairs] == ["fast-still.safetensors", "mid-still.safetensors"]
    assert {r.name for r in chosen.dropped if r.kind == "clip"} == {"blind"}, "a copy needs no rewards"
    assert select_pairs("ann", clips, rules(static_pairs=0, dynamic_pairs=0)).pairs == []
    none = select_pairs("ann", clips[:5], rules(still_pairs=2, static_pairs=0, dynamic_pairs=0))
    assert "no P_still pair: 4 complete V_t and 0 V_still clips" in [r.problem for r in none.dropped]
