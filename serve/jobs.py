"""The videos' records: made once, queued fairly, claimed under a lease, and ended by whoever holds the newest claim.

queued --claim--> in_progress --complete, fail--> completed | failed
   ^  `--cancel--> failed         |
   `------- release, reclaim -----'
"""

from __future__ import annotations

import dataclasses
import math
import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sqlalchemy as sa

from magicid.errors import MagicIDError
from serve.database import Database, jobs
from serve.fair_order import (
    COUNT_BEFORE,
    FAIR_ORDER,
    RECORD_AND_PLACE,
    RECORD_AND_PLACE_OF,
    advance_share,
    start_tag,
)
from serve.job_limits import QueueFull, QuotaExceeded, check_room
from serve.job_rows import BY_AGE, announce, held, of_identity, remove, rows, to_job, update
from serve.schema import CANCELLED, COMPLETED, FAILED, IN_PROGRESS, OPEN, QUEUED, Job, Target, VideoRequest, to_json

EXHAUSTED = "attempts_exhausted"  # the error code of a job whose workers were lost again and again
_ID = re.compile(r"video_[0-9a-f]{32}")
__all__ = ["EXHAUSTED", "JobStore", "NotFound", "OpenWork", "QueueFull", "QuotaExceeded", "TenantQueue"]

Jobs = list[Job]  # a name of its own: inside JobStore, `list` is its method


class NotFound(MagicIDError):
    """No such video, or not this tenant's: the text is the same."""


@dataclasses.dataclass(frozen=True)
class OpenWork:
    """What is not finished: jobs waiting, jobs held, steps of those waiting, age of the oldest of these in seconds."""

    queued: int
    in_progress: int
    queued_steps: int
    oldest_s: float


@dataclasses.dataclass(frozen=True)
class TenantQueue:
    """What waits for one tenant: jobs, and the age of the oldest in seconds."""

    tenant: str
    waiting: int
    oldest_s: float


