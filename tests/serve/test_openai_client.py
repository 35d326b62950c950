"""The client of the `openai` package, unchanged, against the API: each method that is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magicid import storage
from tests.serve.endpoint import BASE, Endpoint, Server

# The resource is marked deprecated there because the service behind it ends; the shape lives on.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path)


@pytest.fixture
def server(endpoint: Endpoint) -> Iterator[Server]:
    with Server(endpoint.app) as running:
        yield running


def connect(server: Server, key: str) -> OpenAI:
    return OpenAI(base_url=f"{server.address}/v1", api_key=key)


def test_a_clip_is_made_looked_at_downloaded_and_deleted(endpoint: Endpoint, server: Server, tmp_path: Path) -> None:
    with connect(server, endpoint.keys["team-a"]) as client, endpoint.engine():
        video = client.videos.create_and_poll(prompt="a person nods", model=f"{BASE}:ada", poll_interval_ms=20)
        assert (video.object, video.status, video.progress) == ("video", "completed", 100)
        assert (video.model, video.prompt) == (f"{BASE}:ada@{endpoint.ada.version}", "a person nods")
        assert (video.seconds, video.size, video.error) == ("1.625", "48x48", None)
        assert (video.completed_at or 0) >= video.created_at
        assert client.videos.retrieve(video.id) == video
        client.videos.download_content(video.id).write_to_file(tmp_path / "clip.mp4")
        assert (tmp_path / "clip.mp4").read_bytes() == storage.read_bytes(
            endpoint.file(endpoint.jobs.get(video.id, None))
        )
        assert client.videos.download_content(video.id, variant="thumbnail").content[8:12] == b"WEBP"
        assert client.videos.download_content(video.id, variant="spritesheet").content[:2] == b"\xff\xd8"
        deleted = client.videos.delete(video.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)


def test_the_list_goes_through_all_pages(endpoint: Endpoint, server: Server) -> None:
    with connect(server, endpoint.keys["team-a"]) as client:
        made = [client.videos.create(prompt=f"take {n}", extra_body={"seed": n}).id for n in range(5)]
        assert [video.id for video in client.videos.list(limit=2)] == made[::-1]
        assert [video.id for video in client.videos.list(limit=2, order="asc")] == made
        models = [model.id for model in client.models.list()]
        assert models == [BASE, f"{BASE}:ada"]


def test_fields_beyond_the_clients_own_go_in_extra_body(endpoint: Endpoint, server: Server) -> None:
    with connect(server, endpoint.keys["team-a"]) as client:
        extra = {"lora": {"name": "ada", "scale": 0.75}, "num_frames": 9, "num_inference_steps": 4, "seed": 11}
        video = client.videos.create(prompt="a person jumps", size="32x32", extra_body=extra)  # type: ignore[arg-type]
    request = endpoint.jobs.get(video.id, None).request
    assert (request.frames, request.steps, request.seed, request.lora_scale) == (9, 4, 11, 0.75)
    assert (request.width, request.height) == (32, 32)


def test_a_refusal_is_the_clients_own_error_class_and_is_not_retried(endpoint: Endpoint, server: Server) -> None:
    with connect(server, endpoint.keys["team-a"]) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.videos.create(prompt="a", seconds="8")
        body = refused.value
        assert (body.param, body.code, body.type) == ("seconds", "invalid_value", "invalid_request_error")
        assert "0.625, 1.125, 1.625" in body.message
        assert str(refused.value.request_id).startswith("req_")
        with pytest.raises(openai.NotFoundError) as unknown:
            client.videos.create(prompt="a", model="sora-2")
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.ConflictError) as early:  # a status that the client would retry by itself
            client.videos.download_content(client.videos.create(prompt="a").id)
        assert early.value.response.headers["x-should-retry"] == "false"
        assert early.value.response.request.headers["x-stainless-retry-count"] == "0"
    with connect(server, "mid_" + "x" * 40) as stranger, pytest.raises(openai.AuthenticationError):
        stranger.videos.list()
    endpoint.keys["small"] = endpoint.tenants.add("small", max_open=1)
    with connect(server, endpoint.keys["small"]) as client:
        client.videos.create(prompt="a")
        with pytest.raises(openai.RateLimitError) as full:
            client.with_options(max_retries=0).videos.create(prompt="b")
        assert full.value.code == "quota_exceeded"


def test_a_failed_video_ends_the_polling(endpoint: Endpoint, server: Server) -> None:
    with connect(server, endpoint.keys["team-a"]) as client:
        video = client.videos.create(prompt="a")
        endpoint.jobs.cancel(video.id, "team-a")
        ended = client.videos.poll(video.id)
    assert ended.status == "failed"
    assert ended.error is not None
    assert ended.error.code == "cancelled"


class Dropping:
    """Lets the app do its work for the first POSTs, then closes the connection instead of answering."""

    def __init__(self, app: ASGIApp, times: int) -> None:
        self.app, self.left, self.posts = app, times, 0
        self.server: Server | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        self.posts += is_post
        if not is_post or not self.left:
            await self.app(scope, receive, send)
            return

        async def unheard(_: Message) -> None:
            return

        self.left -= 1
        await self.app(scope, receive, unheard)
        assert self.server is not None
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]


def test_a_post_whose_answer_was_lost_makes_one_video(endpoint: Endpoint) -> None:
    dropping = Dropping(endpoint.app, times=2)
    with Server(dropping) as server, connect(server, endpoint.keys["team-a"]) as client:
        dropping.server = server
        video = client.videos.create(prompt="a person nods", model=f"{BASE}:ada")
    assert dropping.posts == 3
    found, _ = endpoint.jobs.list(None)
    assert [job.id for job in found] == [video.id]
