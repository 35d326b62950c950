"""Tables and figures from rows: values, order, conditions; figures of whole curves."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from magicid.evaluation import document, figures, paper, results
from magicid.schema import MetricRow
from tests.evaluation.test_results import row

STEPS = (0, 100, 200)


def curve_rows() -> list[MetricRow]:
    """Self-reconstruction trades motion for identity, HPO does not."""
    rng = np.random.default_rng(0)
    rows = []
    for method, motion in (("base", (10,)), ("sft", (8, 4)), ("hpo", (9, 9))):
        for step, moves in zip(STEPS if method == "base" else STEPS[1:], motion):
            for person in ("ann", "bob", "cem"):
                for clip in range(4):
                    face = 0.1 + 0.002 * step + rng.normal(0, 0.02)
                    rows.append(
                        row(
                            f"{clip}", person, method, face, dynamic_magnitude=moves + rng.normal(0, 0.3), step=step,
                            head_motion=moves / 5, video_features=[face, moves], train_seed=0,
                        )
                    )  # fmt: skip
    return [dataclasses.replace(r, clip_id=f"{r.clip_id}-{r.step}") for r in rows]


def test_curves_begin_at_the_base_and_hold_the_means_of_their_steps() -> None:
    rows = curve_rows()
    points = figures.curve(rows, "sft", "dynamic_magnitude")
    assert [step for step, _, _ in points] == [0, 100, 200]
    assert [x.mean for _, x, _ in points] == pytest.approx([0.1, 0.3, 0.5], abs=0.03)
    assert [y.mean for _, _, y in points] == pytest.approx([10, 8, 4], abs=0.4)
    assert all(y.low < y.mean < y.high for _, _, y in points)
    assert [step for step, _, _ in figures.curve(rows, "hpo", "dynamic_magnitude")] == [100, 200], "from an adapter on"
    truth = [dataclasses.replace(r, method="renderer", face_sim=0.9) for r in rows if r.method == "base"]
    ((step, x, _),) = figures.curve([*rows, *truth], "renderer", "dynamic_magnitude")
    assert (step, x.mean) == (0, pytest.approx(0.9))


def test_what_has_no_steps_is_on_no_line_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, list[float]]] = []
    monkeypatch.setattr(
        figures, "_bars", lambda axes, points, name, colour: drawn.append((name, [x for x, _ in points]))
    )
    rows = curve_rows()
    truth = [dataclasses.replace(r, method="renderer") for r in rows if r.method == "base"]
    figures.motion_by_step([*rows, *truth])
    assert drawn == [("SFT only", [0, 100, 200]), ("HPO", [100, 200])] * 2


def test_every_method_is_told_minus_hpo_clip_by_clip() -> None:
    rows = [dataclasses.replace(r, seed=int(r.clip_id.split("-")[2])) for r in curve_rows()]
    text = document.to_markdown(rows)
    lines = text[text.index("## Minus HPO") : text.index("## Beside the paper")].splitlines()
    assert lines[2] == "| method | steps | N | face_sim | dynamic_magnitude | head_motion | prompt_score |"
    sft = next(line for line in lines if line.startswith("| SFT only")).split(" | ")
    assert sft[1:3] == ["200", "12"]
    assert float(sft[4].split()[0]) == pytest.approx(4 - 9, abs=0.3)
    assert sft[5].startswith("-1.00 [-1.00, -1.00]")
    assert not any(line.startswith("| HPO") for line in lines)
    again = [dataclasses.replace(r, train_seed=1) for r in rows if r.method != "base"]
    both = document.to_markdown([*rows, *again])
    base = next(line for line in both[both.index("## Minus HPO") :].splitlines() if line.startswith("| base model"))
    assert base.split(" | ")[2] == "24", "the base model has one training and stands beside every one of HPO"
    assert float(base.split(" | ")[4].split()[0]) == pytest.approx(10 - 9, abs=0.3)
    assert "Minus HPO" not in document.to_markdown([r for r in rows if r.method != "hpo"])


def test_each_row_of_the_papers_tables_is_told_minus_the_one_above() -> None:
    rows = [dataclasses.replace(r, seed=int(r.clip_id.split("-")[2])) for r in curve_rows()]
    more = [dataclasses.replace(r, method="p_id", dynamic_magnitude=2.0) for r in rows if r.method == "hpo"]
    text = document.to_markdown([*rows, *more])
    start = text.index("| the paper: Table 2")
    lines = text[start : text.index("| the paper: Table 3")].splitlines()
    steps = [line.split(" | ") for line in lines if " minus " in line]
    assert [(cells[0], cells[1]) for cells in steps] == [
        ("| SFT + P_id minus SFT only", "12"),
        ("| HPO minus SFT + P_id", "12"),
    ]
    assert [float(cells[3].split()[0]) for cells in steps] == pytest.approx([2 - 4, 9 - 2], abs=0.3)
    assert " minus " not in text[text.index("| the paper: Table 3") :], "of its rows there is one"
    assert "## Beside the paper" not in document.to_markdown([dataclasses.replace(r, setting="one") for r in rows])


def test_figures_are_drawn_from_what_is_there() -> None:
    drawn = figures.draw_all(curve_rows())
    assert set(drawn) == {
        "identity_against_motion_dynamic_magnitude", "identity_against_motion_head_motion", "motion_by_step",
    }  # fmt: skip
    picture = drawn["identity_against_motion_head_motion"]
    assert ElementTree.fromstring(picture["svg"]).tag.endswith("svg")
    assert picture["png"].startswith(b"\x89PNG")
    assert figures.draw_all(curve_rows()) == drawn  # the same bytes again
    assert figures.draw_all([r for r in curve_rows() if r.step == 0]) == {}


def test_length_and_settings_have_figures_of_their_own() -> None:
    rows = [row(str(c), p, "hpo", 0.5, frames=f, step=10) for c in (1, 2) for p in "ab" for f in (9, 13)]
    rows = [dataclasses.replace(r, clip_id=f"{r.clip_id}-{r.frames}") for r in rows]
    assert set(figures.draw_all(rows)) == {"face_sim_by_frames"}
    one_length = [dataclasses.replace(r, method="p_id") for r in rows if r.frames == 13]
    svg = figures.draw_all([*rows, *one_length])["face_sim_by_frames"]["svg"]
    assert (b"HPO" in svg, b"SFT + P_id" in svg) == (True, False)
    unread = dataclasses.replace(one_length[0], frames=0, face_sim=None, error="no video")
    assert figures.draw_all([*one_length, unread]) == {}
    tuned = [
        dataclasses.replace(r, setting=f"hpo.beta={b}", head_motion=1.0, action=1.0) for r in rows for b in (50, 500)
    ]
    assert set(figures.draw_all(tuned)) == {"settings_hpo_beta"}
    assert figures.draw_all([r for r in tuned if r.setting == "hpo.beta=50"]) == {}, "one value makes no line"
    assert figures.setting_value("hpo.beta=50, sft.steps=3", "hpo.beta") == 50
    assert figures.setting_value("rewards=id", "hpo.beta") is None
    assert figures.setting_value("hpo.beta=all", "hpo.beta") is None


def test_a_line_joins_what_differs_in_one_setting_only() -> None:
    settings = ("hpo.beta=500, frozen", "hpo.beta=50, frozen", "hpo.beta=50", "hpo.beta=70, others")
    rows = [dataclasses.replace(row("1", "ann", "hpo", 0.5), setting=setting) for setting in settings]
    (line,) = figures.setting_lines(rows, "hpo.beta").items()
    assert line == (("hpo", ("frozen",)), [(50.0, [rows[1]]), (500.0, [rows[0]])])


def test_the_table_holds_the_last_step_of_each_method(tmp_path) -> None:
    rows = curve_rows()
    files = document.write(rows, str(tmp_path), [r for r in rows if r.method == "base"])
    assert {"results.md", "results.json", "motion_by_step.svg", "motion_by_step.png"} <= set(files)
    text = (tmp_path / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[:5]] == ["method", "---", "base model", "SFT only", "HPO"]
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[2:4] == ["200", "12"]
    head = [cell.strip() for cell in lines[0].split("|")]
    shown = cells[head.index("dynamic_magnitude")]
    assert re.fullmatch(r"[34]\.\d\d \[\d\.\d\d, \d\.\d\d\]", shown)
    assert "clip_t" not in head  # nothing was measured
    assert float(lines[2].split("|")[-2]) == pytest.approx(0)  # the base to itself
    assert "3 people, 4 prompts, 1 training seeds; 13 frames of 48x48 at 8 fps; 0 clips" in text
    assert "![Motion against training steps](motion_by_step.svg)" in text
    line = next(line for line in text.splitlines() if line.startswith("| MagicID | HPO, 200 steps | 0.6 | "))
    face = results.estimate([r for r in results.last_steps(rows) if r.method == "hpo"], "face_sim")
    assert f"| 0.6 | {face.mean:.3f} [{face.low:.3f}, {face.high:.3f}] | 14.42 | " in line
    assert " | 0.9933 | 26.28 | 1.00 [1.00, 1.00] | 78.83 | 1228.33 | " in line, "the prompt score stands for CLIP-T"
    assert "| DreamBooth-LoRA | – | 0.276 | – | 5.69 | – |" in text, "nobody measured it here"
    found = json.loads((tmp_path / "results.json").read_text())
    by_key = {(m["method"], m["step"]): m for m in found["methods"]}
    expected = results.estimate([r for r in rows if (r.method, r.step) == ("hpo", 100)], "face_sim")
    assert by_key["hpo", 100]["measures"]["face_sim"]["mean"] == expected.mean
    assert by_key["hpo", 100]["measures"]["clip_t"] is None


def test_the_papers_tables_are_whole() -> None:
    for table in paper.TABLES:
        assert all(len(row.values) == len(table.columns) for row in table.rows)


def test_our_numbers_stand_beside_the_papers() -> None:
    names = {"sft": "SFT only, 170 steps", "p_id": "P_id here", "hpo": "HPO", "no_copies": "without copies"}
    text = paper.markdown(paper.PAIRS, names, ["face_sim", "clip_t"], lambda method, measure: f"{method}'s")
    assert text.splitlines() == [
        "| the paper: Table 2, pairs | here | face sim | face_sim, here | dynamic degree | CLIP-T | clip_t, here |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| none | SFT only, 170 steps | 0.276 | sft's | 5.69 | 25.83 | sft's |",
        "| P_id | P_id here | 0.605 | p_id's | 7.382 | 25.94 | p_id's |",
        "| P_id and P_dy | without copies | 0.6 | no_copies's | 14.42 | 26.28 | no_copies's |",
    ]
