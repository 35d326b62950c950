"""What Ray Serve's HTTP proxy lacks in front of strangers, as a middleware of its own:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares

By itself the proxy takes bodies of any size at any speed into its memory, follows headers that are meant for its own
use, fails at those that are not UTF-8, and answers with two request ids. Every node's proxy imports this, so it imports
nothing heavy.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.body_bounds import BODY_S, BodyBounds

VARIABLE, CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.proxy:middlewares"
MAX_BODY_BYTES = 256 << 10  # the longest prompts, every character escaped, take 100 kB

_REQUEST_ID = b"x-request-id"
_STEERING = frozenset(
    {
        _REQUEST_ID,
        b"x-session-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
    }
)


def middlewares() -> list[Middleware]:
    """What Ray Serve wraps its proxy's ASGI app in; the last one is outermost."""
    return [Middleware(BodyBounds, max_bytes=MAX_BODY_BYTES, within_s=BODY_S), Middleware(PlainHeaders)]


class PlainHeaders:
    """Takes away what steers Ray Serve from requests, and the second request id from answers: the API's own stays."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if "headers" in scope:
            kept = [(name, value) for name, value in scope["headers"] if name.replace(b"_", b"-") not in _STEERING]
            scope = {**scope, "headers": kept}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _with_one_id(list(message.get("headers", [])))}
            await send(message)

        await self._app(scope, receive, answer)


def _with_one_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Ray Serve adds its id behind what the application has answered; alone it stays."""
    ids = [value for name, value in headers if name.lower() == _REQUEST_ID]
    return [(name, value) for name, value in headers if name.lower() != _REQUEST_ID or value == ids[0]]
