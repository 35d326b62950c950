"""Removing a person from a run: nothing that names them is left, everybody else is as before, and they stay away."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from typer.testing import CliRunner

from magicid import adapters, commands, erasure, ledger, recipe, repository, storage
from magicid.cli import app
from magicid.erasure_proof import scan
from magicid.errors import IdentityError, StorageError
from magicid.run import Run, caption_uri, clip_uri, identity_uri, training_uri
from magicid.schema import CURVE_CLIP, Identity, Prompt, Rejected, ScoredClip
from tests.object_store import s3_bucket
from tests.report.fake_run import fill

cli = CliRunner()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_bucket(tmp_path_factory.mktemp("s3") / "log") as url:
        yield url


def finished(location: str, names: tuple[str, ...] = ("ada", "ada-2", "bruno")) -> Run:
    """A run of several people with everything that names them."""
    run = fill(location, names, takes=1)
    settings = recipe.load("face-world")
    texts = [Prompt("p1", "a {class_word} walks", "training"), Prompt("p2", "a {class_word} nods", "heldout")]
    run.write("prompts.parquet", texts, Prompt)
    book = ledger.Ledger(run, 1)
    for name in names:
        book.update(name, owner="studio", state=ledger.RUNNING)
    book.close()
    rows = [{"identity_id": name, "owner": "studio"} for name in names]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_bytes(run.path("ledger/events-00000001-00000900.jsonl"), text.encode())
    for name in names:
        commands.send(run, commands.CANCEL, [name])
        weights = training_uri(name, "sft", adapters.WEIGHTS_NAME)
        sha256 = storage.write_arrays(run.path(weights), {name: np.zeros(len(name))})
        ref = repository.AdapterRef(weights, sha256)
        made = repository.trained_clips(settings, "b" * 64, texts[:1], run.identity(name), ref)[0]
        storage.write_bytes(run.path(clip_uri(made.clip_id, ".mp4")), b"of a killed worker: no row names it")
        storage.write_bytes(run.path(f"clips/xx/.{made.clip_id}.mp4.1f.partial"), b"half")
        storage.write_bytes(run.path(f"rewards/.{name}.parquet.1f.partial"), b"half")
        for row in run.read_parts(f"scored/{name}", ScoredClip):
            storage.write_arrays(run.path(clip_uri(row.clip_id, ".safetensors")), {"latents": np.zeros(1)})
            storage.write_json(run.path(f"attempts/x/ScoreMotion-{name}-{row.clip_id}.json"), {"attempts": 1})
        storage.write_json(run.path(f"attempts/x/identity-{name}.json"), {"attempts": 1})
    reasons = [Rejected("identity", name, f"{name} has 1 usable photos", "more") for name in names]
    run.write("rejected.parquet", [*reasons, Rejected("identity", "eve", "no photos", "more")], Rejected)
    storage.write_bytes(run.path("report.html"), b"<p>ada and bruno")
    return run


def contents(run: Run) -> dict[str, bytes]:
    """All files of a run, by their names in it."""
    names = storage.list_relative(run.location)
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(names, pool.map(lambda name: storage.read_bytes(run.path(name)), names)))


@pytest.mark.parametrize("where", ["local", "s3"])
def test_nothing_of_a_person_is_left_and_all_of_the_others(where: str, bucket: str, tmp_path: Path) -> None:
    others = ["ada-2", "bruno"] if where == "local" else ["bruno"]
    run = finished(str(tmp_path / "run"), ("ada", *others))
    if where == "s3":
        shutil.rmtree(Path(run.location, "attempts"))  # many small files, and a server in Python
        fsspec.filesystem("s3").put(run.location, bucket.removeprefix("s3://"), recursive=True)
        run = Run(f"{bucket}/run")
    before = contents(run)
    marks = erasure.traces_of(run, "ada")
    assert len(scan(run.location, "ada", marks).found) > 50

    gone = erasure.delete(run.location, "ada")
    assert {"identities/ada", "training/ada", "scored/ada", "pairs/ada.parquet", "report.html"} <= set(gone)
    assert "ledger/events-00000001-00000900.jsonl: 1 rows" in gone
    proof = scan(run.location, "ada", marks)
    assert proof.found == []
    assert {"tables", "JSON", "safetensors headers", "names alone"} <= set(proof.scanned)

    after = contents(run)
    for data in after.values():  # by no parser of ours
        assert b"ada/" not in data
        assert b'"ada"' not in data
        assert not any(mark.encode() in data for mark in marks)
    changed = {name for name in before if before[name] != after.get(name, before[name])}
    assert changed == {"rejected.parquet", *(n for n in before if n.startswith("ledger/") and n in after)}
    of_others = {n for n in before if "bruno" in n or ("ada-2" in n and not n.startswith("attempts"))}
    assert len(of_others) > 15
    assert of_others <= after.keys()
    assert sorted(ledger.read(run)) == others
    assert [row.name for row in run.read("rejected.parquet", Rejected)] == [*others, "eve"]
    shared = {clip_uri(row.clip_id, "") for row in run.read_parts("scored/_shared", ScoredClip)}
    assert {n.split(".")[0] for n in before if n.startswith("clips")} & shared <= {n.split(".")[0] for n in after}
    with pytest.raises(StorageError):
        run.identity("ada")
    assert erasure.delete(run.location, "ada") == []


def test_a_tombstone_says_who_must_not_come_back_and_nothing_else(tmp_path: Path) -> None:
    assert erasure.erased(str(tmp_path)) == set()
    erasure.delete(str(tmp_path), "Ada")
    expected = hashlib.sha256(b"ada").hexdigest()
    assert erasure.erased(str(tmp_path)) == {expected}
    assert erasure.tombstone("ADA") == expected
    (file,) = (tmp_path / "erased").iterdir()
    assert json.loads(file.read_text()).keys() == {"erased"}
    with pytest.raises(IdentityError, match="not an identity's id"):
        erasure.delete(str(tmp_path), "../ada")


def test_an_interrupted_erasure_is_finished_by_doing_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(str(tmp_path))
    marks = erasure.traces_of(run, "ada")
    remove, calls = storage.remove, []

    def fail(location: str) -> None:
        calls.append(location)
        if len(calls) % 20 == 0:
            raise StorageError("cannot remove", "again")
        remove(location)

    monkeypatch.setattr(storage, "remove", fail)
    failures = 0
    while True:
        try:
            erasure.delete(run.location, "ada")
            break
        except StorageError:
            failures += 1
    assert 1 <= failures < 20
    assert scan(run.location, "ada", marks).found == []


def test_clips_of_adapters_that_were_kept_on_the_way_go_too(tmp_path: Path) -> None:
    run, made = finished(str(tmp_path), ("ada", "bruno")), {}
    for name in ("ada", "bruno"):  # made, by a worker that was killed before it wrote their rows
        uri = training_uri(name, "hpo", "steps/step-000020.safetensors")
        ref = repository.AdapterRef(uri, storage.write_arrays(run.path(uri), {name: np.ones(1)}))
        prompts = [prompt for prompt in run.read("prompts.parquet", Prompt) if prompt.split == "heldout"]
        person = run.identity(name)
        (clip, *_) = repository.evaluation_clips(
            run.recipe(), "b" * 64, prompts, person.class_word, "hpo", person, ref, 70, CURVE_CLIP
        )
        made[name] = clip_uri(clip.clip_id, ".mp4")
        storage.write_bytes(run.path(made[name]), b"a clip")
    erasure.delete(run.location, "ada")
    assert [run.has(made[name]) for name in ("ada", "bruno")] == [False, True]


def test_moving_photos_that_no_row_has_yet_go_too(tmp_path: Path) -> None:
    run, made = finished(str(tmp_path), ("ada", "bruno")), {}
    for name in ("ada", "bruno"):  # made under an override of their own, by a worker that was killed
        person = replace(run.identity(name), overrides={"sft.moving": "3"})
        run.write(identity_uri(name), [person], Identity)
        *_, clip = repository.moving_clips(run.recipe().for_identity(person.overrides), "b" * 64, person)
        made[name] = clip_uri(clip.clip_id, ".mp4")
        storage.write_bytes(run.path(made[name]), b"a clip")
    erasure.delete(run.location, "ada")
    assert [run.has(made[name]) for name in ("ada", "bruno")] == [False, True]


def test_captions_of_a_persons_photos_go_too(tmp_path: Path) -> None:
    run, made = finished(str(tmp_path), ("ada", "bruno")), {}
    for name in ("ada", "bruno"):  # both in the snow, under an override; no row names the clips yet
        captions = ["a {class_word} in the snow"] * 9
        person = replace(run.identity(name), captions=captions, overrides={"sft.prompt": '"a {class_word}, seen"'})
        run.write(identity_uri(name), [person], Identity)
        photos = repository.static_clips(run.recipe().for_identity(person.overrides), "b" * 64, person)
        made[name] = [caption_uri(clip.clip_id) for clip in photos]
        for uri in made[name]:
            storage.write_arrays(run.path(uri), {"prompt_embeds": np.ones(1)})
    erasure.delete(run.location, "ada")
    assert not any(run.has(uri) for uri in made["ada"])
    assert all(run.has(uri) for uri in made["bruno"])
    again = made["bruno"][0]
    storage.write_json(run.path("erased", f"{erasure.tombstone('bruno')}.json"), {"erased": "now"})
    erasure.sweep(run.location, "bruno")  # what a worker had in hand when it heard of it
    assert not run.has(again)


def test_an_id_that_is_a_word_of_the_layout_takes_nobody_else_along(tmp_path: Path) -> None:
    run = finished(str(tmp_path), ("hpo", "manifest", "bruno"))
    theirs = {n for n in storage.list_relative(run.location) if "/bruno" in n}
    for name in ("hpo", "manifest"):
        marks = erasure.traces_of(run, name)
        erasure.delete(run.location, name)
        assert scan(run.location, name, marks).found == []
    assert theirs <= set(storage.list_relative(run.location))
    assert run.has("run.json")
    assert run.has("recipe.toml")
    assert adapters.list_identities(run.location) == ["bruno"]


def test_the_proof_finds_what_an_erasure_missed(tmp_path: Path) -> None:
    run = finished(str(tmp_path), ("ada",))
    marks = erasure.traces_of(run, "ada")
    erasure.delete(run.location, "ada")
    mark = sorted(marks)[0]
    storage.write_json(run.path("new/status.json"), {"people": [{"identity_id": "ada"}]})
    storage.write_json(run.path("other.json"), {"clip": mark})
    storage.write_bytes(run.path("notes.html"), b"<p>This is ada.")
    storage.write_arrays(run.path("text/x.safetensors"), {"v": np.zeros(1)}, {"of": mark})
    storage.write_bytes(run.path("broken.parquet"), b"PAR1")
    storage.write_bytes(run.path("new/ada.bin"), b"")
    found = dict(scan(run.location, "ada", marks).found)
    assert found.pop("broken.parquet").startswith("it cannot be read")
    assert found == {
        "new/status.json": "its content", "other.json": "its content", "notes.html": "its content",
        "text/x.safetensors": "its content", "new/ada.bin": "its name",
    }  # fmt: skip


def test_runs_are_found_below_a_folder(tmp_path: Path, bucket: str) -> None:
    for top in (str(tmp_path), f"{bucket}/team", "memory://team"):
        for name in ("a/run-1", "a/deep/run-2"):
            storage.write_bytes(f"{top}/{name}/run.json", b"{}")
            storage.write_bytes(f"{top}/{name}/clips/run.json", b"{}")  # inside a run nothing is a run
        found = [name.removeprefix(f"{top}/") for name in erasure.find_runs(f"{top}/")]
        assert found == ["a/deep/run-2", "a/run-1"]
        assert erasure.find_runs(f"{top}/a/run-1") == [f"{top}/a/run-1"]
        with pytest.raises(StorageError, match="is no run directory and holds none"):
            erasure.find_runs(f"{top}/nothing")
    fsspec.filesystem("memory").rm("/team", recursive=True)


def test_the_command_asks_removes_and_proves(tmp_path: Path) -> None:
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    finished(one, ("ada", "bruno"))
    shutil.copytree(one, two)
    arguments = ["identities", "delete", "ada", "--run", str(tmp_path), "--proof", str(tmp_path / "proof.json")]
    asked = cli.invoke(app, arguments, input="n\n")
    assert asked.exit_code == 1
    assert "ada" in adapters.list_identities(str(tmp_path / "one"))
    done = cli.invoke(app, [*arguments, "--yes"])
    assert done.exit_code == 0, done.output
    assert "removed identities/ada" in done.output
    assert "none names ada" in done.output
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert [run["run"] for run in proof["runs"]] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert all(run["named_in"] == [] and run["removed"] and run["scanned"]["tables"] for run in proof["runs"])
    again = cli.invoke(app, [*arguments, "--yes"])
    assert again.exit_code == 0
    assert "nothing of ada was there" in again.output


def test_the_command_fails_when_something_is_left(tmp_path: Path) -> None:
    run = finished(str(tmp_path / "one"), ("ada",))
    storage.write_bytes(run.path("notes.html"), b"<p>This is ada.")
    result = cli.invoke(app, ["identities", "delete", "ada", "--run", run.location, "--yes"])
    assert result.exit_code == 1
    assert "notes.html still names ada: its content" in result.output
