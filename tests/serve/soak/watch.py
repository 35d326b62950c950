"""Polls every video of an endpoint while a trial goes on: statuses move forward only, and all come to an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from serve.schema import COMPLETED, FAILED, IN_PROGRESS, QUEUED

_PAUSE_S = 0.2  # between two polls: a key may ask ten times a second
_RANK = {QUEUED: 0, IN_PROGRESS: 1, COMPLETED: 2, FAILED: 2}


class Watch:
    """A thread that asks `get` for each id again and again until it has ended.

    Attributes:
        wrong: statuses that went backwards within an attempt, attempts that fell, videos that changed after their end.
    """

    def __init__(self, get: Callable[[str], dict[str, Any] | None]) -> None:
        self._get, self._stop = get, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.seen: dict[str, dict[str, Any] | None] = {}
        self.wrong: list[str] = []
        self.polls = 0

    def add(self, video_id: str) -> None:
        """Begin to watch a video."""
        self.seen[video_id] = None

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def open(self) -> list[str]:
        """Ids of those that have not ended."""
        return [name for name, video in list(self.seen.items()) if video is None or _RANK[video["status"]] < 2]

    def attempts(self) -> int:
        """The most attempts that one video took."""
        return max((video["attempt"] for video in self.seen.values() if video), default=0)

    def until_done(self, timeout_s: float) -> None:
        """Wait for the end of all."""
        end = time.monotonic() + timeout_s
        while left := self.open():
            assert time.monotonic() < end, f"not done: {[self.seen[name] for name in left][:5]}"
            time.sleep(0.5)

    def _run(self) -> None:
        while not self._stop.is_set():
            for name in self.open():
                now = self._get(name)
                self.polls += 1
                if now is None:
                    continue
                before = self.seen[name]
                if before is not None and _place(now) < _place(before):
                    self.wrong.append(f"{before} -> {now}")
                self.seen[name] = now
                self._stop.wait(_PAUSE_S)
            self._stop.wait(_PAUSE_S)


def _place(video: dict[str, Any]) -> tuple[int, int, int]:
    return video["attempt"], _RANK[video["status"]], video["progress"]