class JobStore:
    """All videos' records. Every method is one transaction: what it returns is durable, and races have one winner.

    Args:
        lease_s: a claim lapses when it is not renewed for this long.
        max_attempts: a job lost this many times fails.
        retention_s: a finished record expires after this.
        max_queued: open jobs of all tenants together.
        clock: Unix seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        lease_s: float,
        max_attempts: int,
        retention_s: float,
        max_queued: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._retention_s = retention_s
        self._max_queued = max_queued
        self._clock = clock

    def create(
        self,
        tenant: str,
        target: Target,
        request: VideoRequest,
        *,
        request_id: str,
        dedupe_key: str,
        dedupe_s: float,
        webhook_url: str | None = None,
        limit: int | None = None,
        note: Callable[[sa.Connection, Job], object] = lambda *_: None,
    ) -> tuple[Job, bool]:
        """Queue a video, or find the one that the same call has made before.

        Args:
            dedupe_key: what makes two calls of a tenant the same call.
            dedupe_s: how far back to look for it, among those that have not failed; `math.inf` for a key that the
                client chose, which means one job for as long as it is kept.
            limit: open jobs that this tenant may have.
            note: told of a new job inside the transaction that makes it: what it writes there is kept if the job is.

        Returns:
            The job, and whether it is new.

        Raises:
            QueueFull, QuotaExceeded: too many open jobs; a repeated call is answered all the same.
        """
        with self._database.session() as connection:
            self._database.exclusively(connection, "create")
            now = self._clock()
            same = [jobs.c.tenant == tenant, jobs.c.dedupe_key == dedupe_key, jobs.c.created_at > now - dedupe_s]
            if math.isfinite(dedupe_s):  # whoever sees it fail and asks again wants another try
                same.append(jobs.c.status != FAILED)
            if found := rows(connection, sa.select(jobs).where(*same).order_by(jobs.c.created_at).limit(1)):
                return to_job(found[0]), False
            check_room(connection, tenant, limit, self._max_queued, now=now, longest_s=self._lease_s)
            start, weight = start_tag(connection, tenant)
            values = {
                "id": f"video_{secrets.token_hex(16)}",
                "tenant": tenant,
                "request_id": request_id,
                "dedupe_key": dedupe_key,
                "target": to_json(target),
                "request": to_json(request),
                "identity_id": target.identity_id,
                "owner": target.owner,
                "location": target.location,
                "steps": request.steps,
                "start_tag": start,
                "finish_tag": start + request.steps / weight,
                "status": QUEUED,
                "progress": 0,
                "attempt": 1,
                "fence": 0,
                "created_at": now,
                "cancel_requested": False,
                "webhook_url": webhook_url,
            }
            made = to_job(rows(connection, sa.insert(jobs).values(values).returning(jobs))[0])
            note(connection, made)
            return made, True

    def get(self, job_id: str, tenant: str | None) -> Job:
        """One record; tenant None looks at all tenants'. Raises NotFound."""
        with self._database.reading() as connection:
            return to_job(_one(connection, job_id, tenant))

    def look(self, job_id: str, tenant: str | None) -> tuple[Job, int | None]:
        """`get` and `queue_position` at one moment, by one statement. Raises NotFound."""
        query, values = RECORD_AND_PLACE, {"job_id": job_id}
        if tenant is not None:
            query, values = RECORD_AND_PLACE_OF, values | {"of_tenant": tenant}
        with self._database.reading() as connection:
            row = connection.execute(query, values).mappings().first() if _ID.fullmatch(job_id) else None
        if row is None:
            raise _not_found(job_id)
        return to_job(row), row["place"]

    def list(
        self, tenant: str | None, *, limit: int = 20, after: str | None = None, order: str = "desc"
    ) -> tuple[Jobs, bool]:
        """A page of records by (created_at, id), and whether there are more behind it.

        Args:
            after: id of the last record of the page before.
            order: `asc` or `desc`.

        Raises:
            NotFound: no record `after`.
        """
        with self._database.reading() as connection:
            query = sa.select(jobs)
            if tenant is not None:
                query = query.where(jobs.c.tenant == tenant)
            place = sa.tuple_(*BY_AGE)
            if after is not None:
                last = _one(connection, after, tenant)
                mark = sa.tuple_(sa.literal(last["created_at"]), sa.literal(last["id"]))
                query = query.where(place > mark if order == "asc" else place < mark)
            query = query.order_by(*(column.asc() if order == "asc" else column.desc() for column in BY_AGE))
            found = [to_job(row) for row in rows(connection, query.limit(limit + 1))]
            return found[:limit], len(found) > limit

    def queue_position(self, job: Job) -> int | None:
        """How many jobs come before it in the fair order; None unless it is (still) queued."""
        with self._database.reading() as connection:
            return connection.execute(COUNT_BEFORE, {"job_id": job.id}).scalar()

    def claim(self, worker: str, *, resident: Collection[str] = (), limit: int = 1) -> Jobs:
        """Take the next jobs in the fair order, at most `limit`; each is given to one worker only.

        Args:
            resident: adapter locations that the worker holds; a job with one of these passes those less than its own
                steps before it, so that nobody waits for ever.
        """
        now = self._clock()
        ahead = jobs.c.start_tag - sa.case((jobs.c.location.in_(resident), jobs.c.steps), else_=0)
        order = (ahead, *FAIR_ORDER) if resident else FAIR_ORDER
        query = sa.select(jobs.c.id, jobs.c.tenant, jobs.c.start_tag, jobs.c.finish_tag)
        query = query.where(jobs.c.status == QUEUED).order_by(*order).limit(limit).with_for_update(skip_locked=True)
        with self._database.session() as connection:
            chosen = rows(connection, query)
            if not chosen:
                return []
            ids = [row["id"] for row in chosen]
            values = {"status": IN_PROGRESS, "worker": worker, "started_at": now, "lease_until": now + self._lease_s}
            claims = sa.update(jobs).where(jobs.c.id.in_(ids)).values(values | {"fence": jobs.c.fence + 1})
            taken = {row["id"]: to_job(row) for row in rows(connection, claims.returning(jobs))}
            for row in sorted(chosen, key=lambda row: row["tenant"]):  # one order for all, or two would deadlock
                advance_share(connection, row)
            return [taken[job_id] for job_id in ids]

    def heartbeat(self, worker: str, progress: dict[str, tuple[int, int]]) -> set[str]:
        """Renew the worker's claims and note how far it is.

        Args:
            progress: job id -> (fence, per cent of its steps done); a lower number than before changes nothing.

        Returns:
            Ids that the worker must stop at once: cancelled, deleted, or another's by now.
        """
        stop = set()
        with self._database.session() as connection:
            lease = self._clock() + self._lease_s
            for job_id, (fence, per_cent) in sorted(progress.items()):
                mine = (jobs.c.id == job_id, jobs.c.worker == worker, jobs.c.fence == fence)
                going = (jobs.c.status == IN_PROGRESS, jobs.c.cancel_requested.is_(False))
                highest = sa.case((jobs.c.progress < per_cent, per_cent), else_=jobs.c.progress)
                renewal = sa.update(jobs).where(*mine, *going).values(lease_until=lease, progress=highest)
                if connection.execute(renewal).rowcount == 0:
                    stop.add(job_id)
        return stop

    def complete(self, job_id: str, fence: int, *, video_uri: str, video_sha256: str) -> bool:
        """End a job with its video. False: the claim is old or the job was cancelled, and the video is not wanted."""
        with self._database.session() as connection:
            row = held(connection, job_id, fence)
            if row is None:
                return False
            if row["cancel_requested"]:
                self._end_cancelled(connection, row)
                return False
            self._end(connection, row, COMPLETED, progress=100, video_uri=video_uri, video_sha256=video_sha256)
            return True

    def fail(self, job_id: str, fence: int, code: str, message: str) -> bool:
        """End a job without a video; one that was to be cancelled ends as such. False: the claim is old."""
        with self._database.session() as connection:
            row = held(connection, job_id, fence)
            if row is None:
                return False
            if row["cancel_requested"]:
                self._end_cancelled(connection, row)
            else:
                self._end(connection, row, FAILED, error_code=code, error_message=message)
            return True

    def release(self, job_id: str, fence: int, *, broken: bool = False) -> bool:
        """Give a job back unfinished; it starts again from nothing. False: the claim is old.

        Args:
            broken: the worker broke, perhaps over this job: as after a lapsed lease, it fails when that was too often.
        """
        with self._database.session() as connection:
            row = held(connection, job_id, fence)
            if row is not None:
                (self._take_back if broken else self._give_back)(connection, row)
            return row is not None

    def reclaim(self) -> Jobs:
        """Take back the jobs whose lease has lapsed: queued again, or failed when they were lost too often."""
        lapsed = (jobs.c.status == IN_PROGRESS, jobs.c.lease_until < self._clock())
        with self._database.session() as connection:
            query = sa.select(jobs).where(*lapsed).order_by(jobs.c.id).with_for_update(skip_locked=True)
            return [to_job(self._take_back(connection, row)) for row in rows(connection, query)]

    def cancel(self, job_id: str, tenant: str | None) -> Job:
        """Stop a job: one that waits fails at once, one that runs is flagged for its worker, a finished one stays.

        Raises NotFound.
        """
        with self._database.session() as connection:
            row = _one(connection, job_id, tenant, lock=True)
            if row["status"] == QUEUED:
                row = self._end_cancelled(connection, row)
            elif row["status"] == IN_PROGRESS:
                row = update(connection, row, cancel_requested=True)
            return to_job(row)

    def delete(self, job_id: str, tenant: str | None) -> Job:
        """Remove a record and return it as it was; its file is the caller's to remove. Raises NotFound."""
        with self._database.session() as connection:
            row = _one(connection, job_id, tenant, lock=True)
            remove(connection, [row["id"]])
            return to_job(row)

    def expired(self, limit: int = 100) -> Jobs:
        """Finished records whose time is over. Remove their files, then `forget` them: none is left behind."""
        with self._database.reading() as connection:
            query = sa.select(jobs).where(jobs.c.expires_at < self._clock()).order_by(jobs.c.expires_at).limit(limit)
            return [to_job(row) for row in rows(connection, query)]

    def forget(self, ids: Collection[str]) -> None:
        """Remove finished records whose files are gone."""
        with self._database.session() as connection:
            remove(connection, list(ids))

    def open_work(self) -> OpenWork:
        """How much is not finished."""
        waiting = jobs.c.status == QUEUED
        query = sa.select(
            sa.func.count().filter(waiting),
            sa.func.count().filter(jobs.c.status == IN_PROGRESS),
            sa.func.coalesce(sa.func.sum(jobs.c.steps).filter(waiting), 0),
            sa.func.min(jobs.c.created_at).filter(waiting),
        ).where(jobs.c.status.in_(OPEN))
        with self._database.reading() as connection:
            queued, in_progress, steps, oldest = connection.execute(query).one()
        age = 0.0 if oldest is None else max(0.0, self._clock() - oldest)
        return OpenWork(queued, in_progress, int(steps), age)

    def waiting_by_tenant(self) -> Sequence[TenantQueue]:
        """The queues of all tenants that have one, the longest first."""
        waiting = sa.func.count().label("waiting")
        query = sa.select(jobs.c.tenant, waiting, sa.func.min(jobs.c.created_at)).where(jobs.c.status == QUEUED)
        query = query.group_by(jobs.c.tenant).order_by(waiting.desc(), jobs.c.tenant)
        with self._database.reading() as connection:
            found = connection.execute(query).all()
        return [TenantQueue(tenant, count, max(0.0, self._clock() - oldest)) for tenant, count, oldest in found]

    def of_identity(self, identity_id: str, owner: str) -> Jobs:
        """All records of one owner's identity, whoever asked for them, oldest first."""
        with self._database.reading() as connection:
            return [to_job(row) for row in rows(connection, of_identity(identity_id, owner))]

    def owners_of(self, identity_id: str) -> set[str]:
        """Whose identity this is by its records."""
        query = sa.select(jobs.c.owner).where(jobs.c.identity_id == identity_id, jobs.c.owner.is_not(None)).distinct()
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())

    def purge_identity(self, identity_id: str, owner: str) -> Jobs:
        """Remove all records of one owner's identity; their files are the caller's to remove."""
        with self._database.session() as connection:
            found = rows(connection, of_identity(identity_id, owner).with_for_update())
            remove(connection, [row["id"] for row in found])
            return [to_job(row) for row in found]

    def _end(self, connection: sa.Connection, row: sa.RowMapping, status: str, **values: Any) -> sa.RowMapping:
        now = self._clock()
        ended = {"completed_at": now, "expires_at": now + self._retention_s, "worker": None, "lease_until": None}
        row = update(connection, row, status=status, **ended, **values)
        if row["webhook_url"]:
            announce(connection, row)
        return row

    def _end_cancelled(self, connection: sa.Connection, row: sa.RowMapping) -> sa.RowMapping:
        return self._end(
            connection,
            row,
            FAILED,
            error_code=CANCELLED,
            error_message="the video was cancelled",
            cancel_requested=True,
        )

    def _give_back(self, connection: sa.Connection, row: sa.RowMapping) -> sa.RowMapping:
        if row["cancel_requested"]:
            return self._end_cancelled(connection, row)
        cleared = dict.fromkeys(("worker", "lease_until", "started_at"))
        return update(connection, row, status=QUEUED, attempt=row["attempt"] + 1, progress=0, **cleared)

    def _take_back(self, connection: sa.Connection, row: sa.RowMapping) -> sa.RowMapping:
        if row["attempt"] < self._max_attempts or row["cancel_requested"]:
            return self._give_back(connection, row)
        message = f"the workers that made this video were lost {row['attempt']} times"
        return self._end(connection, row, FAILED, error_code=EXHAUSTED, error_message=message)


def _one(connection: sa.Connection, job_id: str, tenant: str | None, *, lock: bool = False) -> sa.RowMapping:
    query = sa.select(jobs).where(jobs.c.id == job_id)
    if tenant is not None:
        query = query.where(jobs.c.tenant == tenant)
    # An id that we did not make is not looked up: PostgreSQL refuses some texts.
    found = rows(connection, query.with_for_update() if lock else query) if _ID.fullmatch(job_id) else []
    if not found:
        raise _not_found(job_id)
    return found[0]


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"no video {job_id!r}", "check the id; finished videos are kept for a limited time")
