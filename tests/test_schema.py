"""The data contract: rows survive Arrow and Parquet unchanged, nulls stay nulls."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from magicid import schema
from magicid.run import Run
from magicid.schema import Clip, Identity, MetricRow, Pair, Rejected, ScoredClip

ROWS = [
    Identity(
        "ada", "team", ["a.png"], overrides={"hpo.steps": "5"}, references=[[0.6, 0.8]], warnings=["one left out"]
    ),
    Rejected("photo", "x.png", "is empty", "replace it"),
    ScoredClip("c1", "V_s", None, "base", "p", "a person nods", 3, embeddings=[[1.0, 0.0], None], motion_reward=0.5),
    Pair("p1", "ada", "P_id", 0, "t", "u", "w", "V_id", "lw", [1.0, None, 2.0], "l", "V_s", "ll", [0.0, 1.0, 2.0]),
    MetricRow("c", "ada", "hpo", "p", 1, None, 0.5, 1.0, None, 8, 13, 48, 48, "v.mp4"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_a_row_survives_parquet(row: object, tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.write("table.parquet", [row], type(row))
    assert run.read("table.parquet", type(row)) == [row]


def test_a_scored_clip_has_all_columns_of_a_clip_first() -> None:
    clip, scored = schema.arrow_schema(Clip), schema.arrow_schema(ScoredClip)
    assert scored.names[: len(clip.names)] == clip.names
    assert scored.field("embeddings").type == pa.list_(pa.list_(pa.float64()))


def test_growing_tables_are_the_union_of_their_parts(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    assert run.read_parts("rows", Rejected) == []
    for name in ("a", "b"):
        run.append("rows", [Rejected("photo", name, "p", "a")], Rejected)
    run.append("rows", [], Rejected)
    assert {row.name for row in run.read_parts("rows", Rejected)} == {"a", "b"}
