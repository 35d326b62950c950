"""The page in a headless browser, over a live API: from the key to a clip that plays."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from magicid import adapters
from tests.serve.endpoint import Endpoint, Server, publish

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on PATH")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path)


@pytest.fixture
def server(endpoint: Endpoint) -> Iterator[Server]:
    with Server(endpoint.app) as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """A page that is not signed in; a script error, a refused resource or a request to elsewhere fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)

    def asked(url: str) -> None:
        if not url.startswith((server.address, f"blob:{server.address}")):
            problems.append(f"request to {url}")

    opened.on("request", lambda request: asked(request.url))
    opened.goto(server.address)
    yield opened
    context.close()
    assert problems == []


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Continue").click()


def test_a_clip_from_the_prompt_to_the_picture(endpoint: Endpoint, page: Page) -> None:
    sign_in(page, endpoint.keys["team-a"])
    expect(page.get_by_role("radio", name="ada")).to_be_checked()
    assert page.get_by_role("radio", name="bruno").count() == 0
    page.get_by_label("What happens").fill("a person <b>nods</b>")
    page.get_by_role("button", name="Make the clip").click()
    expect(page.locator("#state")).to_have_text("Waiting")
    expect(page.locator("#state-note")).to_have_text("next in the queue")
    expect(page.locator("#load")).to_have_text("1 waiting")
    job = endpoint.claim()
    assert (job.request.prompt, job.target.identity_id) == ("a person <b>nods</b>", "ada")
    endpoint.jobs.heartbeat("worker", {job.id: (job.fence, 42)})
    expect(page.locator("#state-note")).to_have_text("42 %")
    assert page.locator("#progress").evaluate("bar => bar.value") == 42
    endpoint.finish(job)
    player = page.locator("#player")
    expect(player).to_be_visible()
    page.wait_for_function("() => document.querySelector('#player').readyState >= 2")
    shown = player.evaluate("video => [video.videoWidth, video.videoHeight, video.duration, video.error]")
    assert shown == [48, 48, pytest.approx(1.625, abs=0.01), None]
    page.wait_for_function("() => document.querySelector('#player').currentTime > 0")
    expect(page.locator("#words")).to_have_text("a person <b>nods</b>")  # text, never markup
    picture = page.locator(".card img")
    expect(picture).to_be_visible()
    page.wait_for_function("() => document.querySelector('.card img').complete")
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [48, 48]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.path().read_bytes() == Path(endpoint.file(endpoint.jobs.get(job.id, None))).read_bytes()
    photograph(page, "done")


def test_a_wrong_key_is_told_and_a_right_one_lives_in_the_tab_only(endpoint: Endpoint, page: Page) -> None:
    sign_in(page, "mid_" + "x" * 40)
    expect(page.get_by_role("alert")).to_have_text("That key is not known here.")
    key = endpoint.keys["team-a"]
    sign_in(page, key)
    expect(page.get_by_label("What happens")).to_be_visible()
    assert page.evaluate("() => Object.values(sessionStorage)") == [key]
    assert page.evaluate("() => [document.cookie, localStorage.length]") == ["", 0]
    assert key not in page.content()
    page.reload()
    expect(page.get_by_label("What happens")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("() => sessionStorage.length") == 0
    assert page.locator(".card").count() == 0


def test_the_queue_is_seen_and_a_clip_can_be_stopped_and_deleted(endpoint: Endpoint, page: Page) -> None:
    sign_in(page, endpoint.keys["team-a"])
    for number in range(3):
        page.get_by_label("What happens").fill(f"take {number}")
        page.get_by_role("button", name="Make the clip").click()
        expect(page.locator("#words")).to_have_text(f"take {number}")
    expect(page.locator("#state-note")).to_have_text("2 before it")
    expect(page.locator(".card")).to_have_text([re.compile(f"take {number}") for number in (2, 1, 0)])
    expect(page.locator("#load")).to_have_text("3 waiting")
    photograph(page, "queue")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#state")).to_have_text("Failed")
    expect(page.locator("#state-note")).to_have_text("cancelled")
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".card")).to_have_count(2)
    assert [job.request.prompt for job in endpoint.jobs.list(None)[0]] == ["take 1", "take 0"]


def test_versions_strength_and_a_refusal(endpoint: Endpoint, page: Page) -> None:
    old, new = endpoint.ada, publish(endpoint.run, "ada", "team-a", value=2.0)
    adapters.set_alias(endpoint.run, "ada", "prod", old.version)
    sign_in(page, endpoint.keys["team-a"])
    expect(page.get_by_label("Version").locator("option").first).to_have_text(f"prod ({old.version})")
    page.get_by_label("Version").select_option(new.version)
    page.get_by_label("What happens").fill("a person nods")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Likeness").fill("0.5")
    page.get_by_label("Steps").fill("5000")
    page.get_by_role("button", name="Make the clip").click()
    expect(page.locator("#problem")).to_have_text("num_inference_steps is at most 100")
    page.get_by_label("Steps").fill("7")
    page.get_by_role("button", name="Make the clip").click()
    expect(page.locator("#words")).to_have_text("a person nods")
    job = endpoint.claim()
    assert (job.target.version, job.request.lora_scale, job.request.steps) == (new.version, 0.5, 7)


def test_a_lost_answer_does_not_make_a_second_clip(endpoint: Endpoint, page: Page) -> None:
    sign_in(page, endpoint.keys["team-a"])
    expect(page.get_by_label("What happens")).to_be_visible()
    sent = []

    def lose_the_first(route: object) -> None:
        if route.request.method != "POST":  # type: ignore[attr-defined]
            route.continue_()  # type: ignore[attr-defined]
            return
        sent.append(route.request.headers["idempotency-key"])  # type: ignore[attr-defined]
        answer = route.fetch()  # type: ignore[attr-defined]
        route.abort() if len(sent) == 1 else route.fulfill(response=answer)  # type: ignore[attr-defined]

    page.route(re.compile(".*/v1/videos$"), lose_the_first)
    page.get_by_label("What happens").fill("a person nods")
    page.get_by_role("button", name="Make the clip").click()
    expect(page.locator("#words")).to_have_text("a person nods")
    assert len(sent) == 2
    assert len(set(sent)) == 1
    assert len(endpoint.jobs.list(None)[0]) == 1


def test_the_page_is_locked_down(server: Server) -> None:
    with httpx.Client(base_url=server.address, trust_env=False) as client:
        for url in ("/", "/page/app.js", "/page/style.css", "/page/icon.svg"):
            policy = client.get(url).headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "*" not in policy
            assert "frame-ancestors 'none'" in policy
        html = client.get("/").text
        assert not re.search(r"https?://|\son\w+=|style=|<script(?![^>]*src=)", html)
        for name in ("..%2f__init__.py", "__init__.py", "../api.py"):
            assert client.get(f"/page/{name}").status_code == 404


def photograph(page: Page, name: str) -> None:
    """Pictures of the page in both colour schemes and on a telephone, where $PAGE_PICTURES names a folder."""
    folder = os.environ.get("PAGE_PICTURES")
    if not folder:
        return
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.screenshot(path=f"{folder}/{name}-{scheme}.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    page.screenshot(path=f"{folder}/{name}-narrow.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
