"""The HTTP API by plain HTTP, over real records: what is accepted, what is answered, who sees what."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from sqlalchemy.exc import OperationalError

from magicid import adapters, provenance, storage
from magicid.clips import decode_mp4
from magicid.run import clip_uri
from magicid.schema import MetricRow, ScoredClip
from serve import api_identities, body_bounds
from serve.clips import clip_uri as video_clip_uri
from serve.schema import Job
from tests.report.fake_run import fill
from tests.serve.endpoint import BASE, BASE_SHA256, Endpoint, Server

OPEN_FIELDS = {"created_at", "id", "seed"}


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path)


@pytest.fixture
def server(endpoint: Endpoint) -> Iterator[Server]:
    with Server(endpoint.app) as running:
        yield running


@pytest.fixture
def client(endpoint: Endpoint, server: Server) -> Iterator[httpx.Client]:
    with as_tenant(server, endpoint, "team-a") as made:
        yield made


def as_tenant(server: Server, endpoint: Endpoint, name: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {endpoint.keys[name]}"}
    return httpx.Client(base_url=server.address, headers=headers, trust_env=False, timeout=20)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which has the one form of all errors."""
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    if 400 <= status < 500 and status not in (408, 429):
        assert answer.headers["x-should-retry"] == "false"
    return dict(error)


