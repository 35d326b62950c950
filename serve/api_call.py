"""What every route is given: who calls, and the parts that the API stands on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from magicid.provenance import Signer
from magicid.recipe import Recipe
from serve.api_errors import ApiError, no_such_video, unauthorized
from serve.api_limits import Limits
from serve.api_models import Video
from serve.audit import AuditLog
from serve.catalog import Catalog
from serve.clips import Clips
from serve.jobs import JobStore
from serve.schema import QUEUED, Job
from serve.settings import ServeSettings
from serve.tenants import Tenant, TenantStore

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Parts:
    """What the API stands on.

    Attributes:
        check_webhook: raises MagicIDError for a URL that must not be called.
        metrics: the queue's figures in Prometheus' text format.
        signer: signs the pictures of videos.
    """

    jobs: JobStore
    tenants: TenantStore
    audit: AuditLog
    catalog: Catalog
    recipe: Recipe
    check_webhook: Callable[[str], object]
    metrics: Callable[[], bytes]
    signer: Signer


class Context:
    """The parts and what is made of them once, kept as `app.state.context`."""

    def __init__(self, settings: ServeSettings, parts: Parts) -> None:
        self.settings, self.parts = settings, parts
        self.base = settings.base or parts.recipe.name
        self.limits = Limits(parts.recipe, settings)
        self.clips = Clips(settings.clips_location, parts.signer)


@dataclass(frozen=True)
class Call:
    """One authenticated request."""

    context: Context
    tenant: Tenant
    request_id: str

    @property
    def jobs(self) -> JobStore:
        """The records."""
        return self.context.parts.jobs

    @property
    def scope(self) -> str | None:
        """Whose videos this key sees: an admin's sees everybody's."""
        return None if self.tenant.admin else self.tenant.name

    def job(self, video_id: str) -> Job:
        """A record. Raises NotFound or ApiError, answered alike: an unknown video, or another tenant's."""
        return self.jobs.get(checked_id(video_id), self.scope)

    def look(self, video_id: str) -> Video:
        """A record as it is answered. Raises as `job` does."""
        return Video.of(*self.jobs.look(checked_id(video_id), self.scope))

    def video(self, job: Job) -> Video:
        """A record as it is answered."""
        return Video.of(job, self.jobs.queue_position(job) if job.status == QUEUED else None)

    def note(self, action: str, subject: str, connection: sa.Connection | None = None, /, **detail: Any) -> None:
        """Write to the audit log, in the transaction of `connection` where one is given."""
        who = {"tenant": self.tenant.name, "request_id": self.request_id}
        self.context.parts.audit.write(action, subject=subject, detail=detail, connection=connection, **who)


def checked_id(video_id: str) -> str:
    """A text that may be a video's id. Raises ApiError (404): databases refuse some characters with an error."""
    if not _JOB_ID.fullmatch(video_id):
        raise no_such_video()
    return video_id


def authorize(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
) -> Call:
    """Who calls, within their rate. Raises ApiError: 401, 429."""
    context: Context = request.app.state.context
    tenant = context.parts.tenants.authenticate(given.credentials) if given else None
    if tenant is None:
        raise unauthorized()
    request.state.tenant = tenant.name
    wait_s = context.parts.tenants.take(tenant)
    if wait_s > 0:
        message = f"more than {tenant.requests_per_minute} requests per minute with this key"
        raise ApiError(429, "rate_limit_exceeded", message, retry_after_s=wait_s)
    return Call(context, tenant, request.state.request_id)


Authorized = Annotated[Call, Depends(authorize)]
