"""The routes of videos: create, list, look, cancel, download, delete.

Routes are plain functions, which the framework runs in threads: no database or storage call stops the event loop.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from dataclasses import replace
from typing import Annotated, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Header, Path, Query, Response
from starlette.responses import StreamingResponse

from magicid.errors import MagicIDError
from magicid.storage import sha256_json
from serve.api_body import SCHEMA, read_body
from serve.api_call import Authorized, Call, checked_id
from serve.api_errors import ApiError
from serve.api_models import CreateVideo, Video, VideoDeleted, VideoList
from serve.clips import MEDIA_TYPES, parse_range
from serve.schema import FAILED, OPEN, Job, Target, VideoRequest

_log = logging.getLogger("magicid.serve")
_POLL_MS, _POLL_MS_PER_PLACE, _POLL_MS_MOST = 1000, 100, 10_000  # who is far back in the queue need not ask often
_BYTES = {"schema": {"type": "string", "format": "binary"}}

router = APIRouter(tags=["videos"])
VideoId = Annotated[str, Path(description="`id` of a video")]
Body = Annotated[CreateVideo, Depends(read_body)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[\x20-\x7e]{1,255}$",
        description="the same key again is the same video; without it, an equal body within a short time is",
    ),
]


@router.post("/v1/videos", openapi_extra=SCHEMA, response_model=Video)
def create_video(call: Authorized, body: Body, idempotency_key: IdempotencyKey = None) -> Response:
    """Queue a video. Answered when its record is durable; poll it until its status is completed or failed."""
    target = _target(call, body)
    request = call.context.limits.request(body)
    if body.lora is not None and target.identity_id is None:
        raise ApiError(400, "invalid_value", "lora.scale acts on an identity: name one", param="lora")
    _check_webhook(call, body.webhook_url)
    fields = sha256_json(body.model_dump(mode="json", exclude_none=True))
    key = hashlib.sha256(idempotency_key.encode()).hexdigest() if idempotency_key else None
    job, made = call.jobs.create(
        call.tenant.name,
        target,
        request,
        request_id=call.request_id,
        dedupe_key=f"key:{key}" if key else f"body:{fields}",
        dedupe_s=math.inf if key else call.context.settings.dedupe_s,
        webhook_url=body.webhook_url,
        limit=call.tenant.max_open,
        note=lambda connection, job: _note_created(call, connection, job),
    )
    if made:
        _log_prompt(call, job)
    elif key and not _same(job, target, request, body):
        message = "this Idempotency-Key was used for another video: use a new key"
        raise ApiError(422, "idempotency_key_reused", message, param="idempotency-key")
    return _answer(call.video(job))


@router.get("/v1/videos")
def list_videos(
    call: Authorized,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="`last_id` of the page before")] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="by time of creation")] = "desc",
) -> VideoList:
    """The videos of this key."""
    last = None if after is None else checked_id(after)
    found, has_more = call.jobs.list(call.scope, limit=limit, after=last, order=order)
    videos = [call.video(job) for job in found]
    ends = (videos[0].id, videos[-1].id) if videos else (None, None)
    return VideoList(data=videos, first_id=ends[0], last_id=ends[1], has_more=has_more)


@router.get("/v1/videos/{video_id}", response_model=Video)
def retrieve_video(call: Authorized, video_id: VideoId) -> Response:
    """One video. While it is open, `openai-poll-after-ms` says when to ask again."""
    return _answer(call.look(video_id))


@router.post("/v1/videos/{video_id}/cancel", response_model=Video)
def cancel_video(call: Authorized, video_id: VideoId) -> Response:
    """Stop a video: it ends as failed with the code `cancelled`. One that is finished stays as it is."""
    job = call.jobs.cancel(checked_id(video_id), call.scope)
    call.note("video.cancel", job.id, status=job.status)
    return _answer(call.video(job))


@router.delete("/v1/videos/{video_id}")
def delete_video(call: Authorized, video_id: VideoId) -> VideoDeleted:
    """Remove a video and its record; one that is open is stopped."""
    job = call.job(video_id)
    # The file goes first: were the record gone and the file not, nobody could ask for it again.
    call.context.clips.remove_all(job)
    last = call.jobs.delete(job.id, call.scope)
    if last != job or last.status in OPEN:  # a clip may have been stored in between
        call.context.clips.remove_all(last)
    call.note("video.delete", job.id, model=job.target.model, status=last.status)
    return VideoDeleted(id=job.id)


@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses={
        200: {"description": "The bytes", "content": dict.fromkeys(MEDIA_TYPES.values(), _BYTES)},
        206: {"description": "The bytes of `Range`", "content": dict.fromkeys(MEDIA_TYPES.values(), _BYTES)},
        304: {"description": "`If-None-Match` has it"},
    },
)
def download_content(
    call: Authorized,
    video_id: VideoId,
    variant: Annotated[Literal["video", "thumbnail", "spritesheet"], Query()] = "video",
    range_: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The finished video (MP4), its middle frame (WebP), or 16 frames in one picture (JPEG)."""
    job = call.job(video_id)
    if job.video_uri is None:
        code, why = ("video_failed", "it failed") if job.status == FAILED else ("video_not_ready", "it is not finished")
        raise ApiError(409, code, f"the video has no content: {why}", param="video_id")
    tag = f'"{job.video_sha256}-{variant}"'
    headers = {"ETag": tag if variant == "video" else f"W/{tag}", "Cache-Control": "private, no-cache"}
    if if_none_match is not None and (if_none_match.strip() == "*" or tag in if_none_match):
        return Response(status_code=304, headers=headers)
    clips, uri = call.context.clips, job.video_uri
    if variant != "video":  # small, and signed anew each time: no two are equal in all bytes, so none comes in parts
        return Response(getattr(clips, variant)(uri), 200, headers, MEDIA_TYPES[variant])
    headers["Accept-Ranges"] = "bytes"
    size = clips.size(uri)
    start, stop, status = 0, size, 200
    try:
        part = parse_range(range_, size) if range_ and if_range in (None, tag) else None
    except ValueError:
        message = f"Range is outside the {size} bytes there are"
        raise ApiError(
            416, "invalid_range", message, param="range", headers={"Content-Range": f"bytes */{size}"}
        ) from None
    if part is not None:
        (start, stop), status = part, 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    return StreamingResponse(clips.read(uri, start, stop), status, headers, MEDIA_TYPES[variant])


