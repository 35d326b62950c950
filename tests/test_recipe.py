"""Recipes: every shipped one parses, unknown keys are refused with the nearest known one, overrides are typed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from magicid import recipe
from magicid.errors import RecipeError


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_shipped_recipe_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    loaded = recipe.load(name)
    copy = tmp_path / "copy.toml"
    copy.write_text(loaded.to_toml())
    assert loaded.name == name
    assert recipe.load(copy) == loaded
    assert recipe.load(copy).sha256 == loaded.sha256


def test_four_recipes_are_shipped() -> None:
    assert recipe.shipped() == ["face-world", "hunyuan-480p", "hunyuan-paper", "wan-480p"]


def test_the_paper_recipe_holds_the_papers_numbers() -> None:
    paper = recipe.load("hunyuan-paper")
    assert (paper.sampling.frames, paper.sampling.height, paper.sampling.width) == (61, 720, 1280)
    assert (paper.sampling.steps, paper.sampling.guidance_scale, paper.sampling.true_cfg_scale) == (50, 6.0, 1.0)
    assert (paper.repository.trained_clips, paper.repository.base_clips) == (100, 20)
    assert (paper.sft.steps, paper.hpo.steps, paper.hpo.learning_rate, paper.hpo.weight_decay) == (
        1000,
        5000,
        2e-5,
        1e-4,
    )
    assert paper.selection.dynamic_pairs == 100


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hpo.betta", 5, "did you mean 'hpo.beta'?"),
        ("hop", 5, "did you mean 'hpo'?"),
        ("sampling.frames", 12, "must be 4k+1"),
        ("hpo.learning_rate", -1, "hpo.learning_rate = -1 is not possible"),
        ("trainer.zero_stage", 4, "trainer.zero_stage = 4 is not possible"),
        ("hpo.steps", "many", "hpo.steps = 'many' is not possible"),
        ("sampling.height", 40, "sampling.height = 40 is not possible: must be a multiple of 16; the nearest is 32"),
        ("sampling.width", 57, "sampling.width = 57 is not possible: must be a multiple of 16; the nearest is 64"),
        ("identities.min_photos", 21, "identities: min_photos = 21 is more than max_photos = 20"),
        ("rewards.motion_range", [4, 4], "rewards.motion_range = [4, 4] is not possible: the first number"),
        ("rewards.identity_range", [1, 0], "rewards.identity_range = [1, 0] is not possible: the first number"),
        ("rewards.motion_range", [0, math.inf], "rewards.motion_range.1 = inf is not possible"),
        ("rewards.semantics_frames", 14, "rewards.semantics_frames = 14 is more than sampling.frames = 13"),
        ("hpo.beta", math.inf, "hpo.beta = inf is not possible"),
        ("selection.motion_tolerance", math.nan, "selection.motion_tolerance = nan is not possible"),
    ],
)
def test_a_wrong_key_or_value_is_named(key: str, value: object, expected: str) -> None:
    with pytest.raises(RecipeError, match="recipe face-world") as caught:
        recipe.load("face-world", {key: value})
    assert expected in str(caught.value)


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'face-world'"):
        recipe.load("faceworld")


def test_an_override_changes_the_value_and_the_hash() -> None:
    plain, changed = recipe.load("face-world"), recipe.load("face-world", {"hpo.beta": 17})
    assert changed.hpo.beta == 17
    assert changed.sha256 != plain.sha256


def test_other_resources_make_the_same_things() -> None:
    plain, moved = recipe.load("face-world"), recipe.load("face-world", {"resources.slots": 9})
    assert moved.sha256 != plain.sha256
    assert moved.content_sha256 == plain.content_sha256
    assert recipe.load("face-world", {"hpo.beta": 17}).content_sha256 != plain.content_sha256


def test_pool_cpus_by_hand() -> None:
    pools = {"generator": {"min_size": 2, "max_size": 8, "cpus": 3}, "motion": {"min_size": 4, "cpus": 0.5}}
    assert recipe.Resources.model_validate(pools).pool_cpus() == 2 * 3 + 1 + 4 * 0.5 + 1


def test_an_identity_overrides_training_only() -> None:
    base = recipe.load("face-world")
    assert base.for_identity({"hpo.steps": "7", "sft.learning_rate": "1e-5"}).hpo.steps == 7
    with pytest.raises(RecipeError, match=r"cannot override 'backbone\.path'"):
        base.for_identity({"backbone.path": "/etc"})


@pytest.mark.parametrize(
    ("text", "value"), [("5", 5), ("1e-4", 1e-4), ("true", True), ('"x"', "x"), ("some/path", "some/path")]
)
def test_command_line_values_are_toml(text: str, value: object) -> None:
    assert recipe.parse_value(text) == value
