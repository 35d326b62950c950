"""Rows of results: written and read, grouped, compared clip by clip."""

from __future__ import annotations

import dataclasses

import pytest

from magicid.errors import StorageError
from magicid.evaluation import results
from magicid.evaluation.intervals import ratio
from magicid.run import Run
from magicid.schema import MetricRow


def row(clip: str, person: str = "ann", method: str = "hpo", face: float | None = 0.5, **more) -> MetricRow:
    values = {
        "prompt": f"p{clip}",
        "seed": int(clip),
        "dynamic_magnitude": 4.0,
        "prompt_score": 1.0,
        "frames": 13,
    } | more
    return MetricRow(
        clip_id=f"{method}-{person}-{clip}", identity_id=person, method=method, face_sim=face, face_detect_rate=1.0,
        fps=8, height=48, width=48, video_uri=None, **values,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_rows_come_back_as_they_were(tmp_path, name) -> None:
    rows = [row("1", video_features=[1.5, 2.0], setting="beta=50", step=300), row("2", face=None, error="no face")]
    results.write(str(tmp_path / name), rows)
    assert results.read([str(tmp_path / name)]) == rows


def test_runs_files_and_folders_are_read_together(tmp_path) -> None:
    Run(str(tmp_path / "run")).append("evaluation/ann", [row("1"), row("2", method="validation")], MetricRow)
    results.write(str(tmp_path / "other" / "a.jsonl"), [row("1", method="ConsisID"), row("1", face=0.7)])
    found = results.read([str(tmp_path / "run"), str(tmp_path / "other")])
    assert [(r.method, r.face_sim) for r in found] == [("hpo", 0.7), ("ConsisID", 0.5)]  # again: the last one counts
    with pytest.raises(StorageError, match="holds no results"):
        results.read([str(tmp_path / "nothing")])
    (tmp_path / "bad.jsonl").write_text('{"face_sim": 1}\n')
    with pytest.raises(StorageError, match="holds no metric rows"):
        results.read([str(tmp_path / "bad.jsonl")])


def test_a_name_tells_the_methods_of_one_run_from_those_of_another(tmp_path) -> None:
    results.write(str(tmp_path / "a=b" / "x.jsonl"), [row("1", setting="beta=50"), row("2", method="base")])
    results.write(str(tmp_path / "y.jsonl"), [row("1")])
    found = results.read([f"{tmp_path}/a=b/x.jsonl=v1.2", f"{tmp_path}/y.jsonl", f"{tmp_path}/a=b"])
    assert [(r.method, r.setting) for r in found] == [
        ("hpo", "v1.2, beta=50"), ("base", ""), ("hpo", ""), ("hpo", "beta=50"),
    ]  # fmt: skip


def test_groups_have_means_intervals_and_nulls() -> None:
    rows = [row("1", face=0.2), row("2", face=0.4), row("1", "bob", face=0.9), row("3", face=None)]
    rows += [row("1", method="sft", face=0.1, step=60)]
    found = {(e.group, e.measure): e for e in results.estimates(rows, ["face_sim"], ["method", "step"])}
    hpo, sft = found[("hpo", 0), "face_sim"].interval, found[("sft", 60), "face_sim"]
    assert hpo.mean == pytest.approx((0.3 + 0.9) / 2)
    assert (hpo.clips, hpo.people) == (3, 2)
    assert found[("hpo", 0), "face_sim"].nulls == 1
    assert (sft.interval.mean, sft.interval.low) == (0.1, None)


def test_a_clip_without_a_face_is_not_verified() -> None:
    rows = [row("1", face=0.7), row("2", face=None), row("3", face=0.5), row("4", face=0.56)]
    assert results.share_above(rows, "face_sim", 0.55).mean == 0.5


def test_methods_are_compared_on_the_same_prompt_and_seed() -> None:
    first = [row(str(i), p, face=None, dynamic_magnitude=1.3 * i, train_seed=s)
             for i in range(1, 9) for p in ("a", "b") for s in (0, 1)]  # fmt: skip
    base = [row(str(i), p, method="base", dynamic_magnitude=float(i)) for i in range(1, 12) for p in ("a", "b")]
    found = results.compare(first, base, "dynamic_magnitude", ratio)
    assert (found.mean, found.low, found.high) == (pytest.approx(1.3), pytest.approx(1.3), pytest.approx(1.3))
    assert (found.clips, found.people, found.seeds) == (32, 2, 2)
    assert results.compare(first, base, "face_sim") is None
    trained = [dataclasses.replace(r, method="sft", step=60, train_seed=1) for r in base]
    again = results.compare(first, trained, "dynamic_magnitude", ratio)
    assert again is not None
    assert (again.seeds, again.clips) == (1, found.clips // 2), "a training stands beside that of its seed alone"
    one = results.compare([r for r in first if r.train_seed == 0], trained, "dynamic_magnitude", ratio)
    assert one is not None
    assert one.clips == 16, "one training of each: a run whose SFT and HPO have seeds of their own"
    assert results.compare([dataclasses.replace(r, prompt="other") for r in first], base, "dynamic_magnitude") is None
