"""A small HTTP proxy on loopback that stands before a real server and makes some of its answers faults."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What becomes of a request: None passes it on, RESET breaks the connection, LOSE passes it on and loses the answer.
RESET, LOSE = "reset", "lose"
Fault = tuple[int, str] | str | None  # or (status, body)
Decide = Callable[[str, str], Fault]  # method, path and query


class FaultProxy:
    """`decide` is asked about each request; `seen` are all of them, in order."""

    def __init__(self, target: str) -> None:
        self.decide: Decide = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        host, port = target.removeprefix("http://").split(":")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b"".join(iter(self._chunk, b""))
                proxy.seen.append((self.command, self.path))
                fault = proxy.decide(self.command, self.path)
                if fault == RESET:
                    return self._reset()
                if isinstance(fault, tuple):
                    return self._answer(fault[0], [("Content-Type", "application/xml")], fault[1].encode())
                upstream = http.client.HTTPConnection(host, int(port), timeout=60)
                kept = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
                upstream.request(self.command, self.path, body, {**kept, "Content-Length": str(len(body))})
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                if fault == LOSE:
                    return self._reset()
                self._answer(answer.status, answer.getheaders(), data, answer.getheader("Content-Length"))

            def _chunk(self) -> bytes:
                size = int(self.rfile.readline().split(b";")[0], 16)
                data = self.rfile.read(size)
                self.rfile.readline()
                return data

            def _reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

            def _answer(
                self, status: int, headers: list[tuple[str, str]], data: bytes, size: str | None = None
            ) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = size if self.command == "HEAD" and size else str(len(data))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, ValueError):  # ours was closed
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def first(self, count: int, fault: Fault, method: str = "", part: str = "") -> None:
        """The first `count` requests of a method, with `part` in their path, get the fault."""
        left = [count]

        def decide(found: str, path: str) -> Fault:
            if method in ("", found) and part in path and left[0] > 0:
                left[0] -= 1
                return fault
            return None

        self.seen.clear()
        self.decide = decide

    def count(self, method: str, part: str = "") -> int:
        """How many requests of a method came, with `part` in their path."""
        return sum(found == method and part in path for found, path in self.seen)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def fault_proxy(target: str) -> Iterator[FaultProxy]:
    """A proxy before the server at `target`, `http://host:port`."""
    proxy = FaultProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
