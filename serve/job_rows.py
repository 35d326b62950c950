"""Rows of the jobs' table: read, locked, changed, removed, their ends announced; always in a caller's transaction."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from serve.database import jobs, outbox
from serve.schema import IN_PROGRESS, Job, Target, VideoRequest

BY_AGE = (jobs.c.created_at, jobs.c.id)
_PLAIN = [field.name for field in dataclasses.fields(Job) if field.name not in ("target", "request")]


def announce(connection: sa.Connection, row: sa.RowMapping) -> None:
    """Put the job's end in the outbox, in the transaction that ends it: it is told if and only if it happened."""
    event_id = f"evt_{secrets.token_hex(16)}"
    event = {
        "id": event_id,
        "object": "event",
        "type": f"video.{row['status']}",
        "created_at": int(row["completed_at"]),
        "data": {"id": row["id"]},
    }
    message = {"id": event_id, "job_id": row["id"], "url": row["webhook_url"], "body": json.dumps(event)}
    connection.execute(sa.insert(outbox).values(message | {"attempts": 0, "due_at": row["completed_at"]}))


def rows(connection: sa.Connection, statement: sa.Executable) -> Sequence[sa.RowMapping]:
    """All rows that a statement returns."""
    return connection.execute(statement).mappings().all()


def held(connection: sa.Connection, job_id: str, fence: int) -> sa.RowMapping | None:
    """The job, locked, if this fence is its newest claim and still runs."""
    holder = (jobs.c.id == job_id, jobs.c.fence == fence, jobs.c.status == IN_PROGRESS)
    found = rows(connection, sa.select(jobs).where(*holder).with_for_update())
    return found[0] if found else None


def update(connection: sa.Connection, row: sa.RowMapping, **values: Any) -> sa.RowMapping:
    """Change one row and return it as it is then."""
    return rows(connection, sa.update(jobs).where(jobs.c.id == row["id"]).values(values).returning(jobs))[0]


def remove(connection: sa.Connection, ids: Sequence[str]) -> None:
    """Remove records, and what was still to be told about them."""
    connection.execute(sa.delete(outbox).where(outbox.c.job_id.in_(ids)))
    connection.execute(sa.delete(jobs).where(jobs.c.id.in_(ids)))


def of_identity(identity_id: str, owner: str) -> sa.Select[Any]:
    """The records of one owner's identity, oldest first."""
    return sa.select(jobs).where(jobs.c.identity_id == identity_id, jobs.c.owner == owner).order_by(*BY_AGE)


def to_job(row: sa.RowMapping) -> Job:
    """A row as the record that the endpoint's parts exchange."""
    request, target = VideoRequest(**row["request"]), Target(**row["target"])
    return Job(request=request, target=target, **{name: row[name] for name in _PLAIN})
