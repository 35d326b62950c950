"""Where a run may lie, and what is said of an error."""

from __future__ import annotations

import os

import pytest

from magicid.errors import RewardError, StorageError
from ray_jobs.job import cause, run_location, submission
from ray_jobs.slots import _reason


def test_a_submitted_job_does_not_write_into_its_copy_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_location("runs/x") == os.path.abspath("runs/x")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(StorageError, match="would be lost"):
        run_location("runs/x")
    assert run_location("/shared/x") == "/shared/x"
    assert run_location("s3://bucket/x") == "s3://bucket/x"


def test_a_cause_is_one_line() -> None:
    assert cause(ValueError("")) == "ValueError: no message"
    assert cause(RuntimeError("trace\n\n  out of luck\n")) == "RuntimeError: out of luck"
    assert cause(RewardError("no metric model", "put it there")) == "no metric model"


def test_a_job_knows_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert submission() == ""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "run-1"}}')
    assert submission() == "run-1"


def test_a_slots_reason_is_the_last_line_of_a_traceback() -> None:
    text = "Training failed due to worker errors:\n[Rank 0 Error Snippet]:\nTraceback ...\nValueError: poison\n"
    assert _reason(RuntimeError(text)) == "RuntimeError: ValueError: poison"
    assert _reason(RuntimeError("")) == "RuntimeError: no message"
