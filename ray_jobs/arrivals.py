"""Who takes part in a run, and who may begin: rows of the manifest, commands, deletions, consent.

A weighted-fair queue admits as many people as keep slots and pools busy. What is said of those who were admitted, by a
changed row, a command or a tombstone, ends what is under way for them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from magicid import commands, erasure, identities, ledger, manifests, storage
from magicid.errors import IdentityError, MagicIDError, RecipeError, StorageError
from magicid.manifests import ManifestRow
from magicid.recipe import Recipe
from magicid.schema import ScoredClip
from ray_jobs.fleet import Fleet, another_row, content_sha256
from ray_jobs.keeping import failure
from ray_jobs.queue import FairQueue, Task

SWEPT_S = 900.0  # so long at least after a deletion a worker may still write what it had in hand
_STEPS = ("sft", "sft.steps", "hpo", "hpo.steps")  # overrides that say how long an identity trains


class Arrivals:
    """The people of one run, as the manifest and those who watch it have them.

    Args:
        fleet: connected to its services.
        under_way: the coroutines of those who were admitted, by identity.

    Attributes:
        rows: the manifest, as it was last read; of those under way, what they were begun with.
        admission: those who wait, and those under way.
    """

    def __init__(self, fleet: Fleet, under_way: Mapping[str, asyncio.Task[None]]) -> None:
        self.fleet, self.recipe, self.ledger, self._under_way = fleet, fleet.recipe, fleet.ledger, under_way
        self.rows: dict[str, ManifestRow] = {}
        self.admission = FairQueue(
            weights=self.recipe.fleet.weights, quotas=_quotas(self.recipe), max_held=_window(self.recipe)
        )
        self._fingerprint = ""
        self._steps_of: dict[tuple[tuple[str, str], ...], float] = {}  # overrides that change them -> training steps
        self._erased: set[str] = set()
        self._swept_until: dict[str, float] = {}  # who was deleted on the way -> until when it is looked after them
        fleet.intake.following = self.following

    def next(self) -> ManifestRow | None:
        """Admit the next one; None: nobody may begin now."""
        self.admission.ended()  # the ledger has it
        task = self.admission.take(uuid.uuid4().hex)
        return self.rows[task.task_id] if task else None

    def following(self, number: int) -> list[ManifestRow]:
        """Who is likely to be admitted next, at most so many."""
        waiting = [self.rows[task.task_id] for task in self.admission.upcoming(number)]
        return [row for row in waiting if self.ledger.records[row.id].state == ledger.WAITING]

    async def look(self, manifest: str, first: bool = False) -> None:
        """Take up new rows of the manifest, and what people asked for.

        Raises:
            ManifestError: it cannot be read, at the first time.
        """
        await self._let_go(await asyncio.to_thread(erasure.erased, self.fleet.run.location))
        await self.sweep()
        try:
            fingerprint = await asyncio.to_thread(manifests.fingerprint, manifest)
            if fingerprint != self._fingerprint:
                rows, unreadable = await asyncio.to_thread(manifests.read_manifest, manifest)
                self._fingerprint = fingerprint
                for bad in unreadable:
                    if bad not in self.fleet.rejected and erasure.tombstone(bad.name) not in self._erased:
                        self.fleet.set_aside(bad.kind, bad.name, MagicIDError(bad.problem, bad.action))
                for row in rows:
                    self._arrive(row)
        except MagicIDError as error:
            if first:
                raise
            self.fleet.display.say(f"the manifest cannot be read now, the job goes on: {error}", "yellow")
        asked = await asyncio.to_thread(lambda: list(commands.pending(self.fleet.run)))
        for command in asked:
            await self._obey(command)
        if asked:
            with suppress(StorageError):  # then they are obeyed again, which changes nothing
                await asyncio.to_thread(self.ledger.flush)  # what is removed must be kept elsewhere
                for command in asked:
                    await asyncio.to_thread(storage.remove, command.location)

    def end_absent(self) -> None:
        """Those whom an earlier start left open and no row names any more: they would be waited for, for ever."""
        for record in [r for r in self.ledger.records.values() if r.state in (ledger.WAITING, ledger.RUNNING)]:
            if record.identity_id not in self.rows:
                gone = f"no usable row of the manifest names {record.identity_id} any more"
                self.fleet.failed(record.identity_id, MagicIDError(gone, "add the row again to go on"))

    def _arrive(self, row: ManifestRow) -> None:
        """A row of the manifest: somebody new, somebody known, a corrected row, or another person under a known id."""
        before = self.rows.get(row.id)
        if row == before:
            return
        if row.id in self._under_way:  # what was begun is finished as it was begun, if it still may be
            self._still_agreed(row)
            return
        self.rows[row.id] = row
        if before is not None:
            self.admission.cancel(row.id)
        if erasure.tombstone(row.id) in self._erased:
            advice = "take the row out of the manifest, or give a new id"  # said, and kept nowhere
            self.fleet.display.say(f"{row.id} was deleted from this run: {advice}", "yellow")
            return
        content, known = content_sha256(row), self.ledger.records.get(row.id)
        if known and known.row_sha256 not in ("", content) and known.adapter is not None:
            self.fleet.set_aside("identity", row.id, another_row(row, "its adapter was made"))
            return
        changes: dict[str, Any] = {}
        if not known or known.state not in (ledger.CANCELLED, ledger.DONE):
            changes = {"state": ledger.WAITING, "problem": None, "action": None, "ended": None, "failed_clips": 0}
        self.ledger.update(
            row.id, owner=row.owner, arrived=known.arrived if known else self._arrival(), priority=row.priority,
            deadline=row.deadline, row_sha256=known.row_sha256 if known and known.row_sha256 else content, **changes,
        )  # fmt: skip
        if not known or known.state != ledger.CANCELLED:
            self.admission.put(self._task(row))

    def _still_agreed(self, row: ManifestRow) -> None:
        """Stop somebody under way whose row has lost its consent reference."""
        try:
            identities.check_consent(row, self.recipe.identities)
        except IdentityError as error:
            if self.ledger.records[row.id].state in (ledger.WAITING, ledger.RUNNING):
                self.rows[row.id] = row
                self.fleet.failed(row.id, error)
                self._under_way[row.id].cancel()

    def _task(self, row: ManifestRow) -> Task:
        """An identity's place in the admission: its training is what it costs its owner, nothing if it is done."""
        changed = tuple((key, value) for key, value in row.overrides.items() if key in _STEPS)
        if changed not in self._steps_of:
            own = self.recipe
            with suppress(RecipeError):  # the check says what is wrong with it
                own = own.for_identity(dict(changed))
            self._steps_of[changed] = float(own.sft.steps + own.hpo.steps)
        done = self.ledger.records[row.id].state == ledger.DONE
        return Task(row.id, row.owner, 0.0 if done else self._steps_of[changed], self.fleet.due(row))

    def _arrival(self) -> float:
        """Now; rows that come together keep their order, so that who began first is finished first."""
        return self.fleet.clock() + len(self.rows) * 1e-6

    async def sweep(self, *, all_of_them: bool = False) -> None:
        """Remove what workers have written of people who were deleted, and had in hand when they were."""
        now = asyncio.get_running_loop().time()
        for name, until in self._swept_until.items():
            if all_of_them or now < until:
                with suppress(StorageError):  # the next sweep tries again, as does who deletes them again
                    await asyncio.to_thread(erasure.sweep, self.fleet.run.location, name)

    async def _let_go(self, erased: set[str]) -> None:
        """Forget people who were deleted; what is under way for them stops."""
        new, self._erased = erased - self._erased, erased
        if not new:  # a tombstone is a hash: thousands of them are not made for nothing
            return
        for name in [name for name in self.ledger.records if erasure.tombstone(name) in new]:
            self.admission.cancel(name)
            self._swept_until[name] = asyncio.get_running_loop().time() + SWEPT_S
            in_hand = self.fleet.pipeline.in_hand(name)
            if name in self._under_way:
                self._under_way[name].cancel()
            self.fleet.forget(name)
            with suppress(StorageError):  # then a driver that dies in this moment leaves files that no name leads to
                await asyncio.to_thread(erasure.keep_in_hand, self.fleet.run.location, name, in_hand)

    async def _obey(self, command: commands.Command) -> None:
        name = command.identity_id
        record = self.ledger.records.get(name)
        if record is None:
            return
        if command.action == commands.CANCEL and record.state in (ledger.WAITING, ledger.RUNNING):
            self.admission.cancel(name)
            self.fleet.end(name, state=ledger.CANCELLED)
            await self.fleet.intake.forget(name)
            if name in self._under_way:
                self._under_way[name].cancel()
            self.fleet.display.say(f"cancelled {name}", "yellow")
        if command.action == commands.RETRY and record.state in (ledger.FAILED, ledger.CANCELLED) and name in self.rows:
            await asyncio.to_thread(self._forget_tries, name)
            self.ledger.update(name, state=ledger.WAITING, problem=None, action=None, ended=None, failed_clips=0)
            self.admission.put(self._task(self.rows[name]))

    def _forget_tries(self, identity_id: str) -> None:
        """Let the tries of what failed begin anew."""
        rows = self.fleet.run.read_parts(f"scored/{identity_id}", ScoredClip)
        names = {clip.clip_id for clip in rows if failure(clip)}
        for file in storage.list_files(self.fleet.run.path("attempts", self.fleet.name), ".json"):
            key = file.rsplit("/", 1)[-1].removesuffix(".json")
            if key == f"identity-{identity_id}" or key.rsplit("-", 1)[-1] in names:
                storage.remove(file)


def _window(recipe: Recipe) -> int:
    """Identities under way at once: each slot has one in hand and one or two that are made ready for it."""
    return recipe.fleet.window or 3 * recipe.resources.slots + 2


def _quotas(recipe: Recipe) -> dict[str, int]:
    """Identities under way at once of owners with a quota of training: the window's part for so many slots.

    With more, those who wait for their quota would fill the window, and slots that others could use would be idle.
    """
    window, slots = _window(recipe), recipe.resources.slots
    return {owner: max(quota + 2, window * quota // slots) for owner, quota in recipe.fleet.quotas.items()}
