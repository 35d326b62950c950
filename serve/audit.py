"""Who did what, kept for good: lines are added, and the database itself refuses to change or remove one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from serve.database import Database, audit


@dataclass(frozen=True)
class AuditEntry:
    """One line.

    Attributes:
        id: grows with time.
        at: Unix seconds.
        subject: what the action was done to: a video's, identity's or tenant's name.
    """

    id: int
    at: float
    action: str
    tenant: str | None
    request_id: str | None
    subject: str
    detail: dict[str, Any]


class AuditLog:
    """The log; prompts and keys have no place in it, because a line outlives what it tells of."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock

    def write(
        self,
        action: str,
        *,
        tenant: str | None,
        request_id: str | None,
        subject: str,
        detail: dict[str, Any],
        connection: sa.Connection | None = None,
    ) -> None:
        """Add a line, durable when this returns, or with the transaction of `connection`.

        Args:
            action: such as `video.create`.
            tenant: who did it; None: the endpoint itself.
            detail: JSON values.
        """
        values = {"at": self._clock(), "action": action, "tenant": tenant, "request_id": request_id}
        with self._database.session() if connection is None else nullcontext(connection) as session:
            session.execute(sa.insert(audit).values(values | {"subject": subject, "detail": detail}))

    def read(
        self, *, tenant: str | None = None, subject: str | None = None, after: int = 0, limit: int = 1000
    ) -> list[AuditEntry]:
        """Lines, oldest first.

        Args:
            tenant, subject: only theirs.
            after: only lines behind the one with this id.
        """
        query = sa.select(audit).where(audit.c.id > after).order_by(audit.c.id).limit(limit)
        if tenant is not None:
            query = query.where(audit.c.tenant == tenant)
        if subject is not None:
            query = query.where(audit.c.subject == subject)
        with self._database.reading() as connection:
            return [AuditEntry(**row) for row in connection.execute(query).mappings().all()]
