"""The comparison of generated clips with the renderer's: what is asked, what is judged, and one small run of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from magicid import recipe
from magicid.world import language
from magicid.world.measure import (
    SOURCES,
    Line,
    action_lines,
    ask,
    between_clips,
    clip_lines,
    faces,
    main,
    markdown,
    within_clips,
)


def test_every_pair_of_action_and_place_is_asked_for_and_each_action_as_often() -> None:
    asked = ask(200)
    assert set(zip(asked.actions.tolist(), asked.places.tolist())) == {(a, p) for a in range(8) for p in range(8)}
    assert np.bincount(asked.actions).tolist() == [25] * 8
    parsed = [language.parse(prompt) for prompt in asked.prompts]
    assert parsed == list(zip(asked.actions.tolist(), asked.places.tolist()))
    assert len(set(asked.prompts)) > 150


def rows(recognised: float, value: float) -> list[dict]:
    names = ("temporal_consistency", "temporal_flickering", "change", "second", "warp_error", "dynamic_magnitude")
    row = {**dict.fromkeys((*names, "head_motion"), value), "place": 1.0, "face_detect_rate": 1.0}
    return [{**row, "action": 1.0 if i % 8 else recognised} for i in range(16)]


def test_a_goal_is_judged_against_the_renderer() -> None:
    several = np.random.default_rng(0).normal(size=(8, 4))
    people = {source: [np.stack([row, row]) for row in several] for source in SOURCES}
    alike = [np.stack([row, row]) + 1 for row in several]
    good = {"generated": rows(1.0, 1.09), "renderer": rows(1.0, 1.0), "autoencoder": rows(1.0, 1.0)}
    assert [line.reached for line in clip_lines(good, people)] == [True] * 10 + [None, None, True]
    bad = {**good, "generated": rows(0.0, 1.12)}
    judged = {line.name: line.reached for line in clip_lines(bad, {**people, "generated": alike})}
    assert judged.pop("actions recognised") is False  # 7 of 8
    assert judged.pop("the action recognised least") is False
    assert (judged.pop("places recognised"), judged.pop("motion of the head")) == (True, True)  # 12 % of 15 %
    assert judged.pop("motion by flow (dynamic magnitude)") is True
    assert judged.pop("frames with a face") is None
    assert judged.pop("cosine between the faces of two frames of a clip") is None
    assert not any(judged.values())
    lines = list(action_lines(bad))
    assert lines[0].values == ("0.00", "1.00", "1.12 / 1.00", "1.12 / 1.00")
    assert [line.name for line in lines] == list(language.ACTIONS)


def test_faces_are_compared_between_clips_and_within_one() -> None:
    class Faces:
        def embed(self, frames):
            rows = np.zeros((len(frames), 2), np.float32)
            rows[:, int(frames[0, 0, 0, 0])] = 1
            rows[1] = np.nan
            return rows

    metrics: Any = SimpleNamespace(faces=Faces())  # all that is looked at
    clips = np.zeros((3, 4, 2, 2, 3), np.uint8)
    clips[2] = 1
    found = faces(metrics, clips)
    assert [len(rows) for rows in found] == [3, 3, 3]
    assert between_clips(found).tolist() == [1, 0, 0]
    assert within_clips(found) == 1
    assert within_clips([np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])]) == pytest.approx((0.6 + 0.8 + 0) / 3)
    metrics.faces = None
    with pytest.raises(ValueError, match=r"evaluation\.identity"):
        faces(metrics, clips)


def test_a_missed_goal_is_plain_in_the_table() -> None:
    text = markdown(["", "value"], [Line("a", ("1",), ">= 2", False), Line("b", ("2",))])
    assert text.splitlines()[2:] == ["| a | 1 | >= 2 | **no** |", "| b | 2 |  |  |"]


def test_a_small_run_measures_both_and_writes_the_sheet(tmp_path, capsys) -> None:
    sheet = tmp_path / "sheet.png"
    main(["--clips", "8", "--only", "clips", "--sheet", str(sheet), "--sampling.steps=2"])
    told = capsys.readouterr().out
    assert "8 clips, 2 steps, guidance 2.5, shift 3" in told
    line = next(line for line in told.splitlines() if line.startswith("| actions recognised"))
    assert line.split("|")[3].strip() == "1.000"  # the renderer's own
    values = next(line for line in told.splitlines() if line.startswith("| warp error")).split("|")
    assert float(values[3]) < float(values[4].split(",")[0])  # the autoencoder costs something
    with Image.open(sheet) as picture:
        assert picture.size[0] > 1000
    with pytest.raises(SystemExit):
        main(["--clips", "3"])
    assert "8 or more" in capsys.readouterr().err
    with pytest.raises(recipe.RecipeError):
        main(["--sampling.stepz=2"])
