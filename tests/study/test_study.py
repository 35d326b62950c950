"""A study from a run to its preference rates: nothing tells the methods apart, and the page works in a browser."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from typer.testing import CliRunner

from magicid import storage
from magicid.cli import app
from magicid.errors import StorageError
from magicid.run import Run
from magicid.study import build as study
from magicid.study import score as scoring
from magicid.study.score import Answer, bradley_terry
from tests.report.fake_run import fill
from tests.serve.test_page import ARGUMENTS, BROWSERS

expect.set_options(timeout=30_000)  # milliseconds: a machine may have no time for a browser

METHODS = ["base", "sft", "hpo"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return fill(str(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def place(run: Run, tmp_path_factory) -> Path:
    """A study of three sets, made by the command."""
    out = tmp_path_factory.mktemp("study") / "study"
    told = CliRunner().invoke(app, ["study", "build", run.location, "--out", str(out), "--sets", "3"])
    assert told.exit_code == 0, told.output
    assert "3 sets of 3 clips" in told.output
    return out


def page_data(place: Path) -> dict:
    return json.loads((place / "page" / "data.js").read_text().removeprefix("const STUDY = ").rstrip().rstrip(";"))


# ---- building -------------------------------------------------------------------------------------------------------


def test_the_key_tells_what_the_page_hides(run: Run, place: Path) -> None:
    key, data = storage.read_json(str(place / "key.json")), page_data(place)
    clips = [clip for one in data["sets"] for clip in one["clips"]]
    assert len(clips) == len(set(clips)) == 9
    assert sorted(key["clips"]) == sorted(clips)
    assert all(sorted(key["clips"][clip] for clip in one["clips"]) == sorted(METHODS) for one in data["sets"])
    shown = {one["set"]: one for one in data["sets"]}
    found = {(c.identity_id, c.prompt): c for c in study.comparisons(run.location, METHODS)}
    for name, asked in key["sets"].items():
        files = {key["clips"][clip]: (place / "page" / clip).read_bytes() for clip in shown[name]["clips"]}
        wanted = found[asked["identity"], asked["prompt"]].clips
        assert files == {method: storage.read_bytes(location) for method, location in wanted.items()}
    page = "".join(file.read_text() for file in (place / "page").iterdir() if file.is_file())
    for word in ("sft", "hpo", '"base"', *{f'"{asked["identity"]}"' for asked in key["sets"].values()}):
        assert word not in page
    photo = place / "page" / data["sets"][0]["photos"][0]
    with Image.open(io.BytesIO(photo.read_bytes())) as image:
        assert max(image.size) <= 320
        assert not image.getexif()


def test_people_are_shown_alike_often_and_the_choice_is_seeded(run: Run) -> None:
    found = study.comparisons(run.location, METHODS)
    chosen = study.choose(found, 4, 0)
    assert sorted(c.identity_id for c in chosen) == ["ada", "ada", "bruno", "bruno"]
    assert study.choose(found, 4, 0) == chosen
    assert study.choose(found, 4, 1) != chosen
    assert len(study.choose(found, 1000, 0)) == len(found)


def test_a_study_that_cannot_be_made_is_told(run: Run, place: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="at least two methods"):
        study.build(run.location, ["hpo"], str(tmp_path))
    with pytest.raises(StorageError, match="holds a study already"):
        study.build(run.location, METHODS, str(place))
    with pytest.raises(StorageError, match="has a clip of each of base, ConsisID"):
        study.build(run.location, ["base", "ConsisID"], str(tmp_path))


# ---- scoring --------------------------------------------------------------------------------------------------------


def test_bradley_terry_finds_the_strengths() -> None:
    strength = np.array([0.6, 0.3, 0.1])
    wins = 10_000 * strength[:, None] / (strength[:, None] + strength[None, :])
    np.fill_diagonal(wins, 0)
    assert bradley_terry(wins) == pytest.approx(strength, abs=1e-3)
    assert bradley_terry(np.zeros((2, 2))) == pytest.approx([0.5, 0.5])
    assert bradley_terry(np.array([[0, 9], [0, 0]])) == pytest.approx([9.5 / 10, 0.5 / 10])  # half a win on each side


def test_rates_and_intervals_by_hand() -> None:
    shown = ("a", "b")
    answers = [Answer(f"p{i}", "overall", "a" if i < 6 else "b", shown) for i in range(8)]
    first, second = scoring.score(answers)
    assert (first.method, first.rate, first.answers, first.people) == ("a", 0.75, 8, 8)
    assert first.strength == pytest.approx(6.5 / 9)
    assert first.rate_interval[0] <= 0.5 < 0.75 < first.rate_interval[1]  # eight people are few
    assert second.rate == 0.25
    one = [Answer("p", "overall", "a" if i < 6 else "b", shown) for i in range(8)]
    many = [Answer(f"p{i}", "overall", "a" if i % 4 else "b", shown) for i in range(400)]
    assert scoring.score(one)[0].people == 1
    low, high = scoring.score(many)[0].rate_interval
    assert (low, high) == (pytest.approx(0.75 - 0.042, abs=0.01), pytest.approx(0.75 + 0.042, abs=0.01))


def answers_file(place: Path, name: str, prefer: str, **changes) -> Path:
    key, data = storage.read_json(str(place / "key.json")), page_data(place)
    rows = []
    for one in data["sets"]:
        choice = next(clip for clip in one["clips"] if key["clips"][clip] == prefer)
        rows += [{"set": one["set"], "question": q, "choice": choice, "shown": one["clips"]} for q in data["questions"]]
    file = place.parent / f"{name}.json"
    file.write_text(json.dumps({"study": data["study"], "participant": name, "answers": rows, **changes}))
    return file


def test_answers_come_back_through_the_command(place: Path, tmp_path: Path) -> None:
    files = [answers_file(place, "p1", "hpo"), answers_file(place, "p2", "hpo"), answers_file(place, "p3", "base")]
    arguments = [*map(str, files), "--key", str(place / "key.json"), "--out", str(tmp_path / "scores.json")]
    told = CliRunner().invoke(app, ["study", "score", *arguments])
    assert told.exit_code == 0, told.output
    scores = {(row["question"], row["method"]): row for row in json.loads((tmp_path / "scores.json").read_text())}
    assert len(scores) == 12
    assert scores["identity", "hpo"]["rate"] == pytest.approx(2 / 3)
    assert scores["identity", "sft"]["rate"] == 0
    assert scores["overall", "hpo"]["strength"] > scores["overall", "base"]["strength"]
    assert "| overall | hpo | 0.67 [" in told.output


def test_answers_of_another_study_or_damaged_are_told(place: Path) -> None:
    key = str(place / "key.json")
    with pytest.raises(StorageError, match="answers another study"):
        scoring.read(key, [str(answers_file(place, "q1", "hpo", study="other"))])
    broken = place.parent / "q2.json"
    broken.write_text("[]")
    with pytest.raises(StorageError, match="is no answers file"):
        scoring.read(key, [str(broken)])
    again = [str(answers_file(place, "q3", "hpo")), str(answers_file(place, "q3", "base"))]
    assert {answer.chosen for answer in scoring.read(key, again)} == {"base"}  # the last file of a person counts


# ---- the page in a browser ------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def address(place: Path) -> Iterator[str]:
    """Any web server: the standard library's."""
    handler = functools.partial(Quiet, directory=str(place / "page"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


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
def page(browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
    opened.on("request", lambda r: None if r.url.startswith((address, "blob:")) else problems.append(r.url))
    opened.goto(address)
    yield opened
    context.close()
    assert problems == []


def choose(page: Page, letter: str) -> None:
    for box in page.get_by_role("radio", name=f"Clip {letter}").all():
        box.check()


def test_a_person_answers_and_the_file_scores(place: Path, page: Page, tmp_path: Path) -> None:
    page.get_by_role("button", name="Begin").click()
    expect(page.locator("#where")).to_have_text("Set 1 of 3")
    expect(page.locator("video")).to_have_count(3)
    page.wait_for_function("[...document.querySelectorAll('#photos img')].every(i => i.complete && i.naturalWidth > 0)")
    folder = os.environ.get("PAGE_PICTURES")
    if folder:
        page.wait_for_timeout(1500)
        page.screenshot(path=f"{folder}/study.png", full_page=True)
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#problem")).to_have_text("Please answer all four questions.")
    assert page.locator(".question.missing").count() == 4
    choose(page, "B")
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#where")).to_have_text("Set 2 of 3")
    page.get_by_role("button", name="Back").click()
    assert page.get_by_role("radio", name="Clip B").first.is_checked()
    page.reload()  # what was answered is still there
    expect(page.locator("#where")).to_have_text("Set 1 of 3")
    assert page.get_by_role("radio", name="Clip B").first.is_checked()
    page.get_by_role("button", name="Next").click()
    choose(page, "A")
    page.get_by_role("button", name="Next").click()
    choose(page, "C")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Finish").click()
    file = tmp_path / saved.value.suggested_filename
    saved.value.save_as(file)
    expect(page.locator("#end")).to_contain_text(file.name)
    answers = scoring.read(str(place / "key.json"), [str(file)])
    assert len(answers) == 12
    assert all(sorted(answer.shown) == sorted(METHODS) for answer in answers)
    content = json.loads(file.read_text())
    assert [row["choice"] == row["shown"][1] for row in content["answers"][:4]] == [True] * 4
    assert sum(row.rate for row in scoring.score(answers)) == pytest.approx(4)


def test_everybody_has_an_order_of_their_own(browser: Browser, address: str) -> None:
    orders = set()
    for _ in range(6):
        context = browser.new_context()
        opened = context.new_page()
        opened.goto(address)
        orders.add(opened.evaluate("JSON.stringify([state.order, state.clips])"))
        context.close()
    assert len(orders) > 1
