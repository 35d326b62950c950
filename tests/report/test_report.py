"""The report: its numbers are the run's, strangers' text is escaped, nothing outside is needed, and gaps are named."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from magicid import storage
from magicid.clips import decode_mp4, encode_mp4
from magicid.evaluation.intervals import Interval
from magicid.evaluation.table import Estimate, table
from magicid.report import build_report, comparison, curves, media, plane, svg
from magicid.report.comparison import REPORTED, shown
from magicid.report.pareto import fronts
from magicid.run import Run, identity_uri
from magicid.schema import Identity, MetricRow, Pair, Rejected
from tests.report.fake_run import fill

HOSTILE = '<script>alert("x")</script><img src=https://evil.example/x onerror=alert(1)>\'"&'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fill(str(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return build_report(run)


def test_the_numbers_of_the_table_are_in_the_page(run: Run, page: str) -> None:
    estimates = table(run.read_parts("evaluation", MetricRow))
    names = shown(estimates)
    assert [metric for metric in REPORTED if metric in names] == names
    assert {"head_motion", "temporal_flickering", "action"} < set(names)
    assert "clip_t" not in names  # no clip has it
    assert page.count("<th>head motion</th>") == page.count("<th>face_sim</th>") > 0
    for estimate in estimates:
        if estimate.metric not in names:
            continue
        digits = 2 if estimate.metric in ("dynamic_magnitude", "head_motion") else 3
        assert f"<b>{estimate.mean:.{digits}f}</b>" in page
        assert f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}" in page
    assert "N 6, 1 null" in page  # the base clips without a face


def test_reasons_and_counts_are_in_the_page(run: Run, page: str) -> None:
    text = html.unescape(page)
    for name in ("rejected.parquet", "pairs/ada.rejected.parquet"):
        for row in run.read(name, Rejected):
            assert row.problem in text
    pairs = sum(len(run.read(f"pairs/{name}.parquet", Pair)) for name in ("ada", "bruno"))
    assert f"<dt>preference pairs</dt><dd>{pairs}</dd>" in page
    assert "photo-5.png was left out" in page


def test_every_pair_and_both_fronts_are_drawn(run: Run, page: str) -> None:
    for name in ("ada", "bruno"):
        for pair in run.read(f"pairs/{name}.parquet", Pair):
            assert f'data-w="{pair.winner_id}" data-l="{pair.loser_id}"' in page
    kinds = {pair.kind for pair in run.read("pairs/ada.parquet", Pair)}
    assert kinds == {"P_id", "P_dy"}
    assert page.count('class="ring upper"') > 1
    assert page.count('class="ring lower"') > 1


def test_nothing_outside_the_file_is_referenced(page: str) -> None:
    markup = re.sub(r"data:[a-z/0-9]+;base64,[A-Za-z0-9+/=]*", "data:", page)
    assert re.findall(r"https?:|//[a-z]+\.", markup) == []
    assert set(re.findall(r'\b(?:src|poster|href)="([^"]*)"', markup)) <= {"data:", "data:,", "#person-0", "#person-1"}
    assert "@import" not in markup
    assert "url(" not in re.sub(r"\burl\((?:key|video\.dataset\.clip)\)", "", markup)


def test_the_clips_in_the_page_are_the_runs(run: Run, page: str) -> None:
    clips = json.loads(page.split('id="clips">')[1].split("</script>")[0])
    assert len(clips) == 6 + 2 * (12 + 2)  # 6 shared base clips; of each person 6 SFT, 6 HPO and 2 validation clips
    used = set(re.findall(r'data-clip="(\w+)"', page))
    assert used == set(clips)
    frames, fps = decode_mp4(base64.b64decode(clips["c0"].split(",")[1]))
    assert (frames.shape, fps) == ((13, 48, 48, 3), 8)


def test_text_of_users_is_escaped(tmp_path: Path) -> None:
    run = fill(str(tmp_path), ("ada",), takes=1)
    person = run.identity("ada")
    changed = Identity(
        **{**vars(person), "owner": HOSTILE, "warnings": [HOSTILE], "consent": HOSTILE, "class_word": HOSTILE}
    )
    run.write(identity_uri("ada"), [changed], Identity)
    row = run.read_parts("evaluation", MetricRow)[0]
    run.append("evaluation/ada", [MetricRow(**{**vars(row), "prompt": HOSTILE, "method": "sft", "seed": 1})], MetricRow)
    run.write("rejected.parquet", [Rejected("identity", HOSTILE, HOSTILE, HOSTILE)], Rejected)
    pairs = run.read("pairs/ada.parquet", Pair)
    run.write("pairs/ada.parquet", [Pair(**{**vars(pair), "prompt": HOSTILE}) for pair in pairs], Pair)
    page = build_report(run)
    assert "<script>alert" not in page
    assert "<img src=https" not in page
    assert page.count(str(html.escape("<script>alert("))) >= 6 + len(pairs)


def test_an_identity_id_is_escaped_everywhere(tmp_path: Path) -> None:
    name = "<img onerror=alert(1)>'\"&"
    run = Run(str(tmp_path))
    run.write(identity_uri(name), [Identity(name, "o", ["identities/x/photo-1.png"])], Identity)
    row = MetricRow("c", name, "hpo", "p", 1, 0.5, 1.0, 2.0, None, 8, 13, 48, 48, None, "gave up")
    run.append(f"evaluation/{name}", [row], MetricRow)
    page = build_report(run)
    assert "<img onerror" not in page
    assert "&lt;img onerror=alert(1)&gt;&#39;&#34;&amp;" in page
    assert "gave up" in page


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    page = build_report(Run(str(tmp_path)))
    assert "No evaluation was made" in page
    assert "No identity of this run could be used" in page
    assert "Nothing was set aside" in page


def test_missing_parts_are_named(tmp_path: Path) -> None:
    run = fill(str(tmp_path), takes=2, pairs=False)
    for name in ("evaluation", "training", "adapters/ada", "scored"):
        storage.remove(run.path(name))
    failed = Rejected("identity", "bruno", "hpo failed: the loss is not finite", "run again")
    run.write("rejected.parquet", [failed], Rejected)
    page = html.unescape(build_report(run))
    for sentence in (
        "No evaluation clips were measured",
        "No evaluation clips were made for this identity",
        "Pairs were not selected",
        "No scored clips",
        "There is no SFT log",
        "There is no HPO log",
        "No adapter was published",
        "hpo failed: the loss is not finite",
    ):
        assert sentence in page


def test_unreadable_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = fill(str(tmp_path), ("ada",), takes=1)
    storage.write_bytes(run.path("pairs/ada.parquet"), b"PAR1 broken")
    row = next(row for row in run.read_parts("evaluation", MetricRow) if row.method == "sft")
    storage.write_bytes(run.path(row.video_uri or ""), b"not a video")
    page = build_report(run)
    assert "pairs/ada.parquet is not a whole Parquet file" in page
    assert "cannot decode the clip" in page
    assert "SFT loss" in page


def test_a_repeated_evaluation_row_counts_once(tmp_path: Path) -> None:
    run = fill(str(tmp_path), ("ada",), takes=3)
    before = build_report(run)
    run.append("evaluation/ada", run.read_parts("evaluation", MetricRow), MetricRow)
    assert re.findall("<b>[0-9.]+</b>", build_report(run)) == re.findall("<b>[0-9.]+</b>", before)


def test_large_clips_are_made_small_and_the_budget_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    data = encode_mp4(rng.integers(0, 256, (5, 360, 640, 3), dtype=np.uint8), 24)
    for number in range(2):
        storage.write_bytes(f"{tmp_path}/{number}.mp4", data + bytes(number))
    collected = media.Media(Run(str(tmp_path)))
    first = collected.video("0.mp4")
    assert isinstance(first, media.Video)
    assert (first.frames, first.fps, first.width, first.height) == (5, 24, 640, 360)
    small, fps = decode_mp4(base64.b64decode(collected.clips[first.key].split(",")[1]))
    assert (small.shape, fps) == ((5, 180, 320, 3), 24)
    assert collected.video("0.mp4") is first
    monkeypatch.setattr(media, "BUDGET", collected.spent + 10)
    assert "left out to keep this file small" in str(collected.video("1.mp4"))
    assert collected.left_out == 1


def test_unknown_log_columns_get_a_chart(page: str) -> None:
    titles = re.findall("<h4>([^<]+)</h4>", page)
    assert titles[:7] == [
        "SFT loss",
        "HPO loss",
        "Preference margin (inside)",
        "Accuracy and gradient factor",
        "Velocity errors",
        "SFT gradient norm",
        "HPO gradient norm",
    ]
    assert "2.5 steps per second" in page


def _rows(name: str, method: str, values: list[float], **more: float) -> list[MetricRow]:
    return [
        dataclasses.replace(
            MetricRow(f"{name}/{method}/{k}", name, method, "p", k, value, 1.0, 2.0, 0.5, 8, 13, 48, 48, None), **more
        )
        for k, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (0.02, "HPO is above SFT in face_sim, and below it in none of 4 metrics."),
        (0.0, "HPO does not beat SFT: no metric's difference has a 95 % interval above 0."),
        (-0.02, "HPO does not beat SFT: it is below SFT in face_sim and above it in none of 4 metrics."),
    ],
)
def test_the_verdict_is_of_clips_of_one_prompt_and_seed(change: float, expected: str) -> None:
    sft = [0.1, 0.9, 0.3, 0.5]  # far more apart than the change, which is the same in each
    rows = _rows("ada", "sft", sft) + _rows("ada", "hpo", [value + change for value in sft])
    found = comparison.differences(rows)
    said, sentences = comparison.verdict(found)
    assert said == expected
    assert found["ada", "hpo", "face_sim"].mean == pytest.approx(change)
    assert sentences[0].startswith("face_sim: HPO is ")
    assert comparison.verdict(comparison.differences(_rows("ada", "sft", sft)))[0].startswith("HPO and SFT were not")


def test_all_together_are_people_and_a_person_counts_as_a_whole() -> None:
    rows = []
    for name, change in (("ada", 0.1), ("bo", 0.3)):
        rows += _rows(name, "base", [0.0, 0.0]) + _rows(name, "sft", [0.2, 0.4])
        rows += _rows(name, "hpo", [0.2 + change, 0.4 + change])
    found = comparison.differences([*rows, *_rows("cy", "sft", [0.9])])
    together = found[comparison.EVERYBODY, "hpo", "face_sim"]
    assert (together.people, together.clips) == (2, 4)
    assert together.mean == pytest.approx(0.2)
    assert (together.low, together.high) == pytest.approx((0.1, 0.3))  # either person alone may be drawn
    said, sentences = comparison.verdict(found)
    assert said == "Over all identities: HPO is above SFT in face_sim, and below it in none of 4 metrics."
    assert sentences[0] == ("face_sim: +0.200 [+0.100, +0.300] in the mean; HPO is above SFT for 2 of 2 identities.")


def test_more_motion_with_more_warp_error_is_told_as_perhaps_jitter() -> None:
    def said(warp: float) -> str:
        rows = _rows("ada", "sft", [0.2, 0.4], warp_error=2.0) + _rows("ada", "hpo", [0.2, 0.4], warp_error=warp)
        moving = [dataclasses.replace(r, dynamic_magnitude=3.0) if r.method == "hpo" else r for r in rows]
        return comparison.verdict(comparison.differences(moving))[0]

    above = "HPO is above SFT in dynamic_magnitude, and below it in none of 4 metrics."
    assert said(1.9) == above
    assert said(2.5).startswith(f"{above} Its warp error")


def test_an_interval_that_holds_zero_says_nothing() -> None:
    ends = ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2), (0.0, 0.2), (None, None))
    assert [comparison.sign(Interval(0.1, *each, 2, 1, 1)) for each in ends] == [1, -1, 0, 0, 0]
    assert comparison.sign(None) == 0


def test_pooling_takes_only_identities_with_every_method() -> None:
    def row(name: str, method: str) -> MetricRow:
        return MetricRow(name + method, name, method, "p", 1, 0.5, 1.0, 2.0, 0.5, 8, 13, 48, 48, None)

    whole = [row(name, method) for name in ("a", "b") for method in ("base", "sft", "hpo")]
    assert {r.clip_id for r in comparison.pooled([*whole, row("c", "base")])} == {r.clip_id for r in whole}
    assert comparison.pooled(whole[:3]) == []


def test_the_fronts_of_the_plot_leave_out_clips_without_a_reward(run: Run) -> None:
    from magicid.report.reading import read

    clips = read(run, 1).people[0].clips
    missing = {clip.clip_id for clip in clips if clip.identity_reward is None}
    upper, lower = fronts(clips)
    assert len(missing) == 1
    assert upper
    assert lower
    assert not missing & (upper | lower)


def test_smoothing_starts_without_a_bias_and_passes_over_nan() -> None:
    assert curves.smooth([2.0] * 40) == pytest.approx([2.0] * 40)
    assert curves.smooth([1.0, float("nan"), 1.0]) == pytest.approx([1.0, 1.0, 1.0])


def test_ticks_are_round_and_inside() -> None:
    assert svg.ticks(0.02, 1.03) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert svg.ticks(-0.3, 0.9) == pytest.approx([-0.25, 0.0, 0.25, 0.5, 0.75])
    assert svg.ticks(3.0, 3.0) == [3.0]


def test_a_trainers_samples_are_not_compared_with_held_out_clips(tmp_path: Path) -> None:
    run = fill(str(tmp_path), ("ada",), takes=2)
    before = build_report(run)
    row = MetricRow("c", "ada", "validation", "a person nods", 60, 0.123, 1.0, 4.56, 0.789, 8, 13, 48, 48, None)
    run.append("evaluation/ada", [row], MetricRow)
    assert build_report(run) == before


def test_identity_against_motion_has_each_method_where_its_means_are() -> None:
    def point(method: str, likeness: float, motion: float) -> list[Estimate]:
        return [
            Estimate("ada", method, "face_sim", likeness, likeness - 0.1, likeness + 0.1, 9, 0),
            Estimate("ada", method, "dynamic_magnitude", motion, None, None, 9, 0),
        ]

    estimates = [*point("base", 0.0, 10.0), *point("sft", 0.2, 5.0), *point("hpo", 0.2, 7.5)]
    (drawing,) = plane.planes(estimates, "ada")  # nobody measured the head
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    (base_x, base_y), (sft_x, sft_y), (hpo_x, hpo_y) = places
    assert base_x < sft_x == hpo_x
    assert hpo_y - base_y == pytest.approx(sft_y - hpo_y, abs=0.02), "7.5 is half way between 10 and 5, higher is more"
    assert "HPO: face_sim 0.200, dynamic_magnitude 7.50, 9 clips" in drawing
    assert drawing.count('class="reach"') == 3, "an interval only where there is one"
    assert plane.planes(estimates[:2], "ada") == plane.planes(estimates, "bruno") == []
