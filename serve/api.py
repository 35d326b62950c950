"""The HTTP API: `create_api(settings, parts)` is the app. No Ray in it.

A POST leaves a queued record in the database, where engine replicas find it; everything else reads records and clips.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from magicid import __version__
from serve import api_errors, api_identities, api_videos, body_bounds, page
from serve.api_call import Context, Parts
from serve.api_guard import Guard
from serve.api_models import CreateVideo, ErrorBody, Health
from serve.body_bounds import BodyBounds
from serve.settings import ServeSettings

__all__ = ["Parts", "create_api"]

_ERRORS = {"4XX": {"model": ErrorBody, "description": "What is wrong, and where"}}
_ERRORS |= {"5XX": {"model": ErrorBody, "description": "The endpoint failed; try again"}}
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_SCHEMAS = "#/components/schemas/{model}"


def create_api(settings: ServeSettings, parts: Parts) -> FastAPI:
    """The app with all routes, the page included. Raises RecipeError: settings that leave nothing to make."""
    app = FastAPI(
        title="magicid",
        summary="Personal videos: identities in, clips out.",
        version=__version__,
        docs_url=None,  # these load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,  # type: ignore[arg-type]
    )
    app.state.context = Context(settings, parts)
    app.include_router(api_videos.router)
    app.include_router(api_identities.router)
    app.include_router(page.router)
    app.add_api_route("/healthz", _health, methods=["GET"], tags=["operation"])
    app.add_api_route("/metrics", _metrics, methods=["GET"], tags=["operation"], response_class=Response)
    api_errors.install(app)
    app.add_middleware(BodyBounds, max_bytes=settings.max_body_bytes, within_s=body_bounds.BODY_S)
    app.add_middleware(Guard)  # outermost
    describe = app.openapi
    app.openapi = lambda: app.openapi_schema or _completed(describe())  # type: ignore[method-assign]
    return app


def _health(request: Request) -> Health:
    """Whether the records can be reached."""
    request.app.state.context.parts.jobs.open_work()
    return Health()


def _metrics(request: Request) -> Response:
    """The queue in Prometheus' text format."""
    return Response(request.app.state.context.parts.metrics(), media_type=_METRICS)


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document with what the framework does not see: the body that is read by hand, and 400 for 422."""
    schemas = document["components"]["schemas"]
    body = CreateVideo.model_json_schema(ref_template=_SCHEMAS)
    schemas |= {"CreateVideo": body, **body.pop("$defs")}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    return document
