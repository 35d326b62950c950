"""A part of a plan: what is asked for, and nothing that the plan does not have."""

from __future__ import annotations

import pytest

from magicid.laboratory.methods import DEV_MOVING, TEST, only


def test_methods_and_seeds_that_are_asked_for_are_kept() -> None:
    part = only(TEST, ["hpo", "dreambooth"], [1])
    assert [variant.method for variant in part.variants] == ["hpo"]
    assert (part.frames_steps, part.tokens_steps, part.true_steps, part.train_seeds) == ((120, 170), (), (), (1,))
    assert part.sft_steps == TEST.sft_steps
    assert only(TEST, None, None) == TEST


@pytest.mark.parametrize(
    ("methods", "seeds", "named"),
    [
        (["hpo", "hop"], None, "method hop; it has beyond, dreambooth"),
        (None, [0, 7], "training seed 7; it has 0, 1, 2"),
    ],
)
def test_what_the_plan_does_not_have_is_named(methods: list[str] | None, seeds: list[int] | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        only(TEST, methods, seeds)
    with pytest.raises(ValueError, match="dreambooth"):
        only(DEV_MOVING, ["dreambooth"], None)
