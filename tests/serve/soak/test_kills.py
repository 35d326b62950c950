"""kill -9 of replica, proxy, dispatcher and everything, mid-video: none lost, none twice, none backwards."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from magicid.adapters import AdapterRef
from serve.schema import COMPLETED
from tests.serve import people
from tests.serve.served import Served, difference, prompt
from tests.serve.soak.report import trial
from tests.serve.soak.watch import Watch
from tests.serve.test_app import SAME

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]

NAMES = [f"person-{number}" for number in range(4)]
SEED, STEPS = 20, 40
REPLICA, PROXY, DISPATCHER, EVERYTHING = (
    "ServeReplica:magicid:Engine",
    "ProxyActor",
    "ServeReplica:magicid:Dispatcher",
    "",
)
DONE_S = 1800


@pytest.fixture
def published(tmp_path: Path) -> dict[str, AdapterRef]:
    return {name: people.publish(str(tmp_path / "run"), name, seed, "team") for seed, name in enumerate(NAMES)}


def strike(served: Served, victim: str) -> int:
    """Kill; returns how many processes. What is not there at this moment is waited for."""
    if victim == EVERYTHING:
        served.kill_all()
        served.start()
        return 1
    return int(served.wait(lambda: served.kill(victim), 180))


def kill_and_count(
    served: Served, published: dict[str, AdapterRef], victims: list[str], figures: dict[str, object]
) -> None:
    """Ask for two videos before each kill, at a moment drawn from a seed; then see that all are as they should be."""
    drawn, asked = random.Random(SEED), {}
    with Watch(served.get) as watch:
        for number, victim in enumerate(victims):
            for each in (2 * number, 2 * number + 1):
                video = served.post(NAMES[each % len(NAMES)], each, num_inference_steps=STEPS)
                asked[video["id"]] = each
                watch.add(video["id"])
            figures["kills"] = number
            time.sleep(drawn.uniform(0, 6))
            assert strike(served, victim) >= 1
        figures["kills"] = len(victims)
        watch.until_done(DONE_S)
        figures |= {"videos": len(asked), "most attempts": watch.attempts(), "polls": watch.polls}
    assert watch.wrong == []
    ended = {name: video["status"] for name, video in watch.seen.items() if video}
    assert ended == dict.fromkeys(asked, COMPLETED)
    listed = served.client.get("/v1/videos", params={"limit": 100}).json()
    assert sorted(video["id"] for video in listed["data"]) == sorted(asked), "none lost, none twice"
    for video_id, number in list(asked.items())[:: max(1, len(asked) // 8)]:
        ref = published[NAMES[number % len(NAMES)]]
        shown = people.expected(ref, prompt(number), number, STEPS)
        assert difference(served.frames(video_id), shown) < SAME
    figures["backwards"] = len(watch.wrong)


def test_twenty_kills_of_replica_proxy_and_everything(tmp_path: Path, published: dict[str, AdapterRef]) -> None:
    victims = [REPLICA] * 9 + [PROXY] * 6 + [EVERYTHING] * 5
    random.Random(SEED).shuffle(victims)
    served = Served(tmp_path / "run", tmp_path, max_attempts=100)
    try:
        served.start()
        with trial("20 kills of replica, proxy and everything") as figures:
            kill_and_count(served, published, victims, figures)
    finally:
        served.stop()


def test_kills_of_the_dispatcher(tmp_path: Path, published: dict[str, AdapterRef]) -> None:
    served = Served(tmp_path / "run", tmp_path, max_attempts=100)
    try:
        served.start()
        with trial("3 kills of the dispatcher") as figures:
            kill_and_count(served, published, [DISPATCHER] * 3, figures)
    finally:
        served.stop()