def post(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json={"prompt": "a person nods", **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# ---- creating ------------------------------------------------------------------------------------------------------


def test_a_post_answers_a_video_whose_record_is_there(endpoint: Endpoint, client: httpx.Client) -> None:
    answer = client.post("/v1/videos", json={"prompt": "a person nods", "model": f"{BASE}:ada", "seed": 7})
    video = answer.json()
    assert {name: value for name, value in video.items() if name not in OPEN_FIELDS} == {
        "object": "video",
        "model": f"{BASE}:ada@{endpoint.ada.version}",
        "status": "queued",
        "progress": 0,
        "completed_at": None,
        "expires_at": None,
        "error": None,
        "prompt": "a person nods",
        "seconds": "1.625",
        "size": "48x48",
        "lora_version": endpoint.ada.version,
        "attempt": 1,
        "queue_position": 0,
    }
    assert answer.headers["openai-poll-after-ms"] == "1000"
    job = endpoint.jobs.get(video["id"], "team-a")
    assert job.request_id == answer.headers["x-request-id"]
    assert (job.request.seed, job.request.frames, job.request.steps, job.target.owner) == (7, 13, 12, "team-a")
    assert client.get(f"/v1/videos/{video['id']}").json() == video
    (line,) = endpoint.audit.read(subject=video["id"])
    assert (line.action, line.tenant, line.request_id) == ("video.create", "team-a", job.request_id)
    assert line.detail == {"model": video["model"], "owner": "team-a", "consent": "form of ada"}


def test_no_video_is_accepted_without_its_line_in_the_audit_log(
    endpoint: Endpoint, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise OperationalError("insert", {}, Exception("the process dies here"))

    with monkeypatch.context() as patch:
        patch.setattr(endpoint.audit, "write", away)
        assert client.post("/v1/videos", json={"prompt": "a person nods"}).status_code >= 500
    assert client.get("/v1/videos").json()["data"] == []
    video = post(client)
    assert [line.action for line in endpoint.audit.read(subject=video["id"])] == ["video.create"]


def test_multipart_and_json_are_the_same_request(endpoint: Endpoint, client: httpx.Client) -> None:
    fields = {"prompt": "a dög jumps", "model": BASE, "seconds": "1.125", "fps": 8, "size": "32x64", "seed": 3}
    first = client.post("/v1/videos", json={**fields, "lora": {"name": "ada", "scale": 0.5}}).json()
    for lora in ({"lora[name]": "ada", "lora[scale]": "0.5"}, {"lora": json.dumps({"name": "ada", "scale": 0.5})}):
        parts = [(name, (None, str(value))) for name, value in {**fields, **lora}.items()]
        again = client.post("/v1/videos", files=parts)
        assert again.json() == first
    request = endpoint.jobs.get(first["id"], None).request
    assert (request.frames, request.width, request.height, request.lora_scale) == (9, 32, 64, 0.5)
    assert request.prompt == "a dög jumps"


def test_what_is_left_out_is_the_base_models_own(endpoint: Endpoint, client: httpx.Client) -> None:
    video = post(client)
    job = endpoint.jobs.get(video["id"], None)
    assert (video["model"], video["lora_version"], job.target.location) == (BASE, None, None)
    assert (job.request.fps, job.request.guidance_scale, job.request.lora_scale) == (8, 2.5, 1.0)
    seeds = {post(client, prompt=f"take {n}")["seed"] for n in range(5)}
    assert len(seeds) == 5


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "  \n"}, "prompt", "must say something"),
        ({"prompt": "a\x00b"}, "prompt", "U+0000"),
        ({"prompt": "x" * 4001}, "prompt", "4000"),
        ({"seconds": "4"}, "seconds", "one of 0.625, 1.125, 1.625 at 8 fps"),
        ({"seconds": "nan"}, "seconds", "one of"),
        ({"num_frames": 12}, "num_frames", "one of 5, 9, 13"),
        ({"num_frames": 17}, "num_frames", "one of 5, 9, 13"),
        ({"num_frames": True}, None, "num_frames must not be true"),
        ({"num_frames": 5, "seconds": "1.625"}, "num_frames", "differ"),
        ({"size": "1280x720"}, "size", "48x48"),
        ({"size": "24x48"}, "size", "multiples of 16"),
        ({"size": "0x48"}, "size", "multiples of 16"),
        ({"size": "48"}, "size", "pattern"),
        ({"num_inference_steps": 101}, "num_inference_steps", "at most 100"),
        ({"guidance_scale": 0}, "guidance_scale", "greater than or equal to 1"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"negative_prompt": "blurry"}, "negative_prompt", "without classifier-free guidance"),
        ({"frames": 5}, None, "unknown field 'frames'"),
        ({"lora": {"path": "/etc/passwd"}}, "lora", "not a path"),
        ({"lora": {"name": "../ada"}}, "lora", "not a path"),
        ({"lora": {"name": "s3://bucket/ada"}}, "lora", "not a path"),
        ({"lora": {"name": "ada\\x"}}, "lora", "not a path"),
        ({"lora": {"name": "ada.safetensors"}}, "lora", "not a path"),
        ({"lora": "{"}, "lora", "must be JSON"),
        ({"lora": "[" * 50_000}, "lora", "must be JSON"),
        ({"lora": {"name": "ada", "scale": 3}}, "lora.scale", "less than or equal to 2"),
        ({"lora": {"scale": 0.5}}, "lora", "name one"),
        ({"lora": {"name": "ada"}, "model": f"{BASE}:bruno"}, "lora", "give one of them"),
        ({"webhook_url": "https://example.com/"}, "webhook_url", "not set up"),
    ],
)
def test_a_bad_field_is_named_and_nothing_is_queued(
    endpoint: Endpoint, client: httpx.Client, fields: dict[str, Any], param: str | None, told: str
) -> None:
    error = error_of(client.post("/v1/videos", json={"prompt": "a person nods", **fields}), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert told in error["message"]
    assert endpoint.jobs.open_work().queued == 0


def test_a_body_that_cannot_be_read_is_refused(endpoint: Endpoint, client: httpx.Client) -> None:
    url, as_json = "/v1/videos", {"Content-Type": "application/json"}
    assert error_of(client.post(url, content=b"{", headers=as_json), 400)["code"] == "invalid_json"
    assert error_of(client.post(url, content=b'{"prompt": "\xff"}', headers=as_json), 400)["code"] == "invalid_json"
    assert error_of(client.post(url, content=b'{"prompt": "\\ud800"}', headers=as_json), 400)["param"] == "prompt"
    assert error_of(client.post(url, content=b"[1]", headers=as_json), 400)["message"].endswith("a JSON object")
    assert error_of(client.post(url, json={"model": BASE}), 400)["code"] == "missing_required_parameter"
    assert error_of(client.post(url, data={"prompt": "a"}), 415)["code"] == "unsupported_media_type"
    assert error_of(client.post(url), 415)["code"] == "unsupported_media_type"
    zipped = {**as_json, "Content-Encoding": "gzip"}
    assert error_of(client.post(url, content=b"{}", headers=zipped), 415)["code"] == "unsupported_encoding"
    bad_form = {"Content-Type": "multipart/form-data"}
    assert "boundary" in error_of(client.post(url, content=b"x", headers=bad_form), 400)["message"]
    upload: dict[str, Any] = {"prompt": (None, "a"), "input_reference": ("face.png", b"PNG")}
    assert error_of(client.post(url, files=upload), 400)["param"] == "input_reference"
    twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    assert error_of(client.post(url, files=twice), 400)["message"] == "prompt: was sent twice"
    many = [(f"field{n}", (None, "")) for n in range(50)]
    assert "Too many fields" in error_of(client.post(url, files=many), 400)["message"]
    assert endpoint.jobs.open_work().queued == 0


def test_a_webhook_may_only_go_to_a_public_address(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path, webhook_secret="whsec_" + "A" * 32)
    with Server(endpoint.app) as server, as_tenant(server, endpoint, "team-a") as client:
        for url in ("http://127.0.0.1/x", "http://[::1]/", "file:///etc/passwd", "http://169.254.169.254/"):
            answer = client.post("/v1/videos", json={"prompt": "a", "webhook_url": url})
            assert error_of(answer, 400)["param"] == "webhook_url"
        video = post(client, webhook_url="https://1.1.1.1/told")
        assert endpoint.jobs.get(video["id"], None).webhook_url == "https://1.1.1.1/told"


# ---- the same call again -------------------------------------------------------------------------------------------


def test_equal_posts_are_one_video_and_different_ones_are_not(endpoint: Endpoint, client: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        videos = list(pool.map(lambda _: post(client, model=f"{BASE}:ada"), range(8)))
    assert len({video["id"] for video in videos}) == 1
    assert post(client, model=f"{BASE}:ada", seed=1)["id"] != videos[0]["id"]
    assert len(endpoint.audit.read(subject=videos[0]["id"])) == 1


def test_an_idempotency_key_is_one_video_for_ever(endpoint: Endpoint, client: httpx.Client, server: Server) -> None:
    def keyed(client: httpx.Client, key: str, **fields: Any) -> httpx.Response:
        return client.post("/v1/videos", json={"prompt": "a", **fields}, headers={"Idempotency-Key": key})

    first = keyed(client, "k1")
    assert keyed(client, "k1").json()["id"] == first.json()["id"]
    assert keyed(client, "k2").json()["id"] != first.json()["id"]
    assert error_of(keyed(client, "k1", prompt="b"), 422)["code"] == "idempotency_key_reused"
    assert error_of(keyed(client, "x" * 256), 400)["param"] == "idempotency-key"
    with as_tenant(server, endpoint, "team-b") as other:
        assert keyed(other, "k1").json()["id"] != first.json()["id"]


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_video_is_followed_to_its_end(endpoint: Endpoint, client: httpx.Client) -> None:
    first, second = (post(client, seed=seed) for seed in (1, 2))
    url = f"/v1/videos/{second['id']}"
    assert client.get(url).json()["queue_position"] == 1
    endpoint.finish(endpoint.claim())
    job = endpoint.claim()
    endpoint.jobs.heartbeat("worker", {job.id: (job.fence, 42)})
    answer = client.get(url)
    assert (answer.json()["status"], answer.json()["progress"]) == ("in_progress", 42)
    assert answer.json()["queue_position"] is None
    assert "openai-poll-after-ms" in answer.headers
    assert endpoint.jobs.release(job.id, job.fence)
    back = client.get(url).json()
    assert (back["status"], back["attempt"], back["progress"]) == ("queued", 2, 0)
    endpoint.finish(endpoint.claim())
    answer = client.get(url)
    video = answer.json()
    assert (video["status"], video["progress"], video["attempt"]) == ("completed", 100, 2)
    assert video["expires_at"] == pytest.approx(video["completed_at"] + endpoint.settings.retention_s, abs=1)
    assert "openai-poll-after-ms" not in answer.headers
    listed = client.get("/v1/videos").json()
    assert [v["id"] for v in listed["data"]] == [second["id"], first["id"]]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (second["id"], first["id"], False)


def test_the_list_is_paged_in_both_orders(client: httpx.Client) -> None:
    made = [post(client, seed=seed)["id"] for seed in range(5)]
    for order, expected in (("asc", made), ("desc", made[::-1])):
        page = client.get("/v1/videos", params={"limit": 2, "order": order}).json()
        seen = [video["id"] for video in page["data"]]
        while page["has_more"]:
            page = client.get("/v1/videos", params={"limit": 2, "order": order, "after": page["last_id"]}).json()
            seen += [video["id"] for video in page["data"]]
        assert seen == expected
    for bad in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}):
        (param,) = bad
        assert error_of(client.get("/v1/videos", params=bad), 400)["param"] == param
    assert error_of(client.get("/v1/videos", params={"after": "video_unknown"}), 404)["code"] == "video_not_found"


