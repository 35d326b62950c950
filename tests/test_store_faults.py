"""An S3 server with faults: what passes is tried again, what lasts is said at once, nothing is half there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from magicid import storage
from magicid.errors import StorageError
from tests.fault_proxy import LOSE, RESET, Fault, FaultProxy, fault_proxy
from tests.object_store import BUCKET, forgotten, s3_server

ROOT = Path(__file__).parent.parent
URL = f"s3://{BUCKET}"


def refusal(status: int, code: str) -> tuple[int, str]:
    return status, f"<Error><Code>{code}</Code><Message>because of {code}</Message></Error>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as environment:
        yield environment


@pytest.fixture
def proxy(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The server behind a proxy; botocore's own tries are turned off, to see ours."""
    monkeypatch.setattr(storage, "_PAUSE_S", 0.05)
    with fault_proxy(server["AWS_ENDPOINT_URL"]) as proxy:
        for name, value in {**server, "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        with forgotten("s3"):
            yield proxy


PASSING = [refusal(503, "SlowDown"), refusal(500, "InternalError"), RESET, LOSE]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again(proxy: FaultProxy, fault: Fault) -> None:
    place = f"{URL}/passing/a"
    proxy.first(2, fault, "PUT")
    storage.write_bytes(place, b"whole")
    assert proxy.count("PUT") == 3
    proxy.first(2, fault, "GET", "passing/a")
    assert storage.read_bytes(place) == b"whole"
    assert proxy.count("GET", "passing/a") == 3
    for call in (lambda: storage.exists(place), lambda: storage.list_files(f"{URL}/passing") == [place]):
        proxy.first(1, fault)
        assert call()
        assert len(proxy.seen) >= 2
    proxy.first(1, fault)
    storage.remove(place)
    assert not storage.exists(place)


def test_tries_are_bounded_and_the_error_says_so(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_TRIES", 3)
    proxy.first(1000, refusal(500, "InternalError"))
    with pytest.raises(StorageError, match=r"because of InternalError.*run the same command again"):
        storage.write_bytes(f"{URL}/bounded", b"x")
    assert proxy.count("PUT") == 3
    proxy.first(0, None)
    assert not storage.exists(f"{URL}/bounded")


LASTING = [
    (refusal(400, "ExpiredToken"), "renew the credentials"),
    (refusal(403, "AccessDenied"), "let these credentials list, read, write and delete"),
    (refusal(403, "InvalidAccessKeyId"), "correct the access key"),
    (refusal(403, "RequestTimeTooSkewed"), "set this machine's clock"),
    (refusal(404, "NoSuchBucket"), "make the bucket, or correct its name"),
    (refusal(403, "QuotaExceeded"), "free some space or raise the quota"),
]


@pytest.mark.parametrize(("fault", "action"), LASTING)
def test_what_lasts_is_said_at_once_with_what_to_do(proxy: FaultProxy, fault: tuple[int, str], action: str) -> None:
    proxy.first(0, None)
    fsspec.filesystem("s3").pipe_file(f"{BUCKET}/lasting", b"x")
    for method, call in (
        ("PUT", lambda: storage.write_bytes(f"{URL}/lasting", b"x")),
        ("PUT", lambda: storage.create_bytes(f"{URL}/lasting", b"x")),
        ("GET", lambda: storage.read_bytes(f"{URL}/lasting")),
    ):
        proxy.first(1000, fault, method)
        with pytest.raises(StorageError, match=f"s3://{BUCKET}/lasting: .*{action}") as caught:
            call()
        assert proxy.count(method) == 1
        assert "test-secret" not in str(caught.value)


def test_a_head_request_that_is_refused_says_what_it_may_be(proxy: FaultProxy) -> None:
    proxy.first(1000, (403, ""))
    with pytest.raises(StorageError, match="see whether the credentials are still valid"):
        storage.exists(f"{URL}/hidden")


def test_no_credentials_is_said(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with forgotten("s3"), pytest.raises(StorageError, match="give credentials: for S3 a profile"):
        storage.write_bytes(f"{URL}/x", b"x")


def test_a_create_whose_answer_was_lost_is_still_ours(proxy: FaultProxy) -> None:
    proxy.first(1, LOSE, "PUT")
    assert storage.create_bytes(f"{URL}/lease/1", b"me") is True
    assert proxy.count("PUT") == 2
    proxy.first(1, RESET, "PUT")
    assert storage.create_bytes(f"{URL}/lease/1", b"me") is False  # the same words, another call
    proxy.first(1, refusal(409, "ConditionalRequestConflict"), "PUT")
    assert storage.create_bytes(f"{URL}/lease/2", b"me") is True


def uploads() -> list[str]:
    """Multipart uploads that were begun and neither completed nor aborted."""
    fs = fsspec.filesystem("s3")
    return [upload["Key"] for upload in fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])]


LARGE = 101 << 20  # s3fs writes in parts from 100 MiB


def test_a_large_object_whose_part_is_refused_is_aborted(proxy: FaultProxy) -> None:
    storage.write_bytes(f"{URL}/large", b"old")
    proxy.first(1000, refusal(403, "AccessDenied"), "PUT", "partNumber=2")
    with pytest.raises(StorageError, match="let these credentials"):
        storage.write_bytes(f"{URL}/large", bytes(LARGE))
    proxy.first(0, None)
    assert storage.read_bytes(f"{URL}/large") == b"old"
    assert uploads() == []


def test_a_writer_killed_within_a_large_object_leaves_no_half_of_it(proxy: FaultProxy) -> None:
    proxy.first(1000, RESET, "PUT", "partNumber=2")
    script = f"from magicid import storage; storage.write_bytes('{URL}/killed', bytes({LARGE}))"
    writer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while proxy.count("PUT", "partNumber=1") == 0 or proxy.count("PUT", "partNumber=2") == 0:
            assert writer.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    proxy.first(0, None)
    assert not storage.exists(f"{URL}/killed")
    assert storage.list_files(f"{URL}/killed") == []
    assert uploads() == ["killed"]  # its parts cost money until a lifecycle rule of the bucket ends them
