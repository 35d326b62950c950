"""Tenant A on every route with every id of tenant B: answers that are those to ids which never were, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve.schema import COMPLETED, FAILED, IN_PROGRESS, QUEUED
from tests.serve.endpoint import BASE, Endpoint, Server

NEVER = f"video_{'0123456789abcdef' * 2}"
PERSON, NOBODY = "bruno", "nobod"  # of one length: an answer may quote what was asked for
ITS_OWN = {"date", "x-request-id"}
OPEN_TO_ALL = {"/healthz", "/metrics", "/"}  # without any id


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    return Endpoint(tmp_path_factory.mktemp("isolation"))


@pytest.fixture(scope="module")
def clients(endpoint: Endpoint) -> Iterator[dict[str, httpx.Client]]:
    with Server(endpoint.app) as server:
        made = {
            name: httpx.Client(base_url=server.address, headers={"Authorization": f"Bearer {key}"}, trust_env=False)
            for name, key in endpoint.keys.items()
        }
        yield made
        for client in made.values():
            client.close()


@pytest.fixture(scope="module")
def theirs(endpoint: Endpoint, clients: dict[str, httpx.Client]) -> dict[str, str]:
    """A video of team-b in each state, by state."""
    made = {}
    for number, state in enumerate((COMPLETED, FAILED, IN_PROGRESS, QUEUED)):
        body = {"prompt": "theirs", "model": f"{BASE}:{PERSON}", "seed": number}
        video = clients["team-b"].post("/v1/videos", json=body, headers={"Idempotency-Key": f"key {number}"}).json()
        made[state] = video["id"]
        if state != QUEUED:
            job = endpoint.claim()
            assert job.id == video["id"]
            if state == COMPLETED:
                endpoint.finish(job)
            elif state == FAILED:
                endpoint.jobs.fail(job.id, job.fence, "generation_failed", "")
    return made


def operations(clients: dict[str, httpx.Client]) -> list[tuple[str, str]]:
    document = clients["team-a"].get("/openapi.json").json()
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def seen(answer: httpx.Response, asked: str) -> tuple[int, dict[str, str], bytes]:
    """All of an answer but what is its own and what was asked for."""
    headers = {name: value for name, value in answer.headers.items() if name not in ITS_OWN}
    return answer.status_code, headers, answer.content.replace(asked.encode(), b"<asked>")


def test_no_route_tells_of_anothers_videos(clients: dict[str, httpx.Client], theirs: dict[str, str]) -> None:
    tried = []
    for method, path in operations(clients):
        if "{video_id}" not in path:
            continue
        for query in ({}, {"variant": "thumbnail"}, {"variant": "spritesheet"}) if "content" in path else ({},):
            for state, video_id in theirs.items():
                answers = [
                    seen(clients["team-a"].request(method, path.format(video_id=each), params=query), each)
                    for each in (video_id, NEVER)
                ]
                assert answers[0][0] == 404, (method, path, state)
                assert answers[0] == answers[1], (method, path, state)
                tried.append((method, path))
    assert len(set(tried)) == 4, "retrieve, cancel, delete, content"
    for state, video_id in theirs.items():  # and nothing happened to them
        assert clients["team-b"].get(f"/v1/videos/{video_id}").json()["status"] == state


def test_no_route_tells_of_anothers_identity(endpoint: Endpoint, clients: dict[str, httpx.Client]) -> None:
    tried = 0
    for method, path in operations(clients):
        if "{identity_id}" in path:
            answers = [
                seen(clients["team-a"].request(method, path.format(identity_id=each)), each)
                for each in (PERSON, NOBODY)
            ]
            assert answers[0][0] == 404
            assert answers[0] == answers[1]
            tried += 1
    assert tried == 1
    models = clients["team-a"].get("/v1/models").text
    assert PERSON not in models
    assert "team-b" not in models
    version = endpoint.bruno.version
    for suffix in ("", f"@{version}", "@latest", "@prod"):
        for form in (lambda name: {"model": f"{BASE}:{name}"}, lambda name: {"lora": {"name": name}}):
            answers = []
            for name in (PERSON, NOBODY):
                body: dict[str, Any] = {"prompt": "p", **form(name + suffix)}
                answers.append(seen(clients["team-a"].post("/v1/videos", json=body), name))
            assert answers[0][0] == 404
            assert answers[0] == answers[1]


def test_lists_and_pages_hold_ones_own_only(clients: dict[str, httpx.Client], theirs: dict[str, str]) -> None:
    own = clients["team-a"].post("/v1/videos", json={"prompt": "mine", "seed": 1}).json()
    listed = clients["team-a"].get("/v1/videos", params={"limit": 100}).json()
    assert [video["id"] for video in listed["data"]] == [own["id"]]
    for video_id in theirs.values():
        pages = [seen(clients["team-a"].get("/v1/videos", params={"after": each}), each) for each in (video_id, NEVER)]
        assert pages[0][0] == 404
        assert pages[0] == pages[1]


def test_anothers_idempotency_key_is_ones_own(clients: dict[str, httpx.Client], theirs: dict[str, str]) -> None:
    for number in range(len(theirs)):
        headers = {"Idempotency-Key": f"key {number}"}
        answer = clients["team-a"].post("/v1/videos", json={"prompt": "mine", "seed": 100 + number}, headers=headers)
        assert answer.status_code == 200
        assert answer.json()["id"] not in theirs.values()
        assert answer.json()["prompt"] == "mine"


def test_what_is_open_to_all_names_nobody(clients: dict[str, httpx.Client], theirs: dict[str, str]) -> None:
    for method, path in operations(clients):
        if "{" in path or path.startswith("/v1/"):
            continue
        assert path in OPEN_TO_ALL
        text = clients["team-a"].request(method, path).text
        assert not [name for name in (PERSON, "team-b", *theirs.values()) if name in text]
