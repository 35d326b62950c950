"""Webhooks against a real server: signed so that a receiver can check them, repeated until heard, never sent inside."""

from __future__ import annotations

import base64
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sqlalchemy as sa
from standardwebhooks.webhooks import Webhook

from magicid.errors import RecipeError
from serve.database import Database, outbox
from serve.jobs import JobStore
from serve.schema import Target, VideoRequest
from serve.webhooks import Address, WebhookError, WebhookSender, check_url, is_public

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
REQUEST = VideoRequest(prompt="p", frames=5, height=64, width=64, fps=8, steps=10, guidance_scale=1.0, seed=1)


class Clock:
    """Starts now, because a receiver refuses old messages."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Receiver:
    """A client's server: answers with the next of `answers`, then 200, and keeps what it was sent."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/hook?room=7"
        self.answers: list[int] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.hold = threading.Event()
        self.hold.set()


@contextmanager
def serving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.requests.append((self.path, headers, body))
            receiver.hold.wait(30)
            status = receiver.answers.pop(0) if receiver.answers else 200
            self.send_response(status)
            if status in (301, 307):
                self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with serving() as receiver:
        yield receiver


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def finish(database: Database, clock: Clock) -> Callable[[str], str]:
    """Makes a video whose end is told to a URL; gives its id."""
    store = JobStore(database, lease_s=30, max_attempts=3, retention_s=600, max_queued=100, clock=clock)

    def make(url: str) -> str:
        options: dict[str, Any] = {"request_id": "r", "dedupe_key": "k", "dedupe_s": 0, "webhook_url": url}
        job, _ = store.create("t", Target("base"), REQUEST, **options)
        store.claim("w")
        assert store.complete(job.id, 1, video_uri="u", video_sha256="s")
        return job.id

    return make


def allow_loopback(address: Address) -> bool:
    return address.is_loopback


def open_sender(database: Database, clock: Clock, **options: Any) -> WebhookSender:
    options = {"policy": allow_loopback, "backoff_s": (30.0, 300.0)} | options
    return WebhookSender(database, SECRET, clock=clock, **options)


def waiting(database: Database) -> int:
    with database.reading() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(outbox)).scalar_one()


