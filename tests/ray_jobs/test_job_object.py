"""What a stage leaves when it fails, and where a run may lie."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from magicid import recipe
from magicid.errors import RewardError, StorageError
from magicid.run import Run
from ray_jobs.job import Job, cause, run_location
from ray_jobs.progress import Display


def test_a_late_stage_that_fails_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    output = io.StringIO()
    job = Job(recipe.load("face-world"), Run(str(tmp_path)), Display(Console(file=output)), "base")

    def known() -> int:
        raise RewardError("no metric model", "put it there")

    def unknown() -> int:
        raise RuntimeError("trace\n\n  out of luck\n")

    assert job.attempt("evaluation", known, 1) == 1
    assert job.attempt("report", unknown, 2) == 2
    assert job.attempt("report", lambda: 3, 2) == 3
    assert [(r.name, r.problem) for r in job.rejected] == [
        ("evaluation", "no metric model"),
        ("report", "RuntimeError: out of luck"),
    ]
    assert "set aside stage report" in output.getvalue()


def test_a_submitted_job_does_not_write_into_its_copy_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_location("runs/x") == os.path.abspath("runs/x")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(StorageError, match="would be lost"):
        run_location("runs/x")
    assert run_location("/shared/x") == "/shared/x"
    assert run_location("s3://bucket/x") == "s3://bucket/x"


def test_a_cause_is_one_line() -> None:
    assert cause(ValueError("")) == "ValueError: no message"
