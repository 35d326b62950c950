"""What people ask of a run: cancel or retry an identity. Files that the driver takes up, now or when it next starts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from magicid import ledger, storage
from magicid.errors import IdentityError, StorageError
from magicid.run import Run

CANCEL, RETRY = "cancel", "retry"
# What an identity must be for the command to mean anything.
_FITS = {
    CANCEL: (ledger.WAITING, ledger.RUNNING),
    RETRY: (ledger.FAILED, ledger.CANCELLED),
}


@dataclass(frozen=True)
class Command:
    """`location` is removed when it has been done."""

    action: str
    identity_id: str
    location: str


def send(run: Run, action: str, identity_id: str) -> ledger.Record:
    """Ask the driver; returns how the identity stands now.

    Raises:
        IdentityError: the run does not know it, or it is in no state for this.
    """
    record = ledger.read(run).get(identity_id)
    name = storage.public_name(run.location)
    if record is None:
        raise IdentityError(f"{name} knows no identity {identity_id!r}", "see `magicid status` for those it knows")
    if record.state not in _FITS[action]:
        raise IdentityError(
            f"{identity_id} is {record.state}: there is nothing to {action}",
            "a finished adapter is removed with `magicid adapters delete`"
            if record.state == ledger.DONE and action == CANCEL
            else f"only what is {' or '.join(_FITS[action])} can be {'cancelled' if action == CANCEL else 'retried'}",
        )
    content = {"action": action, "identity_id": identity_id, "at": time.time()}
    storage.write_json(run.path("commands", f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"), content)
    return record


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
