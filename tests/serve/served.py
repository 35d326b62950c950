"""The endpoint as `make serve` starts it, in processes of its own, with what the tests of it share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from magicid.clips import decode_mp4
from tests.ray_jobs.job import ROOT, free_ports, session_processes

KEY = "test-key-0123456789-0123456789-0123456789"
ACTIONS = ("nods", "jumps", "waves", "talks")


class Served:
    """One endpoint under `folder`; started again it has the same records.

    Args:
        settings: of `serve.settings.ServeSettings`.
    """

    def __init__(self, run: Path, folder: Path, **settings: object) -> None:
        self.log = folder / "log"
        self.settings = {"adapters": run, "data": folder / "data", "lease_s": 3, "max_steps": 1000, **settings}
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=30)

    def start(self) -> None:
        """Start it and wait until it says that it serves; again where Ray's own 30 s were too few on a busy machine."""
        for _ in range(5):
            if self._start():
                return
        raise AssertionError(self.log.read_text()[-3000:])

    def _start(self) -> bool:
        (port,) = free_ports(1)
        self.client.base_url = f"http://127.0.0.1:{port}"
        settings = [f"{key}={value}" for key, value in self.settings.items()]
        environment = {**os.environ, "MAGICID_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
        environment.pop("RAY_ADDRESS", None)
        said = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve.local", "--port", str(port), *settings],
                cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

        def settled() -> bool:
            assert self.process is not None
            return self.process.poll() is not None or "Ctrl-C ends it" in self.log.read_text()[said:]

        end = time.monotonic() + 600
        while not settled():
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)
        return self.process.poll() is None

    def wait(self, condition: Callable[[], Any], timeout_s: float = 120) -> Any:
        """Poll until the condition holds, and return what it gave."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.process is None or self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, f"timed out:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)
        return found

    def kill(self, name: str) -> int:
        """kill -9 the processes of this endpoint that have `name` in their command line; returns how many."""
        assert self.process is not None
        chosen = [pid for pid, command in session_processes(self.process).items() if name in command]
        for pid in chosen:
            os.kill(pid, signal.SIGKILL)
        return len(chosen)

    def memory(self, name: str) -> int:
        """Bytes in memory of the processes that have `name` in their command line."""
        assert self.process is not None
        chosen = [pid for pid, command in session_processes(self.process).items() if name in command]
        assert chosen
        return sum(psutil.Process(pid).memory_info().rss for pid in chosen)

    def kill_all(self) -> None:
        """kill -9 every process of the endpoint, Ray's included."""
        assert self.process is not None
        everything = [self.process.pid, *session_processes(self.process)]
        for pid in everything:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def stop(self) -> None:
        """End it as a user does."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill_all()

    def post(self, identity_id: str | None, number: int, **fields: object) -> dict[str, Any]:
        """Ask for a video; prompt and seed follow from the number. Repeated until answered, as clients do."""
        model = "face-world" if identity_id is None else f"face-world:{identity_id}"
        body = {"model": model, "prompt": prompt(number), "seed": number, "num_inference_steps": 4, **fields}
        end = time.monotonic() + 300  # Ray Serve takes its time to miss a proxy
        while time.monotonic() < end:
            try:
                answer = self.client.post("/v1/videos", json=body, headers={"Idempotency-Key": f"{number}"})
                if answer.status_code == 200:
                    return dict(answer.json())
                assert answer.status_code in (429, 500, 503), answer.text
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError("the endpoint does not answer")

    def get(self, video_id: str) -> dict[str, Any] | None:
        """A video's record; None while the endpoint does not answer."""
        try:
            answer = self.client.get(f"/v1/videos/{video_id}")
        except httpx.TransportError:
            return None
        return dict(answer.json()) if answer.status_code == 200 else None

    def finished(self, video_id: str, timeout_s: float = 120) -> dict[str, Any]:
        """The record once it has ended; fails on a status that goes backwards."""
        seen: list[tuple[int, int, int]] = []

        def ended() -> dict[str, Any] | None:
            video = self.get(video_id)
            if video is None:
                return None
            place = (video["attempt"], ["queued", "in_progress", "completed"].index(video["status"]), video["progress"])
            assert not seen or place >= seen[-1], f"{seen[-1]} -> {place}"
            seen.append(place)
            return video if video["status"] == "completed" else None

        return dict(self.wait(ended, timeout_s))

    def frames(self, video_id: str) -> np.ndarray:
        """The frames of a finished video."""
        answer = self.client.get(f"/v1/videos/{video_id}/content")
        assert answer.status_code == 200, answer.text
        return decode_mp4(answer.content)[0]


def prompt(number: int) -> str:
    """A prompt of the face world."""
    return f"a person {ACTIONS[number % len(ACTIONS)]} in the kitchen"


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two clips, grey levels."""
    return float(np.abs(one.astype(int) - other.astype(int)).mean())
