"""Captions of photos by the face world's vision-language model, loaded as production loads its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magicid.captions import with_token
from magicid.cli import app
from magicid.identities import read_manifest

EXAMPLES = Path(__file__).parent.parent / "examples" / "identities"
cli = CliRunner()


@pytest.mark.parametrize(
    ("said", "class_word", "caption"),
    [
        ("a person in the snow", "person", "a {class_word} in the snow"),
        ("An old man in a kitchen.", "old man", "An {class_word} in a kitchen"),
        ("A Woman on a beach", "singer", "A {class_word} on a beach"),
        ("a personal note, and a person", "person", "a personal note, and a {class_word}"),
        ("a man beside a man", "man", "a {class_word} beside a man"),
        ("a dog", "person", "a dog"),
    ],
)
def test_the_person_is_named_by_the_token(said: str, class_word: str, caption: str) -> None:
    assert with_token(said, class_word) == caption


def test_photos_are_captioned_and_what_is_captioned_stays(tmp_path: Path) -> None:
    (truth,) = [json.loads(line) for line in (EXAMPLES / "manifest.jsonl").read_text().splitlines() if '"ada"' in line]
    shutil.copytree(EXAMPLES / "ada", tmp_path / "ada")
    (tmp_path / "ada" / "02.png").write_text("this is no picture")
    row = {**truth, "captions": ["mine: a {class_word}", "", "", "", ""], "deadline": "2030-01-01T00:00:00+00:00",
           "recipe.hpo.beta": 9}  # fmt: skip
    (tmp_path / "people.jsonl").write_text(json.dumps(row) + "\n")
    out = str(tmp_path / "captioned.jsonl")
    result = cli.invoke(
        app, ["identities", "caption", str(tmp_path / "people.jsonl"), "--out", out, "--device", "cpu"],
        env={"COLUMNS": "500"},
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert "ada/02.png is text, not an image" in result.output
    (before,), _ = read_manifest(str(tmp_path / "people.jsonl"))
    (after,), rejected = read_manifest(out)
    assert rejected == []
    assert after.captions == ["mine: a {class_word}", "", *truth["captions"][2:]], "the truth, by the model"
    for name in ("id", "photos", "owner", "class_word", "consent", "priority", "deadline", "overrides"):
        assert getattr(after, name) == getattr(before, name), name


def test_a_recipe_without_its_model_says_so(tmp_path: Path) -> None:
    out = tmp_path / "captioned.jsonl"
    result = cli.invoke(
        app, ["identities", "caption", str(EXAMPLES), "--out", str(out), "--rewards.semantics=models/none"]
    )
    assert result.exit_code == 2
    assert "models/none" in result.stderr
    assert not out.exists()
