"""64 people, requests as popularity has them, two replicas: every answer is the person and the version asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.schema import COMPLETED
from tests.serve import people
from tests.serve.served import Served, difference, prompt
from tests.serve.soak import sitters
from tests.serve.soak.report import trial
from tests.serve.soak.watch import Watch
from tests.serve.test_app import SAME

pytestmark = [pytest.mark.soak, pytest.mark.timeout(14_400)]

REQUESTS, STEPS, SEED, REPLICAS = 512, 12, 64, 2


def zipf(count: int) -> list[int]:
    """Numbers of people, the n-th most popular with a share of 1/n; everybody at least once."""
    random = np.random.default_rng(SEED)
    share = 1 / np.arange(1, sitters.COUNT + 1)
    drawn = random.choice(sitters.COUNT, count - sitters.COUNT, p=share / share.sum())
    asked = np.concatenate([np.arange(sitters.COUNT), drawn])
    return [int(number) for number in random.permutation(asked)]


def test_everybody_gets_the_person_and_version_asked_for(tmp_path: Path) -> None:
    began = time.monotonic()
    refs = sitters.train(str(tmp_path / "run"))
    served = Served(tmp_path / "run", tmp_path, min_replicas=REPLICAS, max_replicas=REPLICAS, max_attempts=20)
    with trial("64 people, 2 replicas") as figures:
        figures["minutes of SFT"] = f"{(time.monotonic() - began) / 60:.0f}"
        try:
            served.start()
            asked, watch = ask(served)
            figures |= {"videos": len(asked), "most attempts": watch.attempts()}
            judge(served, asked, watch, refs, figures)
        finally:
            served.stop()


def ask(served: Served) -> tuple[dict[str, int], Watch]:
    """Ask for all videos and wait for their ends: id -> the request's number."""
    asked = {}
    with Watch(served.get) as watch:
        for number, person in enumerate(zipf(REQUESTS)):
            while len(watch.open()) > 90:  # a tenant's limit is 100
                time.sleep(0.5)
            video = served.post(sitters.NAMES[person], number, num_inference_steps=STEPS)
            asked[video["id"]] = number
            watch.add(video["id"])
        watch.until_done(7200)
    return asked, watch


def judge(
    served: Served, asked: dict[str, int], watch: Watch, refs: dict[str, Any], figures: dict[str, object]
) -> None:
    """Versions of all, likeness of all, pixels of one of each person."""
    wanted, witness = zipf(REQUESTS), sitters.Witness()
    assert len(asked) == REQUESTS
    assert watch.wrong == []
    ranks, margins, unseen, compared = [], [], 0, set()
    for video_id, number in asked.items():
        video, name = watch.seen[video_id], sitters.NAMES[wanted[number]]
        assert video is not None
        assert (video["status"], video["lora_version"]) == (COMPLETED, refs[name].version)
        frames = served.frames(video_id)
        likeness = witness.likeness(frames)
        if likeness is None:
            unseen += 1
        else:
            person = wanted[number]
            ranks.append(int((likeness > likeness[person]).sum()))
            margins.append(likeness[person] - np.delete(likeness, person).mean())
        if name not in compared:
            compared.add(name)
            assert difference(frames, people.expected(refs[name], prompt(number), number, STEPS)) < SAME, name
    nearest = float(np.mean([rank == 0 for rank in ranks]))
    figures["nearest of 64 is the person asked for"] = f"{100 * nearest:.0f} %"
    figures["among the nearest 5"] = f"{100 * float(np.mean([rank < 5 for rank in ranks])):.0f} %"
    figures["no face found in"] = unseen
    figures["pixels of plain diffusers"] = f"{len(compared)} of {len(compared)} people compared"
    assert len(compared) == sitters.COUNT
    figures["likeness above the others' mean"] = f"{np.mean(margins):.3f}"
    # Forty steps make little likeness: over all clips it is beyond chance, of one clip it says little. Pixels say it.
    assert np.mean(margins) > 3 * np.std(margins) / len(margins) ** 0.5
