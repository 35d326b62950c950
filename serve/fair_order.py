"""Start-time fair queueing over tenants: which job comes next.

A job's start tag is the work (denoising steps / the tenant's weight) that its tenant was given before it; the lowest
tag is claimed first. A tenant that comes back after a pause starts at the tag being served, so nobody saves up turns.
Tags are fixed when the job comes: one that a lost worker gives back is at the head again, and is not paid for twice.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from serve.database import jobs, shares, tenants
from serve.schema import QUEUED

FAIR_ORDER = (jobs.c.start_tag, jobs.c.created_at, jobs.c.id)


def start_tag(connection: sa.Connection, tenant: str) -> tuple[float, float]:
    """(start tag of the tenant's next job, its weight); one statement, so that a claim is seen whole or not at all."""
    serving = sa.select(sa.func.max(shares.c.start_tag))
    given = sa.select(shares.c.finish_tag).where(shares.c.tenant == tenant)
    waiting = sa.select(sa.func.max(jobs.c.finish_tag)).where(jobs.c.tenant == tenant, jobs.c.status == QUEUED)
    weight = sa.select(tenants.c.weight).where(tenants.c.name == tenant)
    *tags, weighs = connection.execute(
        sa.select(*(query.scalar_subquery() for query in (serving, given, waiting, weight)))
    ).one()
    return max(tag or 0.0 for tag in tags), weighs or 1.0


def advance_share(connection: sa.Connection, row: sa.RowMapping) -> None:
    """Note that a tenant was given this job; a job claimed again moves nothing."""
    values = {name: row[name] for name in ("tenant", "start_tag", "finish_tag")}
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    further = {
        name: sa.case((shares.c[name] < row[name], row[name]), else_=shares.c[name])
        for name in ("start_tag", "finish_tag")
    }
    connection.execute(insert(shares).values(values).on_conflict_do_update(index_elements=["tenant"], set_=further))


def _count_before() -> sa.ColumnElement[int | None]:
    """For a row of `jobs`: how many queued jobs come before it; null unless it is queued."""
    other = jobs.alias()
    before = sa.tuple_(other.c.start_tag, other.c.created_at, other.c.id) < sa.tuple_(*FAIR_ORDER)
    count = sa.select(sa.func.count()).select_from(other).where(other.c.status == QUEUED, before)
    return sa.case((jobs.c.status == QUEUED, count.correlate(jobs).scalar_subquery()))


# Made once: for what is asked most often, to put a statement together takes longer than to run it.
COUNT_BEFORE = sa.select(_count_before()).where(jobs.c.id == sa.bindparam("job_id"))
RECORD_AND_PLACE = sa.select(jobs, _count_before().label("place")).where(jobs.c.id == sa.bindparam("job_id"))
RECORD_AND_PLACE_OF = RECORD_AND_PLACE.where(jobs.c.tenant == sa.bindparam("of_tenant"))
