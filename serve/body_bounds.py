"""Bodies that are too long or too slow, refused before anything holds them: an ASGI middleware.

Used by the API and, with wider bounds, in Ray Serve's HTTP proxy; nothing heavy may be imported here.
"""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_S = 20.0  # a whole body must have arrived after this; a prompt needs one packet


class BodyBounds:
    """Reads each request's body, and answers 413 to one that is too long and 408 to one that is too slow.

    Args:
        max_bytes: longest body. Of a longer one no more is read; the connection is closed.
        within_s: seconds from the headers to the body's end.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, within_s: float) -> None:
        self._app, self._max_bytes, self._within_s = app, max_bytes, within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event; anything but HTTP goes straight on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_length(scope)
            async with asyncio.timeout(self._within_s):
                body = await self._read(receive)
        except _TooLong:
            message = f"the body is larger than {self._max_bytes} bytes: shorten the prompt"
            await refuse(send, 413, "body_too_large", message)
        except TimeoutError:
            await refuse(send, 408, "request_timeout", f"the body did not arrive within {self._within_s:g} s")
        else:
            if body is not None:  # else the client has left
                await self._app(scope, _replay(body, receive), send)

    def _check_length(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > self._max_bytes:
                raise _TooLong

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise _TooLong
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts)


class _TooLong(Exception):
    pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body, and then what the server has to say: that the client left."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def refuse(send: Send, status: int, code: str, message: str) -> None:
    """An error as `serve.api_errors` shapes it, after which the connection is closed: the body's rest is not read."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    content = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
    ]
    if status != 408:  # the one that may succeed when it is sent again
        headers.append((b"x-should-retry", b"false"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