def finished(endpoint: Endpoint, client: httpx.Client, **fields: Any) -> Job:
    video = post(client, **fields)
    job = endpoint.finish(endpoint.claim())
    assert job.id == video["id"]
    return job


def test_content_comes_whole_in_parts_and_as_pictures(endpoint: Endpoint, client: httpx.Client) -> None:
    job = finished(endpoint, client, model=f"{BASE}:ada", seed=5)
    data, url = storage.read_bytes(endpoint.file(job)), f"/v1/videos/{job.id}/content"
    whole = client.get(url)
    assert whole.content == data
    assert storage.sha256_bytes(whole.content) == job.video_sha256
    assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("video/mp4", "bytes")
    etag, size = whole.headers["etag"], len(data)

    def ranged(value: str, **headers: str) -> httpx.Response:
        return client.get(url, headers={"Range": value, **headers})

    for value, start, stop in (("bytes=0-99", 0, 100), ("bytes=100-", 100, size), ("bytes=-7", size - 7, size)):
        answer = ranged(value)
        assert (answer.status_code, answer.content) == (206, data[start:stop])
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    assert ranged(f"bytes={size - 1}-{size + 10}").content == data[-1:]
    assert ranged("bytes=0-9", **{"If-Range": etag}).status_code == 206
    for value in ("bytes=0-1,4-5", "items=0-1", "bytes=5-2", "bytes=a-b", "bytes=-"):
        assert (ranged(value).status_code, ranged(value).content) == (200, data)
    assert ranged("bytes=0-9", **{"If-Range": '"other"'}).content == data
    beyond = ranged(f"bytes={size}-")
    assert error_of(beyond, 416)["code"] == "invalid_range"
    assert beyond.headers["content-range"] == f"bytes */{size}"
    same = client.get(url, headers={"If-None-Match": etag})
    assert (same.status_code, same.content) == (304, b"")

    frames, _ = decode_mp4(data)
    thumbnail = client.get(url, params={"variant": "thumbnail"})
    shown = np.asarray(Image.open(io.BytesIO(thumbnail.content)).convert("RGB")).astype(float)
    assert (thumbnail.headers["content-type"], shown.shape) == ("image/webp", (48, 48, 3))
    assert np.abs(shown - frames[6]).mean() < 8  # the middle of 13
    assert np.abs(shown - frames[0]).mean() > 20
    sheet = client.get(url, params={"variant": "spritesheet"})
    tiles = np.asarray(Image.open(io.BytesIO(sheet.content))).astype(float)
    assert (sheet.headers["content-type"], tiles.shape) == ("image/jpeg", (4 * 48, 4 * 48, 3))
    assert np.abs(tiles[48:96, 96:144] - frames[6]).mean() < 8  # row 1, column 2
    assert tiles[144:, 48:].mean() < 2  # 13 frames leave three places empty
    assert error_of(client.get(url, params={"variant": "audio"}), 400)["param"] == "variant"


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
def test_everything_served_says_that_it_is_made_by_ai(endpoint: Endpoint, client: httpx.Client, variant: str) -> None:
    job = finished(endpoint, client, model=f"{BASE}:ada", seed=5)
    answer = client.get(f"/v1/videos/{job.id}/content", params={"variant": variant})
    found = provenance.read(answer.content)
    assert (found.state, found.ai_generated) == ("valid", True)
    assert found.claim is not None
    assert (found.claim.base_sha256, found.claim.adapter_version) == (BASE_SHA256, endpoint.ada.version)
    assert found.claim == provenance.read(storage.read_bytes(endpoint.file(job))).claim
    url, tag = str(answer.url), answer.headers["etag"]
    assert client.get(url, headers={"If-None-Match": tag}).status_code == 304
    part = client.get(url, headers={"Range": "bytes=0-9"})
    assert part.status_code == (206 if variant == "video" else 200), "pictures come whole: they are signed each time"


