"""How many videos may wait or run at once, and when to come back."""

from __future__ import annotations

import sqlalchemy as sa

from magicid.errors import MagicIDError
from serve.database import jobs
from serve.schema import OPEN

_RECENT = 16  # ends that tell how fast the queue moves


class _NoRoom(MagicIDError):
    """Too many open videos.

    Attributes:
        retry_after_s: when a place may be free.
    """

    def __init__(self, problem: str, retry_after_s: float) -> None:
        super().__init__(problem, f"try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class QueueFull(_NoRoom):
    """All tenants together have too many open videos."""


class QuotaExceeded(_NoRoom):
    """This tenant has too many open videos."""


def check_room(
    connection: sa.Connection, tenant: str, limit: int | None, max_queued: int, *, now: float, longest_s: float
) -> None:
    """See that one more job may be made.

    Args:
        limit: open jobs of this tenant.
        max_queued: open jobs of all tenants.
        longest_s: what is said at most about when to come back.

    Raises:
        QueueFull, QuotaExceeded: it may not.
    """
    count = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.status.in_(OPEN))
    if connection.execute(count).scalar_one() >= max_queued:
        raise QueueFull(
            f"{max_queued} videos are waiting or running, as many as allowed", _room_in_s(connection, now, longest_s)
        )
    if limit is not None and connection.execute(count.where(jobs.c.tenant == tenant)).scalar_one() >= limit:
        raise QuotaExceeded(
            f"{limit} of your videos are waiting or running, as many as allowed", _room_in_s(connection, now, longest_s)
        )


def _room_in_s(connection: sa.Connection, now: float, longest_s: float) -> float:
    """A guess at when the next video ends: the mean gap between recent ends, at least a second."""
    query = sa.select(jobs.c.completed_at).where(jobs.c.completed_at.is_not(None))
    ends = connection.execute(query.order_by(jobs.c.completed_at.desc()).limit(_RECENT)).scalars().all()
    gap = (now - ends[-1]) / len(ends) if ends else longest_s
    return max(1.0, min(gap, longest_s))
