"""What every request passes first and every answer last: limits on headers, the request id, the log line."""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api_errors import ApiError, from_exception, report

_log = logging.getLogger("magicid.serve")

MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 << 10

_EVERYWHERE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_PRIVATE = "no-store"  # answers depend on the key


class Guard:
    """Wraps the app. `scope["state"]["request_id"]` is set for the routes, `["tenant"]` is read for the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event; anything but HTTP goes straight on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Made here and never taken from the client: it is what records and audit log are searched by.
        request_id = f"req_{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started, status = time.monotonic(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _EVERYWHERE.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", _PRIVATE)
            await send(message)

        try:
            _check_headers(scope)
            await self._app(scope, receive, answer)
        except Exception as error:
            answered = from_exception(error)
            if answered.status >= 500:
                report(error, request_id)
            if status:  # the answer had begun: nothing true can be said but that it ends here
                raise ConnectionError(f"{request_id} failed while it was answered") from None
            await answered.response()(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "-")  # the template: a path may hold anything
            took_ms = 1000 * (time.monotonic() - started)
            told = {"method": scope["method"], "route": route, "status": status, "ms": round(took_ms, 1)}
            told |= {"tenant": state.get("tenant", "-"), "request_id": request_id}
            _log.info("%s %s %d %.0f ms tenant=%s %s", *told.values(), extra=told)


def _check_headers(scope: Scope) -> None:
    """Refuse what no client of this API sends. Raises ApiError."""
    raw = scope["headers"]
    if len(raw) > MAX_HEADERS or sum(len(name) + len(value) for name, value in raw) > MAX_HEADER_BYTES:
        raise _last(431, "headers_too_large", f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all")
    headers = Headers(scope=scope)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _last(415, "unsupported_encoding", "send the body without Content-Encoding")
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise _last(400, "invalid_value", "Content-Length must be a number of bytes")


def _last(status: int, code: str, message: str) -> ApiError:
    """An error after which the connection is closed: the rest of the body is not read."""
    return ApiError(status, code, message, headers={"Connection": "close"})
