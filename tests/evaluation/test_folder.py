"""Clips from elsewhere through the command line: real files, the shipped networks, resumed and merged."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from magicid.cli import app
from magicid.clips import encode_mp4
from magicid.errors import StorageError
from magicid.evaluation import folder, results
from magicid.evaluation.metrics.video import frechet_distance
from magicid.world.language import caption
from magicid.world.people import sample_people
from magicid.world.renderer import render_clips, render_photos

PEOPLE = ("ann", "bob")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two people with photos, and a clip of each by paths."""
    root = tmp_path_factory.mktemp("foreign")
    people = sample_people(2, seed=970_001)
    clips = render_clips(people, [0, 3], [0, 1], [970_300, 970_301])
    for number, name in enumerate(PEOPLE):
        (root / "people" / name).mkdir(parents=True)
        for i, photo in enumerate(render_photos(people[number], 3, 970_400 + number)):
            Image.fromarray(photo).save(root / "people" / name / f"{i}.png")
        (root / "clips" / name).mkdir(parents=True)
        prompt = caption(int(clips.actions[number]), int(clips.places[number]))
        (root / "clips" / name / f"{prompt} #{number + 5}.mp4").write_bytes(encode_mp4(clips.frames[number], 8))
    return root


def evaluate(place, *more: str):
    arguments = ["evaluate", "--clips", str(place / "clips"), "--identities", str(place / "people"), *more]
    return CliRunner().invoke(app, arguments)


def test_a_folder_is_measured_once_and_merged(place) -> None:
    out = str(place / "rows")
    first = evaluate(place, "--name", "ID-Animator", "--out", out)
    assert first.exit_code == 0, first.output
    assert "2 clips to measure, 2 people" in first.output
    rows = {row.identity_id: row for row in results.read([out])}
    assert {row.method for row in rows.values()} == {"ID-Animator"}
    assert (rows["bob"].seed, rows["bob"].prompt, rows["bob"].fps) == (6, caption(3, 1), 8)
    assert min(row.face_sim for row in rows.values()) > 0.5
    assert [row.action for row in rows.values()] == [1, 1]
    assert rows["bob"].error is None
    again = evaluate(place, "--name", "ID-Animator", "--out", out)
    assert "0 clips to measure" in again.output
    told = CliRunner().invoke(app, ["results", out, "--out", str(place / "merged")])
    assert told.exit_code == 0, told.output
    assert "2 clips of 1 methods" in told.output
    assert "| ID-Animator |" in (place / "merged" / "results.md").read_text()


def test_an_index_names_people_and_a_stranger_is_a_null(place) -> None:
    clips = place / "indexed"
    clips.mkdir()
    file = next((place / "clips" / "ann").iterdir())
    (clips / "a.mp4").write_bytes(file.read_bytes())
    (clips / "b.mp4").write_bytes(b"no video")
    lines = [
        {"file": "a.mp4", "identity": "bob", "prompt": "a person nods in the kitchen", "seed": 3},
        {"file": "a.mp4", "identity": "zoe", "prompt": "x"},
        {"file": "b.mp4", "identity": "ann", "prompt": "x"},
    ]
    (clips / "clips.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = str(place / "indexed_rows")
    arguments = ["evaluate", "--clips", str(clips), "--identities", str(place / "people"), "--name", "x", "--out", out]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    of_bob, stranger, broken = sorted(results.read([out]), key=lambda row: (row.identity_id == "ann", row.identity_id))
    assert of_bob.face_sim < 0.4  # it is ann
    assert "nobody is called 'zoe'" in str(stranger.error)
    assert "b.mp4" in str(broken.error)
    assert (broken.face_sim, broken.frames) == (None, 0)


def test_folders_that_are_none_are_told(tmp_path) -> None:
    with pytest.raises(StorageError, match="holds no clips"):
        folder.list_clips(str(tmp_path))
    (tmp_path / "loose.mp4").write_bytes(b"")
    with pytest.raises(StorageError, match="is not <identity>/<prompt>"):
        folder.list_clips(str(tmp_path))
    (tmp_path / "clips.jsonl").write_text('{"file": "a.mp4"}')
    with pytest.raises(StorageError, match="line 1: KeyError"):
        folder.list_clips(str(tmp_path))


def test_people_without_a_face_are_left_out(tmp_path) -> None:
    class Faces:
        def embed(self, frames):
            return np.full((1, 2), np.nan if frames.max() == 0 else 1.0, np.float32)

    class Metrics:
        faces = Faces()

    rows = [folder_row("dark", "0"), folder_row("light", "1")]
    found = folder.read_people(rows, Metrics(), lambda text: np.full((4, 4, 3), int(text), np.uint8))  # type: ignore[arg-type]
    assert list(found) == ["light"]
    with pytest.raises(StorageError, match="nobody in the manifest"):
        folder.read_people(rows[:1], Metrics(), lambda text: np.zeros((4, 4, 3), np.uint8))  # type: ignore[arg-type]


def folder_row(name: str, photo: str):
    from magicid.manifests import ManifestRow

    return ManifestRow(name, [photo])


def test_a_reference_folder_needs_no_people_and_gives_the_frechet_distance(place, tmp_path) -> None:
    people = sample_people(6, seed=970_002)
    clips = render_clips(people, [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7], range(6)).frames
    (tmp_path / "real").mkdir()
    for number, frames in enumerate(clips):
        (tmp_path / "real" / f"{number}.mp4").write_bytes(encode_mp4(frames, 8))
    reference = str(tmp_path / "reference")
    arguments = ["evaluate", "--clips", str(tmp_path / "real"), "--name", "reference", "--out", reference]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "6 clips to measure, no people" in told.output
    rows = results.read([reference])
    assert [(row.face_sim, row.error) for row in rows] == [(None, None)] * 6
    out = str(tmp_path / "rows")
    assert evaluate(place, "--name", "ID-Animator", "--out", out).exit_code == 0
    merged = tmp_path / "merged"
    told = CliRunner().invoke(app, ["results", out, "--reference", reference, "--out", str(merged)])
    assert told.exit_code == 0, told.output
    (method,) = json.loads((merged / "results.json").read_text())["methods"]
    with pytest.warns(UserWarning, match="biased"):
        wanted = frechet_distance(
            *(np.array([r.video_features for r in results.read([side])]) for side in (out, reference))
        )
    assert method["fvd"] == pytest.approx(wanted)
    assert wanted > 0
    assert "| fvd to 6 clips |" in (merged / "results.md").read_text()
