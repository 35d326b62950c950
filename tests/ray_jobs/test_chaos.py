"""The trials of the table of chaos: three of them with all tests, the others with `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray_jobs import chaos
from tests.ray_jobs.chaos import Outcome, Reference

SHORT = [("worker", 1), ("raylet", 1), ("driver", 1)]

pytestmark = pytest.mark.timeout(2 * chaos.ONE_START_S)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return chaos.undisturbed(tmp_path_factory.mktemp("undisturbed"))


def held(kind: str, seed: int, reference: Reference, folder: Path) -> None:
    if kind == "disk full" and not chaos.can_mount():
        print("skipped: a small disk cannot be mounted here")
        pytest.skip("a small disk cannot be mounted here")
    outcome = chaos.run_trial(kind, seed, reference, folder)
    assert outcome.problems == []
    assert outcome.adapters == len(reference.adapters) == 2
    assert outcome.again == 0


@pytest.mark.parametrize(("kind", "seed"), SHORT)
def test_a_harm_changes_nothing(kind: str, seed: int, reference: Reference, tmp_path: Path) -> None:
    held(kind, seed, reference, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "seed"), [trial for trial in chaos.TRIALS if trial not in SHORT])
def test_no_harm_changes_anything(kind: str, seed: int, reference: Reference, tmp_path: Path) -> None:
    held(kind, seed, reference, tmp_path)


def test_the_table_knows_its_trials() -> None:
    assert len(chaos.TRIALS) == len(set(chaos.TRIALS)) >= 20
    assert {kind for kind, _ in chaos.TRIALS} == set(chaos.HARMS)
    rows = [chaos.as_row(Outcome("cut off", 3, 0.25, "worker 1 for 20 s")), chaos.as_row(Outcome("head", 12, 0.5))]
    rows.append(chaos.as_row(Outcome("disk full", 1, 0.5, problems=["a|b"])))
    assert chaos.known(chaos.HEAD + "".join(rows)) == {("cut off", 3), ("head", 12), ("disk full", 1)}
    assert rows[0].endswith("| yes |\n")
    assert rows[2].endswith("| **no**: a/b |\n")
    assert all(row.count("|") == chaos.HEAD.splitlines()[0].count("|") for row in rows)
    kept = (chaos.job.ROOT / "docs/chaos.md").read_text()
    assert chaos.HEAD in kept
    assert chaos.known(kept) <= set(chaos.TRIALS)
