"""Requests drawn from the API's own OpenAPI document, valid and not: no answer is a failure, all are as documented."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serve.schema import Target, VideoRequest
from tests.serve.endpoint import BASE, FPS, FRAMES, SIDE, Endpoint, Server

EXAMPLES = 40  # for each operation
OPERATIONS = [
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos"),
    ("GET", "/v1/videos/{video_id}"),
    ("GET", "/v1/videos/{video_id}/content"),
    ("POST", "/v1/videos/{video_id}/cancel"),
    ("DELETE", "/v1/videos/{video_id}"),
    ("GET", "/v1/models"),
    ("DELETE", "/v1/identities/{identity_id}"),
    ("GET", "/healthz"),
    ("GET", "/metrics"),
]
CHECKED = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    """One endpoint for all examples."""
    made = Endpoint(tmp_path_factory.mktemp("hostile"), dedupe_s=0, max_queued=100_000)
    made.keys["fuzz"] = made.tenants.add("fuzz", requests_per_minute=10**9, max_open=10**6, grants=["ada"])
    return made


def finished_video(endpoint: Endpoint) -> str:
    """The id of a finished video of the drawn requests' tenant; a new one where they have deleted it."""
    for job in endpoint.jobs.list("fuzz", limit=100, order="asc")[0]:
        if job.video_uri is not None:
            return job.id
    request = VideoRequest("a person nods", FRAMES, SIDE, SIDE, FPS, steps=12, guidance_scale=5.0, seed=1)
    made, _ = endpoint.jobs.create("fuzz", Target(BASE), request, request_id="r", dedupe_key="k", dedupe_s=0)
    while (job := endpoint.claim()).id != made.id:
        endpoint.jobs.cancel(job.id, None)
        endpoint.jobs.fail(job.id, job.fence, "cancelled", "not this one")
    return endpoint.finish(job).id


@pytest.fixture(scope="module")
def server(endpoint: Endpoint) -> Iterator[Server]:
    with Server(endpoint.app) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: Server) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json")


def test_every_operation_of_the_document_is_drawn(document: BaseSchema) -> None:
    found = [result.ok() for result in document.get_all_operations()]  # type: ignore[union-attr]
    assert {(operation.method.upper(), operation.path) for operation in found} == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_makes_the_endpoint_fail(method: str, path: str, document: BaseSchema, endpoint: Endpoint) -> None:
    operation = document[path][method]
    headers = {"Authorization": f"Bearer {endpoint.keys['fuzz']}"}
    as_documented = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    against_it = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @hypothesis.settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=as_documented | against_it, of_a_video=st.booleans())
    def ask(case: Case, of_a_video: bool) -> None:
        if of_a_video and "video_id" in case.path_parameters:  # one drawn at random is never that of a video
            case.path_parameters["video_id"] = finished_video(endpoint)
        case.call_and_validate(headers=headers, checks=CHECKED)

    ask()
