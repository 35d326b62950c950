"""The table: means and intervals by hand, N and nulls shown."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from rich.console import Console

from magicid.evaluation.table import METRICS, Estimate, bootstrap, markdown, render, summary, table
from magicid.schema import MetricRow


def row(number: int, identity="ann", method="hpo", face=0.5, moves=2.0, prompt=0.25) -> MetricRow:
    return MetricRow(
        clip_id=f"{identity}{method}{number:03d}", identity_id=identity, method=method, prompt="p", seed=number,
        face_sim=face, face_detect_rate=1.0, dynamic_magnitude=moves, prompt_score=prompt, fps=8, frames=13, height=48,
        width=48, video_uri=None,
    )  # fmt: skip


def test_bootstrap_of_few_values() -> None:
    assert bootstrap([]) == (None, None, None)
    assert bootstrap([0.5]) == (0.5, None, None)
    assert bootstrap([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)


def test_bootstrap_of_two_values_is_the_binomial() -> None:
    # Means of resamples of (0, 1) are 0, 1/2, 1 with 1/4, 1/2, 1/4.
    assert bootstrap([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert bootstrap([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


def test_bootstrap_interval_is_the_normal_one_for_many_values_and_is_seeded() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = bootstrap(values)
    assert low is not None
    assert high is not None
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (low, high) == (pytest.approx(mean - half, abs=0.03), pytest.approx(mean + half, abs=0.03))
    assert bootstrap(values) == (mean, low, high)
    assert bootstrap(values, seed=1) != (mean, low, high)


def test_table_groups_orders_and_counts_nulls() -> None:
    rows = [
        row(0, "bob", "hpo"), row(0, "ann", "hpo", face=0.8), row(1, "ann", "hpo", face=None),
        row(0, "ann", "base", face=0.1), row(1, "ann", "base", face=0.3), row(0, "ann", "sft", face=float("nan")),
    ]  # fmt: skip
    estimates = table(rows)
    groups = list(dict.fromkeys((e.identity_id, e.method) for e in estimates))
    assert groups == [("ann", "base"), ("ann", "sft"), ("ann", "hpo"), ("bob", "hpo")]
    assert [e.metric for e in estimates[: len(METRICS)]] == list(METRICS)
    faces = {(e.identity_id, e.method): e for e in estimates if e.metric == "face_sim"}
    assert faces["ann", "base"] == Estimate("ann", "base", "face_sim", pytest.approx(0.2), 0.1, 0.3, 2, 0)
    assert faces["ann", "sft"] == Estimate("ann", "sft", "face_sim", None, None, None, 0, 1)
    assert faces["ann", "hpo"] == Estimate("ann", "hpo", "face_sim", 0.8, None, None, 1, 1)


def test_the_order_of_the_rows_is_no_matter() -> None:
    rows = [row(i, face=i / 20) for i in range(20)]
    assert table(random.Random(0).sample(rows, 20)) == table(rows)


def test_summary_is_one_identity_and_method() -> None:
    rows = [row(0, face=0.2), row(1, face=0.4), row(0, method="sft", face=0.9), row(0, "bob", face=0.9)]
    found = summary(rows, "ann", "hpo")
    assert [found[f"face_sim{end}"] for end in ("", "_low", "_high", "_n")] == [pytest.approx(0.3), 0.2, 0.4, 2]
    own = {"face_sim", "face_detect_rate", "dynamic_magnitude", "prompt_score"}  # what these rows have
    assert {name for name in found if not name.endswith(("_low", "_high", "_n"))} == own
    assert found["head_motion_n"] == 0
    without = summary([row(0, face=None)], "ann", "hpo")
    assert (without["face_sim_n"], "face_sim" in without, "prompt_score_low" in without) == (0, False, False)
    assert summary(rows, "ann", "base") == {}


def test_markdown_by_hand() -> None:
    rows = [row(0, method="base", face=-0.1), row(1, method="base", face=0.1), row(0, face=None, prompt=None)]
    assert markdown(table(rows)).splitlines() == [
        "| identity | method | N | face_sim | faces found | dynamic_magnitude | prompt score |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| ann | base | 2 | 0.000 [-0.100, 0.100] | 1.000 [1.000, 1.000] | 2.00 [2.00, 2.00] | 0.250 [0.250, 0.250] |",
        "| ann | hpo | 1 | – (1 null) | 1.000 | 2.00 | – (1 null) |",
    ]


def test_the_terminal_table_fits_80_columns() -> None:
    rows = [row(0, method="base", face=-0.1), row(1, method="base", face=0.1), row(0), row(0, "[bold]bob", "hpo")]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(table(rows)))
    text = console.export_text()
    assert "0.00 [-0.10, 0.10]" in text
    assert "base model" in text
    assert "[bold]bob" in text
    assert text.count("ann") == 1
    assert "95% bootstrap interval over N clips" in text