def _target(call: Call, body: CreateVideo) -> Target:
    """What the model name, or the LoRA's, stands for. Raises UnknownModel, ApiError."""
    base = call.context.base
    name = body.model or base
    if body.lora is not None and body.lora.name is not None:
        if name != base:
            raise ApiError(400, "invalid_value", "lora.name and an identity in model: give one of them", param="lora")
        name = f"{base}:{body.lora.name}"
    return call.context.parts.catalog.resolve(name, call.tenant, draw=random.random())


def _check_webhook(call: Call, url: str | None) -> None:
    if url is None:
        return
    if not call.context.settings.webhook_secret:
        raise ApiError(400, "invalid_value", "webhook_url: webhooks are not set up here", param="webhook_url")
    try:
        call.context.parts.check_webhook(url)
    except MagicIDError as error:
        raise ApiError(400, "invalid_value", f"webhook_url: {error}", param="webhook_url") from None


def _same(job: Job, target: Target, request: VideoRequest, body: CreateVideo) -> bool:
    """Whether a repeated call asks for the video that the first one made. An alias may have moved since."""
    seed = request.seed if body.seed is not None else job.request.seed
    return job.target.identity_id == target.identity_id and job.request == replace(request, seed=seed)


def _note_created(call: Call, connection: sa.Connection, job: Job) -> None:
    detail = {"model": job.target.model, "owner": job.target.owner, "consent": job.target.consent}
    call.note("video.create", job.id, connection, **detail)


def _log_prompt(call: Call, job: Job) -> None:
    if call.context.settings.log_prompts:
        told = {"request_id": call.request_id, "job": job.id, "prompt": job.request.prompt}
        _log.info("%s %s prompt: %r", *told.values(), extra=told)


def _answer(video: Video) -> Response:
    """The video as JSON: it is what the framework would check and write once more."""
    headers = {}
    if video.status in OPEN:
        wait_ms = min(_POLL_MS + _POLL_MS_PER_PLACE * (video.queue_position or 0), _POLL_MS_MOST)
        headers["openai-poll-after-ms"] = str(wait_ms)
    return Response(video.model_dump_json(), headers=headers, media_type="application/json")