def test_a_message_arrives_once_and_its_signature_holds(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    job_id = finish(receiver.url)
    sender = open_sender(database, clock)
    assert (sender.deliver(), sender.deliver(), waiting(database)) == (1, 0, 0)
    ((path, headers, body),) = receiver.requests
    assert path == "/hook?room=7"
    assert headers["host"] == receiver.url.split("/")[2]
    assert headers["content-type"] == "application/json"
    message = Webhook(SECRET).verify(body, headers)
    assert message == {
        "id": headers["webhook-id"],
        "object": "event",
        "type": "video.completed",
        "created_at": int(clock.now),
        "data": {"id": job_id},
    }
    with pytest.raises(Exception, match="signature"):
        Webhook(SECRET).verify(body.replace(b"completed", b"failed"), headers)
    with pytest.raises(Exception, match="signature"):
        Webhook(base64.b64encode(bytes(32))).verify(body, headers)


def test_a_message_is_repeated_with_longer_and_longer_waits_and_then_given_up(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    receiver.answers = [500, 404, 503, 200]
    finish(receiver.url)
    sender = open_sender(database, clock)
    for wait, requests in ((0, 1), (29, 1), (1, 2), (299, 2), (1, 3)):
        clock.now += wait
        assert sender.deliver() == 0
        assert len(receiver.requests) == requests
    assert waiting(database) == 0  # three attempts, two waits
    assert len({headers["webhook-id"] for _, headers, _ in receiver.requests}) == 1
    stamps = [int(headers["webhook-timestamp"]) for _, headers, _ in receiver.requests]
    assert [stamp - stamps[0] for stamp in stamps] == [0, 30, 330]


def test_a_server_that_recovers_hears_it(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    receiver.answers = [500]
    job_id = finish(receiver.url)
    assert open_sender(database, clock).deliver() == 0
    clock.now += 30
    assert open_sender(database, clock).deliver() == 1  # another process: the message was kept in the database
    assert json.loads(receiver.requests[1][2])["data"] == {"id": job_id}
    assert waiting(database) == 0


def test_a_closed_port_and_an_unknown_name_are_tried_again(
    database: Database, clock: Clock, finish: Callable[[str], str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        finish(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    finish("http://nobody.invalid/")
    assert open_sender(database, clock).deliver() == 0
    assert waiting(database) == 2


def test_a_silent_server_holds_up_neither_the_others_nor_the_sender(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    with serving() as other:
        receiver.hold.clear()
        finish(receiver.url)
        finish(other.url)
        assert open_sender(database, clock, attempt_s=1.0).deliver() == 1
        assert (len(receiver.requests), len(other.requests), waiting(database)) == (1, 1, 1)


def test_a_redirect_is_not_followed(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    receiver.answers = [307]
    finish(receiver.url)
    assert open_sender(database, clock).deliver() == 0
    assert [path for path, _, _ in receiver.requests] == ["/hook?room=7"]


def test_a_server_that_is_gone_is_left_alone(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    receiver.answers = [410]
    finish(receiver.url)
    assert open_sender(database, clock).deliver() == 0
    assert waiting(database) == 0


def test_two_senders_at_once_send_a_message_once(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    for _ in range(10):
        finish(receiver.url)
    start, heard = threading.Barrier(2), []

    def send() -> None:
        sender = open_sender(database, clock)
        start.wait(10)
        heard.append(sender.deliver())

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(heard) == len(receiver.requests) == 10


def test_nothing_is_sent_to_an_address_that_is_not_public(
    database: Database, clock: Clock, receiver: Receiver, finish: Callable[[str], str]
) -> None:
    finish(receiver.url)
    finish(receiver.url.replace("127.0.0.1", "localhost"))
    finish(receiver.url.replace("127.0.0.1", "2130706433"))
    assert open_sender(database, clock, policy=is_public).deliver() == 0
    assert receiver.requests == []
    assert waiting(database) == 0  # nor will it be


def test_a_name_is_looked_up_once_and_all_its_addresses_are_checked(
    database: Database,
    clock: Clock,
    receiver: Receiver,
    finish: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rebinding name is harmless: the connection goes to the address that was checked, not to the name."""
    real = socket.getaddrinfo
    answers = [["127.0.0.1"], ["127.0.0.2", "10.0.0.1"]]
    asked: list[Any] = []

    def resolve(host: Any, port: Any, *arguments: Any, **options: Any) -> list[Any]:
        if host != "rebind.example":
            return real(host, port, *arguments, **options)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    finish(receiver.url.replace("127.0.0.1", "rebind.example"))
    sender = open_sender(database, clock)
    assert sender.deliver() == 1
    assert asked == ["rebind.example"]
    assert receiver.requests[0][1]["host"].startswith("rebind.example:")
    finish(receiver.url.replace("127.0.0.1", "rebind.example"))
    assert sender.deliver() == 0  # one of two addresses is not allowed
    assert (len(receiver.requests), waiting(database)) == (1, 0)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),  # 8.8.8.8 behind NAT64
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),  # a cloud's metadata
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::1", False),  # 10.0.0.1 in 6to4
        ("2001:0:7f00:1::1", False),  # Teredo
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    "url",
    ["https://example.com/hook", "http://example.com:8080/x?y=1", "https://8.8.8.8/", "https://bücher.example/", "https://[2606:4700::1]/"],
)  # fmt: skip
def test_urls_that_may_be_called(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://example.com/", "not http"),
        ("file:///etc/passwd", "not http"),
        ("example.com/hook", "not http"),
        ("http:///hook", "not http"),
        ("", "not http"),
        ("http://a\0b/", "cannot be read"),
        ("http://\ud800/", "cannot be read"),
        ("http://a..b/", "cannot be read"),
        ("https://xn--/", "cannot be read"),
        (f"http://{'a' * 64}.example/", "cannot be read"),
        ("https://ada:pw@example.com/", "password"),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:65536/", "port 65536"),
        ("http://127.0.0.1/", "not public"),
        ("http://127.1/", "not public"),
        ("http://0x7f000001/", "not public"),
        ("http://2130706433/", "not public"),
        ("http://017700000001/", "not public"),
        ("http://[::1]/", "not public"),
        ("http://[::ffff:127.0.0.1]/", "not public"),
        ("http://localhost:8000/", "not public"),
        ("http://a.LOCALHOST./", "not public"),
        ("http://169.254.169.254/latest/meta-data/", "not public"),
    ],
)
def test_urls_that_must_not_be_called(url: str, problem: str) -> None:
    with pytest.raises(WebhookError, match=problem) as caught:
        check_url(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("secret", ["", "whsec_", "not base64!", base64.b64encode(bytes(23)).decode()])
def test_a_secret_that_cannot_sign_is_refused(database: Database, secret: str) -> None:
    with pytest.raises(RecipeError, match="webhook_secret") as caught:
        WebhookSender(database, secret)
    assert not secret or secret not in caught.value.problem
