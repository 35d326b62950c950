"""A ledger of tries, on storage: a row that kills its process is given up instead of being tried for ever.

A try is written down before it begins. Tries are counted per start of the job: an interruption costs no row its tries.
"""

from __future__ import annotations

from magicid import storage
from magicid.errors import GenerationError
from magicid.run import Run


class Attempts:
    """The tries of one start of a job, at most `limit` for each key."""

    def __init__(self, run: Run, job: str, limit: int) -> None:
        self.run, self.job, self.limit = run, job, limit

    def begin(self, key: str) -> int:
        """Note one more try; returns its number, from 1.

        Raises:
            GenerationError: all tries are used up, and none came back to say why.
        """
        ledger = self.run.path("attempts", self.job, f"{key}.json")
        tries = storage.read_json(ledger)["attempts"] if storage.exists(ledger) else 0
        if tries >= self.limit:
            raise GenerationError(f"given up after {tries} tries: the process died each time", "see its worker's log")
        storage.write_json(ledger, {"attempts": tries + 1})
        return int(tries) + 1

    def came_back(self, key: str) -> None:
        """Forget the tries of a key: the process that made the last one lives."""
        storage.remove(self.run.path("attempts", self.job, f"{key}.json"))

    def forget(self) -> None:
        """Remove the ledger when the job ends."""
        storage.remove(self.run.path("attempts", self.job))