def test_a_video_without_content_says_why(endpoint: Endpoint, client: httpx.Client) -> None:
    video = post(client)
    url = f"/v1/videos/{video['id']}/content"
    assert error_of(client.get(url), 409)["code"] == "video_not_ready"
    job = endpoint.claim()
    assert endpoint.jobs.fail(job.id, job.fence, "generation_failed", "the sample was not finite")
    assert error_of(client.get(url), 409)["code"] == "video_failed"
    failed = client.get(f"/v1/videos/{video['id']}").json()
    assert failed["error"] == {"code": "generation_failed", "message": "the sample was not finite"}


def test_cancel_and_delete(endpoint: Endpoint, client: httpx.Client) -> None:
    queued = post(client, seed=1)["id"]
    stopped = client.post(f"/v1/videos/{queued}/cancel").json()
    assert (stopped["status"], stopped["error"]["code"]) == ("failed", "cancelled")
    running = post(client, seed=2)["id"]
    job = endpoint.claim()
    assert client.post(f"/v1/videos/{running}/cancel").json()["status"] == "in_progress"
    assert endpoint.jobs.heartbeat("worker", {job.id: (job.fence, 10)}) == {job.id}
    assert endpoint.jobs.fail(job.id, job.fence, "cancelled", "cancelled on request")
    job = finished(endpoint, client, seed=3)
    assert client.post(f"/v1/videos/{job.id}/cancel").json()["status"] == "completed"
    answer = client.delete(f"/v1/videos/{job.id}")
    assert answer.json() == {"id": job.id, "object": "video.deleted", "deleted": True}
    assert not storage.exists(endpoint.file(job))
    for again in (client.delete(f"/v1/videos/{job.id}"), client.get(f"/v1/videos/{job.id}/content")):
        assert error_of(again, 404)["code"] == "video_not_found"
    actions = [line.action for line in endpoint.audit.read()]
    assert actions == ["video.create", "video.cancel"] * 2 + ["video.create", "video.cancel", "video.delete"]


