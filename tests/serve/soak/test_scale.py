"""Replicas come when there is work and go when there is none; two nodes share one database."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.schema import COMPLETED
from tests.ray_jobs.job import session_processes
from tests.serve import people
from tests.serve.served import Served, difference, prompt
from tests.serve.soak.report import trial
from tests.serve.soak.watch import Watch
from tests.serve.test_app import SAME

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

ENGINE = "ServeReplica:magicid:Engine"


def replicas(served: Served) -> int:
    assert served.process is not None
    return sum(ENGINE in command for command in session_processes(served.process).values())


def test_scale_to_zero_and_back(tmp_path: Path) -> None:
    ref = people.publish(str(tmp_path / "run"), "ada", 1, "team")
    served = Served(tmp_path / "run", tmp_path, min_replicas=0, idle_s=3)
    try:
        served.start()
        with trial("to zero and back, 3 times") as figures:
            waits = []
            for number in range(3):
                served.wait(lambda: replicas(served) == 0, 300)
                began = time.monotonic()
                video = served.finished(served.post("ada", number)["id"], 600)
                waits.append(time.monotonic() - began)
                figures["seconds from the request to the video at zero"] = ", ".join(f"{wait:.0f}" for wait in waits)
                assert video["attempt"] == 1
                assert difference(served.frames(video["id"]), people.expected(ref, prompt(number), number, 4)) < SAME
            served.wait(lambda: replicas(served) == 0, 300)
    finally:
        served.stop()


def test_two_nodes_share_the_records(tmp_path: Path, make_postgres: Callable[[], str]) -> None:
    """Each node with a Ray, an API, a dispatcher and a replica of its own; one is killed and comes back."""
    names = [f"person-{number}" for number in range(4)]
    refs = {name: people.publish(str(tmp_path / "run"), name, seed, "team") for seed, name in enumerate(names)}
    shared = {"database": make_postgres(), "clips": tmp_path / "clips", "max_attempts": 100}
    nodes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        nodes.append(Served(tmp_path / "run", tmp_path / name, **shared))
    one, two = nodes
    try:
        one.start()
        two.start()
        with trial("2 nodes on one PostgreSQL") as figures:
            with Watch(two.get) as watch:
                asked = {}
                for number in range(40):
                    video = nodes[number % 2].post(names[number % 4], number, num_inference_steps=20)
                    asked[video["id"]] = number
                    watch.add(video["id"])
                    if number == 15:
                        one.kill_all()
                        one.start()
                watch.until_done(1800)
            again = one.post(names[39 % 4], 39, num_inference_steps=20)  # the other node's, by its key
            assert again["id"] in asked
            figures |= {"videos": len(asked), "most attempts": watch.attempts()}
            assert watch.wrong == []
            assert {video["status"] for video in watch.seen.values() if video} == {COMPLETED}
            for video_id, number in list(asked.items())[::8]:  # either node gives what any of them made
                shown = people.expected(refs[names[number % 4]], prompt(number), number, 20)
                assert difference(nodes[number % 2].frames(video_id), shown) < SAME
    finally:
        for node in nodes:
            node.stop()
