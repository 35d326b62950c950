"""The driver's own code over simulated GPUs: everybody once, whatever happens on the way, and fairly."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from magicid import commands, erasure, ledger, manifests, recipe, status, storage
from magicid.erasure_proof import scan
from magicid.errors import MagicIDError
from magicid.recipe import Recipe
from magicid.run import Run, identity_uri
from magicid.schema import MetricRow, ScoredClip
from ray_jobs.fleet import Fleet
from ray_jobs.simulated_cluster import Durations
from ray_jobs.simulation import EPOCH, Outcome, simulate
from tests.ray_jobs.test_queue import jain

GPUS = 8  # four slots and four generators
SMALL: dict[str, Any] = {
    "repository.trained_clips": 8,
    "repository.base_clips": 4,
    "evaluation.clips": 2,
    "sft.steps": 20,
    "hpo.steps": 40,
    "resources.slots": 4,
    "resources.worker_gpus": 1,
    "resources.generator": {"min_size": 4, "max_size": 4, "gpus": 1},
}
QUICK = Durations(
    check=0.5, clip=1, photo_clip=0.1, validation_clip=0.1, found_clip=0.01, identity=0.02, motion=0.02,
    semantics=0.02, measure=0.02, sft_step=0.2, hpo_step=0.3, load=2, task=0.1,
)  # fmt: skip


def settings(**overrides: object) -> Recipe:
    return recipe.load("face-world", SMALL | {key.replace("__", "."): value for key, value in overrides.items()})


def person(name: str, owner: str = "a", **columns: object) -> dict[str, object]:
    return {"id": name, "owner": owner, "photos": ["x.png"], **columns}


def manifest(folder: Path, rows: Sequence[dict[str, object]]) -> str:
    file = folder / "people.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(folder: Path, people: Sequence[dict[str, object]], **options: Any) -> Outcome:
    made = options.pop("recipe", None) or settings()
    return simulate(made, manifest(folder, people), str(folder / "run"), durations=QUICK, **options)


def ends(outcome: Outcome) -> dict[str, float]:
    """Identity -> simulated seconds at which it ended."""
    return {name: record.ended - EPOCH for name, record in outcome.ledger.records.items() if record.ended}


def test_everybody_is_made_once_and_the_clock_only_jumps(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(12)]
    outcome = run(tmp_path, [person(name) for name in names])
    assert sorted(outcome.published) == sorted(names)
    assert sorted(outcome.trained) == sorted(f"{name}/{stage}" for name in names for stage in ("sft", "hpo"))
    assert outcome.made_twice == []
    kept = ledger.read(Run(str(tmp_path / "run")))
    assert {record.state for record in kept.values()} == {ledger.DONE}
    # 16 s of training for each on four slots, and one identity's whole way
    assert 12 * 16 / 4 < outcome.seconds < 12 * 16 / 4 + 60
    trained = sum(seconds for record in kept.values() for stage, seconds in record.seconds.items() if stage == "hpo")
    assert abs(trained - 12 * 40 * 0.3) < 12


def test_a_driver_that_goes_leaves_a_run_that_is_continued(tmp_path: Path) -> None:
    rows = [person(f"p{number}", owner="ab"[number % 2]) for number in range(10)]
    first = run(tmp_path, rows, lasts_s=48)
    assert 0 < len(first.published) < 10
    second = run(tmp_path, rows, seed=1)
    assert sorted(first.published + second.published) == sorted(row["id"] for row in rows)
    assert not set(first.trained) & set(second.trained)
    where = Run(str(tmp_path / "run"))
    scored = [clip.clip_id for clip in where.read_parts("scored", ScoredClip)]
    measured = [(row.identity_id, row.clip_id) for row in where.read_parts("evaluation", MetricRow)]
    assert len(scored) == len(set(scored)) == 4 + 10 * (10 + 8 + 8)  # V_s; V_id, V_t, V_still
    assert len(measured) == len(set(measured)) == 10 * 6


def test_people_who_are_done_do_not_keep_the_others_waiting(tmp_path: Path) -> None:
    rows = [person(f"p{number}") for number in range(600)]
    where = Run(str(tmp_path / "run"))
    book = ledger.Ledger(where, 1, every_s=0)
    for row in rows[:-1]:
        book.update(str(row["id"]), owner="a", state=ledger.DONE, adapter="v")
        storage.write_json(where.path(f"adapters/{row['id']}/v/manifest.json"), {})
    book.close()
    outcome = run(tmp_path, rows)
    assert outcome.published == ["p599"]
    assert (
        outcome.ledger.records["p599"].began or 0
    ) - EPOCH < 1  # a look each 3 s for 14 of them would be two minutes


def test_a_changed_row_trains_nobody_under_the_old_ones_name(tmp_path: Path) -> None:
    where = Run(str(tmp_path / "run"))
    first = run(tmp_path, [person("ada"), person("bo"), person("cy"), person("dee")], lasts_s=5)
    assert first.published == []
    for name in ("ada", "bo", "dee"):  # whose photos were checked
        storage.write_json(where.path(identity_uri(name)), {})
    told = {"captions": ["a {class_word} in the snow"]}
    rows = [person("ada", photos=["y.png"]), person("bo"), person("cy", photos=["y.png"]), person("dee", **told)]
    found = run(tmp_path, rows)
    assert sorted(found.published) == ["bo", "cy"]
    for name in ("ada", "dee"):
        record = found.ledger.records[name]
        assert (record.state, record.adapter) == (ledger.FAILED, None)
        assert record.problem == f"{name} is another row now than when its photos were checked"
    again = run(tmp_path, [person("ada"), *rows[1:3], person("dee")])  # as they were begun
    assert sorted(again.published) == ["ada", "dee"]


def test_a_row_may_be_corrected_until_it_is_begun_and_consent_withdrawn_until_the_end(tmp_path: Path) -> None:
    rows = [person(f"p{number:02}", consent="form") for number in range(30)]
    hurried = {"fleet.manifest_s": 5, "identities.require_consent": True}

    async def correct(fleet: Fleet, where: Run) -> None:
        await asyncio.sleep(10)
        running = next(name for name, record in fleet.ledger.records.items() if record.state == ledger.RUNNING)
        assert fleet.ledger.records["p29"].state == ledger.WAITING
        changed = [{**row, "consent": None} if row["id"] in (running, "p28") else row for row in rows]
        changed[29] = {**changed[29], "overrides": {"hpo.steps": 5}}
        manifest(tmp_path, changed)

    made = recipe.load("face-world", SMALL | hurried)
    outcome = run(tmp_path, rows, recipe=made, meanwhile=correct)
    failed = {name: record for name, record in outcome.ledger.records.items() if record.state == ledger.FAILED}
    assert sorted(failed) == ["p00", "p28"]
    assert all(record.problem == f"{name} has no consent reference" for name, record in failed.items())
    assert len(outcome.published) == 28
    assert outcome.ledger.records["p29"].seconds["hpo"] < 5  # of 0.3 s a step
    # and one whose photos were checked while there was one
    storage.write_json(str(tmp_path / "run" / identity_uri("p00")), {})
    assert run(tmp_path, [{**rows[0], "consent": ""}], recipe=made).published == []
    assert run(tmp_path, rows[:1], recipe=made).published == ["p00"]


def test_who_left_the_manifest_is_not_waited_for(tmp_path: Path) -> None:
    rows = [person(f"p{number:02}") for number in range(20)]
    first = run(tmp_path, rows, lasts_s=48)
    left = [name for name, record in first.ledger.records.items() if record.state != ledger.DONE and name >= "p02"]
    assert {first.ledger.records[name].state for name in left} == {ledger.WAITING, ledger.RUNNING}
    second = run(tmp_path, [row for row in rows if row["id"] not in left])
    assert {second.ledger.records[name].state for name in left} == {ledger.FAILED}
    assert second.ledger.records[left[0]].problem == f"no usable row of the manifest names {left[0]} any more"
    found = status.read(Run(str(tmp_path / "run")))
    assert (found.driver.state, sorted(record.identity_id for record in found.failed)) == (status.ENDED, sorted(left))
    third = run(tmp_path, rows)
    assert sorted(first.published + second.published + third.published) == [row["id"] for row in rows]


def test_a_deleted_person_is_in_no_list_of_what_was_set_aside(tmp_path: Path) -> None:
    rows, fleets, gone = [person(f"p{number}") for number in range(6)], [], []

    async def delete(fleet: Fleet, where: Run) -> None:
        fleets.append(fleet)
        await asyncio.sleep(10)
        gone.append(next(name for name, record in fleet.ledger.records.items() if record.state == ledger.RUNNING))
        fleet.set_aside("photo", gone[0], MagicIDError("1.png is dark", "replace it"))
        fleet.set_aside("photo", "p5", MagicIDError("2.png is dark", "replace it"))
        fleet.ledger.flush()
        erasure.delete(where.location, gone[0])

    made = settings(fleet__manifest_s=5)
    outcome = run(tmp_path, rows, recipe=made, meanwhile=delete)
    assert sorted(outcome.published) == sorted({str(row["id"]) for row in rows} - {*gone})
    assert [row.name for row in fleets[0].rejected] == ["p5"]

    async def look(fleet: Fleet, where: Run) -> None:
        fleets.append(fleet)

    run(tmp_path, [*rows, person(gone[0].upper(), photos=[])], recipe=made, meanwhile=look)
    assert fleets[1].rejected == []


def test_nothing_is_left_of_a_person_who_was_deleted_while_clips_and_training_were_in_hand(tmp_path: Path) -> None:
    """Workers go on with what they have: a generator and the scorers write rows of p1 after the deletion."""
    rows, marks, fleets = [person(f"p{number}") for number in range(8)], set[str](), []
    where = Run(str(tmp_path / "run"))

    async def delete(fleet: Fleet, _: Run) -> None:
        fleets.append(fleet)
        while not (held := fleet.pipeline.in_hand("p1")):
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.3)
        marks.update(held, erasure.traces_of(where, "p1"))
        erasure.delete(where.location, "p1")

    outcome = run(tmp_path, rows, recipe=settings(fleet__manifest_s=8, evaluation__clips=0), meanwhile=delete)
    assert sorted(outcome.published) == sorted({str(row["id"]) for row in rows} - {"p1"})
    assert "p1" not in fleets[0].ledger.records
    found = scan(where.location, "p1", marks | erasure.traces_of(where, "p1")).found
    assert [
        name for name, why in found if "not a whole safetensors file" not in why
    ] == []  # a simulated adapter is none


def test_people_come_go_and_come_back_while_the_job_runs(tmp_path: Path) -> None:
    rows = [person(f"p{number}") for number in range(12)]

    async def ask(fleet: Fleet, where: Run) -> None:
        await asyncio.sleep(10)
        manifest(tmp_path, [*rows, person("late")])
        running = next(name for name, record in fleet.ledger.records.items() if record.state == ledger.RUNNING)
        commands.send(where, commands.CANCEL, ["p11", running])
        while fleet.ledger.records["p11"].state != ledger.CANCELLED:
            await asyncio.sleep(1)
        assert fleet.ledger.records[running].state == ledger.CANCELLED
        fleet.ledger.flush()
        commands.send(where, commands.RETRY, ["p11"])

    outcome = run(tmp_path, rows, recipe=settings(fleet__manifest_s=5), meanwhile=ask)
    states = {name: record.state for name, record in outcome.ledger.records.items()}
    cancelled = [name for name, state in states.items() if state == ledger.CANCELLED]
    assert len(cancelled) == 1
    assert cancelled != ["p11"]
    assert sorted(outcome.published) == sorted({*states} - {*cancelled})
    assert "late" in outcome.published


def test_service_is_fair_in_every_window_longer_than_ten_identities(tmp_path: Path) -> None:
    weights, loads = {"a": 1.0, "b": 1.0, "c": 2.0}, {"a": 60, "b": 24, "c": 48}
    rows = [person(f"{owner}{number}", owner) for owner, load in loads.items() for number in range(load)]
    outcome = run(tmp_path, rows, recipe=settings(fleet__weights={"c": 2.0}), rows=False)
    begun = dict.fromkeys(weights, 0.0)  # until when each had somebody waiting
    for record in outcome.ledger.records.values():
        begun[record.owner] = max(begun[record.owner], (record.began or 0) - EPOCH)
    contended = min(begun.values())
    marks = [end for end in sorted(ends(outcome).values()) if end <= contended]
    assert len(marks) > 60
    worst = 1.0
    served = {
        owner: [(end, work) for end, who, work in outcome.cluster.served if who == owner and end <= contended]
        for owner in weights
    }
    times = {owner: [end for end, _ in pieces] for owner, pieces in served.items()}
    sums = {owner: [0.0, *itertools.accumulate(work for _, work in pieces)] for owner, pieces in served.items()}
    for first, last in itertools.combinations(range(len(marks)), 2):
        if last - first > 10:
            shares = [
                (
                    sums[o][bisect.bisect_right(times[o], marks[last])]
                    - sums[o][bisect.bisect_right(times[o], marks[first])]
                )
                / weights[o]
                for o in weights
            ]
            worst = min(worst, jain(shares))
    assert worst >= 0.95


def test_who_trains_longer_has_no_larger_share(tmp_path: Path) -> None:
    rows = [person(f"a{number}", "a", overrides={"hpo.steps": 400}) for number in range(14)]
    rows += [person(f"b{number}", "b") for number in range(70)]
    busy = run(tmp_path, rows, rows=False, lasts_s=300).cluster.busy
    assert jain([busy[owner, "sft"] + busy[owner, "hpo"] for owner in "ab"]) >= 0.95


def test_an_owner_at_its_quota_leaves_the_other_slots_to_others(tmp_path: Path) -> None:
    rows = [person(f"{owner}{number}", owner) for owner in "ab" for number in range(30)]
    ended = ends(run(tmp_path, rows, recipe=settings(fleet__quotas={"a": 1}), rows=False))
    b = max(end for name, end in ended.items() if name.startswith("b"))
    assert b < 30 * 16 / 3 + 60  # 16 s of training for each, on three slots
    assert max(ended.values()) > 30 * 16  # all of a, on one


def test_a_share_of_a_gpu_costs_its_share(tmp_path: Path) -> None:
    half = settings(
        resources__worker_gpus=0.5, resources__generator={"min_size": 4, "max_size": 4, "gpus": 0.5}
    )  # fmt: skip
    outcome = run(tmp_path, [person(f"p{number}") for number in range(4)], recipe=half, rows=False)
    counted: Counter[str] = Counter()
    for record in outcome.ledger.records.values():
        counted.update(record.seconds)  # type: ignore[arg-type]  # floats add too
    busy = outcome.cluster.busy
    assert counted["GenerateClips"] == pytest.approx(busy["a", "generator"])
    assert counted["hpo"] == pytest.approx(busy["a", "hpo"], rel=0.05)
    assert busy["a", "motion"] == 0  # its workers hold no GPU: their own seconds count, for all but the still copies
    assert counted["motion"] == pytest.approx(4 * (10 + 8) * QUICK.motion, rel=0.1)


def test_a_starving_low_priority_tenant_always_moves(tmp_path: Path) -> None:
    rows = [person(f"a{number}", "rich", priority=100) for number in range(60)]
    rows += [person(f"z{number}", "poor", priority=-100) for number in range(4)]
    weights = {"rich": 10.0, "poor": 1.0}
    ended = ends(run(tmp_path, rows, recipe=settings(fleet__weights=weights), rows=False))
    order = sorted(ended, key=lambda name: ended[name])
    places = [order.index(name) for name in order if name.startswith("z")]
    # one of eleven is theirs: the n-th ends at about place 11 n, give or take those under way at once
    assert all(place < 11 * number + 14 for number, place in enumerate(places, start=1)), places
    assert places[-1] < 60


def test_a_deadline_is_met_by_overtaking(tmp_path: Path) -> None:
    deadline = "2027-01-15T08:02:00+00:00"  # EPOCH + 120 s
    rows = [person(f"p{number}") for number in range(60)]
    hurried = [*rows[:59], person("p59", deadline=deadline)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert ends(run(tmp_path / "one", rows, rows=False))["p59"] > 120
    assert ends(run(tmp_path / "two", hurried, rows=False))["p59"] < 120


def test_short_stages_that_the_others_wait_for_go_first(tmp_path: Path) -> None:
    """Or a person who comes late waits with a few photos behind hours of clips, and the slots behind the photos."""
    due: dict[tuple[str, str], float] = {}
    people = [person("early"), person("late")]
    rows, _ = manifests.read_manifest(manifest(tmp_path, people))

    async def look(fleet: Fleet, where: Run) -> None:
        while len(fleet.ledger.records) < 2:
            await asyncio.sleep(0)
        for row in rows:
            due.update({(row.id, stage): fleet.due(row, stage) for stage in ledger.STAGES})

    run(tmp_path, people, meanwhile=look)
    for short, long in (("photo clips", "trained clips"), ("sft", "hpo"), ("still clips", "evaluation")):
        assert due["early", short] < due["late", short] < due["early", long] < due["late", long]