# ---- tenants -------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_told(endpoint: Endpoint, server: Server) -> None:
    headers: list[dict[str, str]] = [{}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {'x' * 40}"}]
    headers.append({"Authorization": "Bearer"})
    with httpx.Client(base_url=server.address, trust_env=False) as client:
        for given in headers:
            for method, url in (("POST", "/v1/videos"), ("GET", "/v1/videos/x"), ("GET", "/v1/models")):
                answer = client.request(method, url, headers=given)
                assert error_of(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"


def test_anothers_video_is_answered_exactly_as_one_that_is_not(
    endpoint: Endpoint, client: httpx.Client, server: Server
) -> None:
    job = finished(endpoint, client, model=f"{BASE}:ada")
    with as_tenant(server, endpoint, "team-b") as other, as_tenant(server, endpoint, "root") as admin:
        for method, suffix in (("GET", ""), ("GET", "/content"), ("POST", "/cancel"), ("DELETE", "")):
            answers = [other.request(method, f"/v1/videos/{name}{suffix}") for name in (job.id, "video_0", "a%00b")]
            assert {answer.status_code for answer in answers} == {404}
            assert len({answer.content for answer in answers}) == 1
            skipped = ("x-request-id", "date")
            seen = [{k: v for k, v in answer.headers.items() if k not in skipped} for answer in answers]
            assert seen[0] == seen[1] == seen[2]
        assert other.get("/v1/videos", params={"after": job.id}).status_code == 404
        assert other.get("/v1/videos").json()["data"] == []
        assert admin.get(f"/v1/videos/{job.id}").json()["id"] == job.id
    assert storage.exists(endpoint.file(job))


def test_a_model_that_may_not_be_used_is_answered_as_one_that_is_not(endpoint: Endpoint, client: httpx.Client) -> None:
    def refused(name: str) -> str:
        error = error_of(client.post("/v1/videos", json={"prompt": "a", "model": name}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        return str(error["message"]).replace(name, "NAME")

    names = [f"{BASE}:bruno", f"{BASE}:nobody", "sora-2", f"{BASE}:../bruno", f"{BASE}:ada@nope"]
    assert len({refused(name) for name in names}) == 1
    endpoint.tenants.grant("team-a", "bruno")
    assert post(client, model=f"{BASE}:bruno")["lora_version"] == endpoint.bruno.version


def test_models_are_those_that_the_key_may_use(endpoint: Endpoint, client: httpx.Client, server: Server) -> None:
    adapters.set_alias(endpoint.run, "ada", "prod", endpoint.ada.version)
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [BASE, f"{BASE}:ada"]
    ada = listed["data"][1]
    assert (ada["object"], ada["owned_by"], ada["identity"]) == ("model", "team-a", "ada")
    assert ada["versions"] == [endpoint.ada.version]
    assert ada["aliases"] == {"prod": {"version": endpoint.ada.version, "canary_version": None, "canary_share": 0.0}}
    with as_tenant(server, endpoint, "root") as admin:
        assert len(admin.get("/v1/models").json()["data"]) == 3


def test_too_much_is_answered_with_a_time_to_come_back(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path, max_queued=3)
    endpoint.keys["small"] = endpoint.tenants.add("small", max_open=1)
    endpoint.keys["slow"] = endpoint.tenants.add("slow", requests_per_minute=2)
    with Server(endpoint.app) as server:
        with as_tenant(server, endpoint, "small") as client:
            first = post(client, seed=1)
            over = client.post("/v1/videos", json={"prompt": "a person nods", "seed": 2})
            assert error_of(over, 429)["code"] == "quota_exceeded"
            assert int(over.headers["retry-after"]) >= 1
            assert post(client, seed=1)["id"] == first["id"]  # what is there already is answered all the same
        with as_tenant(server, endpoint, "team-a") as client:
            assert {post(client, seed=seed)["status"] for seed in (1, 2)} == {"queued"}
            full = client.post("/v1/videos", json={"prompt": "a person nods", "seed": 3})
            assert error_of(full, 429)["code"] == "queue_full"
            assert int(full.headers["retry-after"]) >= 1
        with as_tenant(server, endpoint, "slow") as client:
            codes = [client.get("/v1/models").status_code for _ in range(3)]
            assert codes == [200, 200, 429]
            wait = client.get("/v1/models")
            assert error_of(wait, 429)["code"] == "rate_limit_exceeded"
            assert 1 <= int(wait.headers["retry-after"]) <= 30


# ---- removing a person ---------------------------------------------------------------------------------------------


def test_a_deleted_person_leaves_nothing(tmp_path: Path) -> None:
    filled = fill(str(tmp_path / "run"), ("ada", "bruno"), takes=2)
    clip_ids = [row.clip_id for row in filled.read_parts("scored", ScoredClip)]
    clip_ids += [row.clip_id for row in filled.read_parts("evaluation", MetricRow)]
    for clip_id in clip_ids:
        storage.write_bytes(filled.path(clip_uri(clip_id, ".safetensors")), b"latents")
    storage.remove(tmp_path / "run" / "adapters")  # theirs are of another owner
    endpoint = Endpoint(tmp_path)
    run = tmp_path / "run"
    (run / "report.html").write_text("photos of everybody")
    kept_before = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and "bruno" in str(p)}
    with (
        Server(endpoint.app) as server,
        as_tenant(server, endpoint, "team-b") as guest,
        as_tenant(server, endpoint, "team-a") as owner,
    ):
        unknown = error_of(guest.delete("/v1/identities/nobody"), 404)
        assert error_of(guest.delete("/v1/identities/ada"), 404) == unknown
        assert error_of(guest.delete("/v1/identities/..%2Fada"), 404)["code"] == "not_found"
        endpoint.tenants.grant("team-b", "ada")
        assert error_of(guest.delete("/v1/identities/ada"), 403)["code"] == "not_the_owner"
        done = finished(endpoint, owner, model=f"{BASE}:ada")
        theirs = finished(endpoint, guest, model=f"{BASE}:ada")
        other = finished(endpoint, guest, model=f"{BASE}:bruno")
        running, waiting = (post(owner, model=f"{BASE}:ada", seed=seed)["id"] for seed in (8, 9))
        job = endpoint.claim()
        assert job.id == running
        answer = owner.delete("/v1/identities/ada").json()
        assert (answer["deleted"], answer["adapters"]) == (True, [endpoint.ada.version])
        assert answer["videos"] == 4
        assert answer["files"] > 40
        assert not storage.exists(endpoint.file(done))
        assert not storage.exists(endpoint.file(theirs))
        assert storage.exists(endpoint.file(other))
        assert owner.get(f"/v1/videos/{waiting}").status_code == 404
        assert endpoint.jobs.heartbeat("worker", {running: (job.fence, 50)}) == {running}
        assert error_of(owner.post("/v1/videos", json={"prompt": "a", "model": f"{BASE}:ada"}), 404)
        assert error_of(owner.delete("/v1/identities/ada"), 404) == unknown
    left = [p for p in run.rglob("*") if p.is_file()]
    names = {part.split(".")[0] for p in left for part in p.relative_to(run).parts}
    assert names.isdisjoint({"ada", "report"})
    assert kept_before <= {str(p.relative_to(run)) for p in left}
    named: set[str] = set()
    for table in left:
        if table.suffix == ".parquet":
            rows = storage.read_table(table)
            assert "ada" not in {found.get("identity_id") for found in rows}
            for found in rows:
                for uri in filter(None, (found.get("video_uri"), found.get("latents_uri"))):
                    assert (run / uri).exists(), uri
            named |= {clip_uri(found["clip_id"], ".safetensors") for found in rows if "clip_id" in found}
    latents = {str(p.relative_to(run)) for p in left if p.read_bytes() == b"latents"}
    assert latents
    assert latents <= named  # none is left that no row names
    assert any(endpoint.bruno.version in str(p) for p in left)


def test_a_person_whose_manifests_are_all_damaged_can_be_removed_by_the_owner(tmp_path: Path) -> None:
    fill(str(tmp_path / "run"), ("ada", "bruno"), takes=2)  # the run says that they are the studio's
    endpoint = Endpoint(tmp_path)
    endpoint.keys["studio"] = endpoint.tenants.add("studio")
    endpoint.tenants.grant("team-b", "ada")
    run = tmp_path / "run"
    for manifest in (run / "adapters" / "ada").glob("*/manifest.json"):
        manifest.write_text("{")
    with Server(endpoint.app) as server:
        with as_tenant(server, endpoint, "team-a") as other, as_tenant(server, endpoint, "team-b") as guest:
            unknown = error_of(other.delete("/v1/identities/nobody"), 404)
            for stranger in (other, guest):  # a grant shows what is offered, and this is not
                assert error_of(stranger.delete("/v1/identities/ada"), 404) == unknown
        with as_tenant(server, endpoint, "studio") as owner:
            answer = owner.delete("/v1/identities/ada")
            assert answer.status_code == 200, answer.text
            assert answer.json()["adapters"]
            assert error_of(owner.delete("/v1/identities/ada"), 404) == unknown
    names = {part.split(".")[0] for p in run.rglob("*") if p.is_file() for part in p.relative_to(run).parts}
    assert "ada" not in names
    assert "bruno" in names


def test_an_admin_removes_a_person_of_whom_only_records_tell(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    with Server(endpoint.app) as server:
        with as_tenant(server, endpoint, "team-a") as owner:
            job = finished(endpoint, owner, model=f"{BASE}:ada")
        for manifest in (tmp_path / "run" / "adapters" / "ada").glob("*/manifest.json"):
            manifest.write_text("{")
        with as_tenant(server, endpoint, "root") as admin:
            assert admin.delete("/v1/identities/ada").json()["videos"] == 1
            error_of(admin.get(f"/v1/videos/{job.id}"), 404)
    assert not storage.exists(endpoint.file(job))


def test_a_video_accepted_by_an_api_that_has_not_seen_the_removal_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint(tmp_path)
    endpoint.catalog.refresh_s, late = 60.0, []
    with Server(endpoint.app) as server, as_tenant(server, endpoint, "team-a") as owner:
        assert post(owner, model=f"{BASE}:ada", seed=1)["status"] == "queued"

        def while_it_waits(seconds: float) -> None:
            assert seconds == 60.0
            assert not storage.exists(endpoint.ada.location)
            late.append(post(owner, model=f"{BASE}:ada", seed=2)["id"])

        monkeypatch.setattr(api_identities, "sleep", while_it_waits)
        assert owner.delete("/v1/identities/ada").json()["videos"] == 2
        error_of(owner.get(f"/v1/videos/{late[0]}"), 404)


def test_clips_that_no_record_names_go_with_their_video(endpoint: Endpoint, client: httpx.Client) -> None:
    left = []
    for route in ("/v1/videos/{}", "/v1/identities/ada"):
        video = post(client, model=f"{BASE}:ada")
        job = endpoint.claim()
        left.append(storage.join(endpoint.settings.clips_location, video_clip_uri(job.id, job.fence)))
        storage.write_bytes(left[-1], b"a clip whose replica died before it told the record")
        assert client.delete(route.format(video["id"])).status_code == 200
    assert [storage.exists(location) for location in left] == [False, False]


# ---- the door ------------------------------------------------------------------------------------------------------


def test_every_error_has_the_one_form(client: httpx.Client) -> None:
    assert error_of(client.get("/nothing/here"), 404)["code"] == "not_found"
    assert error_of(client.get("/v1/videos/a/b/c"), 404)["code"] == "not_found"
    wrong = client.put("/v1/videos")
    assert error_of(wrong, 405)["code"] == "method_not_allowed"
    assert "POST" in wrong.headers["allow"]


def test_a_failure_inside_tells_nothing_and_logs_no_prompt(
    endpoint: Endpoint, client: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a very particular prompt"

    def broken(*_: object, **__: object) -> None:
        raise ValueError(prompt)

    monkeypatch.setattr(endpoint.jobs, "create", broken)
    with caplog.at_level(logging.INFO):
        answer = client.post("/v1/videos", json={"prompt": prompt})
    assert error_of(answer, 500)["code"] == "internal_error"
    ours = "\n".join(r.getMessage() for r in caplog.records if r.name == "magicid.serve")
    assert answer.headers["x-request-id"] in ours
    assert "ValueError" in ours
    assert "/v1/videos 500" in ours
    assert prompt not in answer.text + caplog.text
    assert endpoint.keys["team-a"] not in caplog.text


def test_storage_that_is_away_is_told_as_such(endpoint: Endpoint, client: httpx.Client) -> None:
    job = finished(endpoint, client)
    storage.remove(endpoint.file(job))
    for variant in ("video", "thumbnail"):
        answer = client.get(f"/v1/videos/{job.id}/content", params={"variant": variant})
        assert error_of(answer, 503)["code"] == "unavailable"
        assert int(answer.headers["retry-after"]) >= 1
        assert endpoint.settings.data not in answer.text


def test_prompts_are_logged_only_when_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, log_prompts in enumerate((False, True)):
        endpoint = Endpoint(tmp_path / str(number), log_prompts=log_prompts)
        caplog.clear()
        caplog.set_level(logging.INFO, logger="magicid.serve")
        with Server(endpoint.app) as server, as_tenant(server, endpoint, "team-a") as client:
            post(client, prompt="a very particular prompt")
        assert ("a very particular prompt" in caplog.text) == log_prompts


def raw(server: Server, data: bytes, timeout: float = 10) -> bytes:
    """What the server answers to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def head(endpoint: Endpoint, *lines: str) -> bytes:
    key = endpoint.keys["team-a"]
    start = ["POST /v1/videos HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", "Content-Type: application/json"]
    return "\r\n".join([*start, *lines, "", ""]).encode()


def test_a_body_is_counted_while_it_comes(endpoint: Endpoint, server: Server, client: httpx.Client) -> None:
    limit = endpoint.settings.max_body_bytes
    assert error_of(client.post("/v1/videos", json={"prompt": "x" * limit}), 413)["code"] == "body_too_large"
    # Told beforehand: refused before a byte of it is sent.
    answer = raw(server, head(endpoint, f"Content-Length: {10 * limit}"))
    assert answer.startswith(b"HTTP/1.1 413")
    # In chunks without end: refused when the limit is passed, with the connection still open for more.
    chunk = b"%x\r\n%s\r\n" % (4096, b" " * 4096)
    answer = raw(server, head(endpoint, "Transfer-Encoding: chunked") + chunk * (limit // 4096 + 1))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer


def test_a_body_that_never_comes_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_bounds, "BODY_S", 0.2)
    endpoint = Endpoint(tmp_path)
    with Server(endpoint.app) as server:
        answer = raw(server, head(endpoint, "Content-Length: 100") + b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


def test_headers_beyond_all_use_are_refused(endpoint: Endpoint, server: Server, client: httpx.Client) -> None:
    many = {f"X-Header-{n}": "1" for n in range(101)}
    assert error_of(client.get("/v1/videos", headers=many), 431)["code"] == "headers_too_large"
    assert error_of(client.get("/v1/videos", headers={"X-Long": "x" * 17000}), 431)["code"] == "headers_too_large"


def test_every_answer_is_private_and_has_an_id_of_the_servers_own(client: httpx.Client) -> None:
    answers = [client.get(url, headers={"x-request-id": "mine"}) for url in ("/v1/videos", "/healthz", "/x", "/")]
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(given) == 1 and given[0].startswith("req_") for given in ids)
    assert len({given[0] for given in ids}) == len(ids)
    assert answers[0].headers["cache-control"] == "no-store"
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_health_metrics_and_the_document(endpoint: Endpoint, server: Server) -> None:
    with httpx.Client(base_url=server.address, trust_env=False) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        metrics = client.get("/metrics")
        assert metrics.text == "magicid_queue_jobs 0\n"
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        document = client.get("/openapi.json").json()
    content = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    fields = document["components"]["schemas"]["CreateVideo"]["properties"]
    assert {"prompt", "model", "seconds", "size", "num_frames", "lora", "seed"} <= set(fields)
    assert "422" not in document["paths"]["/v1/videos"]["get"]["responses"]
