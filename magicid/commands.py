"""What people ask of a run: cancel or retry an identity. Files that the driver takes up, now or when it next starts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from magicid import ledger, storage
from magicid.errors import IdentityError, StorageError
from magicid.ledger import Record
from magicid.run import Run

CANCEL, RETRY = "cancel", "retry"
# What an identity must be for the command to mean anything.
_FITS = {
    CANCEL: (ledger.WAITING, ledger.RUNNING),
    RETRY: (ledger.FAILED, ledger.CANCELLED),
}
_DONE_TO = {CANCEL: "cancelled", RETRY: "retried"}
_NAMED = 10  # so many ids are spelled out in an error


@dataclass(frozen=True)
class Command:
    """`location` is removed when it has been done."""

    action: str
    identity_id: str
    location: str


def send(run: Run, action: str, identity_ids: Sequence[str]) -> list[Record]:
    """Ask the driver, for all of them or for none; returns how they stand now.

    Raises:
        IdentityError: the run does not know one of them, or it is in no state for this.
        StorageError: the run cannot be read or written.
    """
    records = ledger.read(run)
    unknown = [name for name in identity_ids if name not in records]
    if unknown:
        name = storage.public_name(run.location)
        raise IdentityError(f"{name} knows no identity {_listed(unknown)}", "see `magicid status` for those it knows")
    found = [records[name] for name in dict.fromkeys(identity_ids)]
    unfit = [record for record in found if record.state not in _FITS[action]]
    if unfit:
        states = _listed([f"{record.identity_id} ({record.state})" for record in unfit])
        raise IdentityError(
            f"there is nothing to {action}: {states}",
            "a finished adapter is removed with `magicid adapters delete`"
            if action == CANCEL and any(record.state == ledger.DONE for record in unfit)
            else f"only what is {' or '.join(_FITS[action])} can be {_DONE_TO[action]}",
        )
    for record in found:
        content = {"action": action, "identity_id": record.identity_id, "at": time.time()}
        storage.write_json(run.path("commands", f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"), content)
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def pending(run: Run) -> Iterator[Command]:
    """What was asked and not done yet, oldest first; what cannot be read is removed."""
    for location in storage.list_files(run.path("commands"), ".json"):
        try:
            found = storage.read_json(location)
            command = Command(str(found["action"]), str(found["identity_id"]), location)
        except (StorageError, KeyError, TypeError):
            command = Command("", "", location)
        if command.action in _FITS:
            yield command
        else:
            storage.remove(location)
