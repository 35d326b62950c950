"""Manifests of every form and fault, and identities checked by a face reader whose answers the photos spell out."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from magicid import identities
from magicid import recipe as recipes
from magicid.errors import IdentityError, ManifestError, StorageError
from magicid.identities import ManifestRow, check_identity, read_manifest
from magicid.photos import decode_photo
from magicid.schema import Identity, arrow_schema, to_rows
from magicid.storage import file_size
from magicid.weights import resolve

RECIPE = recipes.load("face-world", {"identities.min_face_px": 20, "identities.min_photos": 3})
EXAMPLES = Path(__file__).parent.parent / "examples" / "identities"


# ---- manifests ---------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, form: str, records: list[dict[str, Any]]) -> str:
    path = folder / f"manifest.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        columns = list(dict.fromkeys(key for record in records for key in record))
        lines = [",".join(columns)]
        for record in records:
            cells = [record.get(column, "") for column in columns]
            cells = [";".join(cell) if isinstance(cell, list) else str(cell) for cell in cells]
            lines.append(",".join(f'"{cell}"' for cell in cells))
        path.write_text("\n".join(lines) + "\n")
    return str(path)


RECORDS: list[dict[str, Any]] = [
    {"id": "ada", "photos": ["ada/1.png", "ada/2.png"], "owner": "x", "class_word": "woman", "consent": "c1",
     "priority": 5, "recipe.hpo.beta": 500, "captions": ["a {class_word} in the snow", ""]},
    {"id": "Bob-2", "photos": ["/abs/1.png", "s3://bucket/2.png"]},
]  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, by_folder: bool) -> None:
    location = write_manifest(tmp_path, form, RECORDS)
    rows, rejected = read_manifest(str(tmp_path) if by_folder else location)
    assert rejected == []
    assert rows == [
        ManifestRow(
            "ada",
            [f"{tmp_path}/ada/1.png", f"{tmp_path}/ada/2.png"],
            "x",
            "woman",
            "c1",
            5,
            {"hpo.beta": "500"},
            captions=["a {class_word} in the snow", ""],
        ),
        ManifestRow("Bob-2", ["/abs/1.png", "s3://bucket/2.png"]),
    ]
    assert RECIPE.for_identity(rows[0].overrides).hpo.beta == 500


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_overrides_may_be_a_mapping(tmp_path: Path, form: str) -> None:
    given = {"hpo.beta": 10.5, "selection.same_prompt": False, "sft.prompt": "a {class_word}, smiling"}
    location = write_manifest(tmp_path, form, [{"id": "ada", "photos": ["1.png"], "overrides": given}])
    (row,), _ = read_manifest(location)
    settings = RECIPE.for_identity(row.overrides)
    assert settings.hpo.beta == 10.5
    assert settings.selection.same_prompt is False
    assert settings.sft.prompt == "a {class_word}, smiling"


def test_a_folder_of_folders_needs_no_manifest(tmp_path: Path) -> None:
    for name in ("bob/2.JPG", "ada/1.png", "bob/1.png", "bob/notes.txt", "ada/.hidden.png", "loose.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    rows, rejected = read_manifest(f"{tmp_path}/")
    assert rejected == []
    assert rows == [
        ManifestRow("ada", [f"{tmp_path}/ada/1.png"]),
        ManifestRow("bob", [f"{tmp_path}/bob/1.png", f"{tmp_path}/bob/2.JPG"]),
    ]


def test_manifests_lie_on_any_fsspec_url() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/people/manifest.jsonl", json.dumps({"id": "ada", "photos": ["ada/1.png"]}).encode())
    fs.pipe_file("/folders/bob/1.png", b"x")
    try:
        (ada,), _ = read_manifest("memory://people/manifest.jsonl")
        assert ada.photos == ["memory://people/ada/1.png"]
        (same,), _ = read_manifest("memory://people")
        assert same.photos == ["memory:///people/ada/1.png"]
        (bob,), _ = read_manifest("memory://folders")
        assert (bob.id, bob.photos) == ("bob", ["memory:///folders/bob/1.png"])
        assert fsspec.open(bob.photos[0]).open().read() == b"x"
    finally:
        fs.rm("/people", recursive=True)
        fs.rm("/folders", recursive=True)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_bad_rows_are_set_aside_and_the_others_go_on(tmp_path: Path, form: str) -> None:
    ids = ["ada", "a/b", "..", "../ada", "a.b", "a b", "x" * 64, "-a", "ADA", "ada", "ok_1"]
    location = write_manifest(tmp_path, form, [{"id": name, "photos": ["1.png"]} for name in ids])
    rows, rejected = read_manifest(location)
    assert [row.id for row in rows] == ["ada", "ok_1"]
    assert [item.name for item in rejected] == ids[1:-1]
    for number, item in enumerate(rejected, start=2):
        assert item.kind == "identity"
        assert item.problem.startswith(f"manifest.{form} row {number}: id ")
        assert item.action
    assert "is there twice" in rejected[-1].problem
    assert "is there twice" in rejected[-2].problem  # file systems may not tell ADA from ada


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"id": None}, "id None"),
        ({"id": 7}, "id 7"),
        ({"photos": []}, "photos"),
        ({"photos": [1]}, "photos"),
        ({"class_word": "man}{"}, "class_word"),
        ({"captions": ["one", "two"]}, "2 captions of 1 photos"),
        ({"captions": [3]}, "captions [3]"),
        ({"captions": {"1.png": "one"}}, "captions {"),
        ({"captions": ["a" * 1001]}, "more than 1000 characters"),
        ({"captions": ["\ud800"]}, "not Unicode"),
        ({"priority": "high"}, "priority 'high'"),
        ({"priority": 1.5}, "priority 1.5"),
        ({"priority": math.inf}, "priority inf"),
        ({"priority": math.nan}, "priority nan"),
        ({"priority": 2**63}, "too many digits"),
        ({"priority": 1e300}, "too many digits"),
        ({"id": "ſara"}, "id 'ſara'"),
        ({"owner": "\ud800"}, "not Unicode"),
        ({"photos": ["\ud800.png"]}, "not Unicode"),
        ({"overrides": {"sft.prompt": "\ud800"}}, "not Unicode"),
        ({"overrides": "[" * 100_000}, "overrides"),
        ({"owner": 3}, "owner 3"),
        ({"overrides": [1]}, "overrides"),
        ({"overrides": "{"}, "overrides"),
    ],
)
def test_a_bad_value_is_named_with_its_row(tmp_path: Path, record: dict[str, Any], problem: str) -> None:
    good = {"id": "good", "photos": ["1.png"]}
    rows, (rejected,) = read_manifest(
        write_manifest(tmp_path, "jsonl", [{"id": "ada", "photos": ["1"], **record}, good])
    )
    assert [row.id for row in rows] == ["good"]
    assert problem in rejected.problem
    assert "row 1" in rejected.problem


def test_the_largest_priorities_fit_a_table(tmp_path: Path) -> None:
    wanted = [2**63 - 1, -(2**63), 5, 0]
    records = [{"id": f"p{n}", "photos": ["1"], "priority": value} for n, value in enumerate(wanted)]
    rows, rejected = read_manifest(write_manifest(tmp_path, "jsonl", records))
    assert rejected == []
    assert [row.priority for row in rows] == wanted
    people = [Identity(row.id, row.owner, row.photos, priority=row.priority) for row in rows]
    table = pa.Table.from_pylist(to_rows(people), schema=arrow_schema(Identity))
    assert table["priority"].to_pylist() == wanted


def test_a_value_of_parquet_that_json_cannot_hold_sets_aside_its_row(tmp_path: Path) -> None:
    records = [
        {"id": "ada", "photos": ["1"], "recipe.sft.prompt": b"\xff"},
        {"id": "bob", "photos": ["1"], "recipe.sft.prompt": None},
    ]
    (row,), (rejected,) = read_manifest(write_manifest(tmp_path, "parquet", records))
    assert row.id == "bob"
    assert "the override 'sft.prompt' cannot be used" in rejected.problem


def test_errors_show_no_secret_of_a_signed_location(tmp_path: Path) -> None:
    signed = "nosuch://key:pass@h.example/{}?X-Amz-Signature=5ec2e7/2"
    problems = []
    for name in ("people", "manifest.csv"):
        with pytest.raises(ManifestError, match=rf"nosuch://h\.example/{name}: ") as caught:
            read_manifest(signed.format(name))
        problems.append(str(caught.value))
    _, (rejected,) = read_manifest(
        write_manifest(tmp_path, "jsonl", [{"id": "ada", "photos": [signed.format("1.png"), 3]}])
    )
    row = ManifestRow("ada", [signed.format("1.png")])
    with pytest.raises(IdentityError, match=r"nosuch://h\.example/1\.png") as refused:
        check_identity(row, RECIPE, PictureReader(), None, str(tmp_path))
    for text in (*problems, rejected.problem, str(refused.value)):
        assert "5ec2e7" not in text
        assert "pass" not in text


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_wrong_column_names_the_nearest(tmp_path: Path, form: str) -> None:
    location = write_manifest(tmp_path, form, [{"id": "ada", "photos": ["1.png"], "class_wrod": "man"}])
    with pytest.raises(ManifestError, match="unknown column 'class_wrod'") as caught:
        read_manifest(location)
    assert "did you mean 'class_word'?" in caught.value.action
    location = write_manifest(tmp_path, form, [{"id": "ada", "owner": "x"}])
    with pytest.raises(ManifestError, match="no column 'photos'"):
        read_manifest(location)


def test_unreadable_manifests_are_errors_that_name_them(tmp_path: Path) -> None:
    whole = Path(write_manifest(tmp_path, "parquet", RECORDS))
    cases = {
        "cut.parquet": (whole.read_bytes()[:-20], "not a whole Parquet file"),
        "cut.jsonl": (b'{"id": "ada", "photos": ["1.png"]}\n{"id": "bob", "pho', "line 2 is not JSON"),
        "list.jsonl": (b"[1]\n", "line 1 is not a JSON object"),
        "latin.csv": ("id,photos\nZoë,1.png".encode("latin-1"), "is not UTF-8"),
        "cells.csv": (b"id,photos\nada,1.png,2.png\n", "line 2 has another number of cells"),
        "quotes.csv": (b'id,photos\nada,"1.png\n', "is not CSV"),
        "empty.jsonl": (b"", "names no identity"),
        "header.csv": (b"id,photos\n", "names no identity"),
    }
    whole.unlink()
    for name, (data, problem) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ManifestError, match=problem) as caught:
            read_manifest(str(tmp_path / name))
        assert name in caught.value.problem
    with pytest.raises(ManifestError, match=r"absent\.jsonl"):
        read_manifest(str(tmp_path / "absent.jsonl"))
    for location in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ManifestError, match="neither a manifest"):
            read_manifest(str(location))
    write_manifest(tmp_path, "jsonl", RECORDS)
    write_manifest(tmp_path, "csv", RECORDS)
    with pytest.raises(ManifestError, match=r"manifest\.csv, manifest\.jsonl"):
        read_manifest(str(tmp_path))


# ---- identities --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    box: np.ndarray
    embedding: np.ndarray
    score: float = 0.9


class PictureReader:
    """A face reader that reads the photo's first row: pixel k = (angle in degrees, size in px, 1) is one face."""

    def detect(self, image_HWC: np.ndarray) -> list[Face]:
        found = []
        for angle, size, there in image_HWC[0].astype(float):
            if there == 1:
                turn = np.deg2rad(angle)
                embedding = np.array([np.cos(turn), np.sin(turn)], np.float32)
                found.append(Face(np.array([5, 5, 5 + size, 6 + size], np.float32), embedding))
        return found


def photo(*faces: tuple[int, int], seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(2, 256, (40, 30, 3), dtype=np.uint8)
    for column, (angle, size) in enumerate(faces):
        pixels[0, column] = (angle, size, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def check(tmp_path: Path, photos: list[bytes], recipe: recipes.Recipe = RECIPE, **columns: Any) -> Any:
    folder = tmp_path / "in"
    folder.mkdir()
    locations = []
    for number, data in enumerate(photos):
        (folder / f"{number}.png").write_bytes(data)
        locations.append(str(folder / f"{number}.png"))
    row = ManifestRow("ada", locations, "owner", **columns)
    return check_identity(row, recipe, PictureReader(), PictureReader(), str(tmp_path / "run"))


def test_good_photos_become_references_and_normalised_copies(tmp_path: Path) -> None:
    photos = [photo((angle, 25), seed=angle) for angle in (0, 10, 20)]
    person = check(tmp_path, photos, class_word="woman", consent="c", priority=3, overrides={"hpo.beta": "9"})
    assert person.photos == [f"identities/ada/photo-{n}.png" for n in (1, 2, 3)]
    for uri, data in zip(person.photos, photos):
        copy = (tmp_path / "run" / uri).read_bytes()
        limits = RECIPE.identities
        whole = decode_photo(data, "in", limits)  # 40 x 30, the face's centre at y = 18; clips are square
        assert np.array_equal(decode_photo(copy, "copy", limits), whole[3:33])
    angles = np.deg2rad([0, 10, 20])
    np.testing.assert_allclose(person.references, np.stack([np.cos(angles), np.sin(angles)], -1), atol=1e-6)
    assert person.metric_references == person.references
    assert (person.identity_id, person.owner, person.class_word, person.consent) == ("ada", "owner", "woman", "c")
    assert (person.priority, person.overrides, person.warnings) == (3, {"hpo.beta": "9"}, [])


def test_captions_stay_with_their_photos(tmp_path: Path) -> None:
    photos = [photo((angle, 25), seed=angle) for angle in (0, 10)] + [photo(), photo((20, 25), seed=20)]
    captions = ["a {class_word} in the snow", "", "nobody is there", "a woman on the beach"]
    person = check(tmp_path, photos, class_word="man", captions=captions)
    assert person.captions == ["a {class_word} in the snow", "", "a woman on the beach"]
    no_face, no_name = person.warnings
    assert "in/2.png shows no face" in no_face
    assert "the caption of in/3.png does not say 'man'" in no_name


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((32, 48), slice(8, 28), slice(0, 30)),
        ((64, 16), slice(0, 40), slice(12, 22)),
        ((64, 48), slice(0, 40), slice(30)),
    ],
)
def test_copies_are_cropped_to_the_clips_aspect_around_the_face(
    tmp_path: Path, size: tuple[int, int], rows: slice, columns: slice
) -> None:
    settings = RECIPE.with_overrides({"sampling.height": size[0], "sampling.width": size[1]})
    photos = [photo((angle, 24), seed=angle) for angle in (0, 10, 20)]  # 40 x 30, the face's centre at (17, 17.5)
    person = check(tmp_path, photos, settings)
    copy = decode_photo((tmp_path / "run" / person.photos[0]).read_bytes(), "copy", settings.identities)
    assert np.array_equal(copy, decode_photo(photos[0], "in", settings.identities)[rows, columns])


def test_bad_photos_are_left_out_with_a_warning_each(tmp_path: Path) -> None:
    good = [photo((angle, 25), seed=angle) for angle in (0, 10, 20)]
    bad = [
        b"", b"a text", good[0][:200], photo(), photo((0, 25), (90, 25)), photo((0, 12)), good[1],
    ]  # fmt: skip
    person = check(tmp_path, good + bad)
    assert len(person.photos) == len(person.references) == 3
    expected = [
        "in/3.png is empty",
        "in/4.png is text, not an image",
        "in/5.png is truncated or corrupt",
        "in/6.png shows no face",
        "in/7.png shows 2 faces",
        "in/8.png shows a face of 12 px, 20 are needed",
        "in/9.png is the same picture as in/1.png",
    ]
    assert len(person.warnings) == len(expected)
    for warning, start in zip(person.warnings, expected):
        assert warning.startswith(start)


class FailingReader(PictureReader):
    """Fails on photos whose face is turned by the angle."""

    def __init__(self, angle: int) -> None:
        self.angle = angle

    def detect(self, image_HWC: np.ndarray) -> list[Face]:
        if image_HWC[0, 0, 0] == self.angle:
            raise RuntimeError("bad kernel")
        return super().detect(image_HWC)


def test_a_recogniser_that_fails_on_one_photo_costs_that_photo_only(tmp_path: Path) -> None:
    locations = []
    for angle in (0, 10, 20, 30):
        (tmp_path / f"{angle}.png").write_bytes(photo((angle, 25), seed=angle))
        locations.append(str(tmp_path / f"{angle}.png"))
    row = ManifestRow("ada", locations)
    person = check_identity(row, RECIPE, FailingReader(10), FailingReader(30), str(tmp_path / "run"))
    assert len(person.photos) == len(person.references) == 3
    assert len(person.metric_references) == 2
    folder = tmp_path.name
    assert person.warnings == [
        f"{folder}/10.png cannot be checked: RuntimeError: bad kernel",
        f"{folder}/30.png cannot be read by the evaluation's recogniser: RuntimeError: bad kernel",
    ]


def test_a_small_face_in_the_background_does_not_count(tmp_path: Path) -> None:
    person = check(tmp_path, [photo((angle, 25), (200, 10), seed=angle) for angle in (0, 10, 20)])
    assert person.warnings == []


def test_an_outlier_is_left_out(tmp_path: Path) -> None:
    photos = [photo((angle, 25), seed=angle) for angle in (0, 10, 120, 20)]
    person = check(tmp_path, photos)
    assert len(person.photos) == 3
    mean = np.cos(np.deg2rad([120, 110, 100])).mean()
    assert person.warnings == [
        f"in/2.png does not look like the same person as the others (similarity {mean:.2f})"
    ]  # fmt: skip
    np.testing.assert_allclose(np.array(person.references)[:, 0], np.cos(np.deg2rad([0, 10, 20])), atol=1e-6)


def test_too_few_usable_photos_name_all_reasons(tmp_path: Path) -> None:
    with pytest.raises(IdentityError) as caught:
        check(tmp_path, [photo((0, 25)), b"", photo(seed=1)])
    problem = caught.value.problem
    assert "ada has 1 usable photos, 3 are needed" in problem
    assert "in/1.png is empty" in problem
    assert "in/2.png shows no face" in problem
    assert not (tmp_path / "run").exists()


def test_a_missing_photo_is_named(tmp_path: Path) -> None:
    row = ManifestRow("ada", [str(tmp_path / "absent.png"), "nosuchscheme://x/1.png"])
    with pytest.raises(IdentityError, match=r"absent\.png.*nosuchscheme"):
        check_identity(row, RECIPE, PictureReader(), None, str(tmp_path))


def test_a_store_that_is_away_is_no_photos_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(location: str) -> int:
        raise StorageError(f"cannot read {location}", "wait") from ConnectionResetError()

    photos = [photo((angle, 25), seed=angle) for angle in (0, 10, 20)]
    monkeypatch.setattr(identities, "file_size", lambda name: (away if name.endswith("3.png") else file_size)(name))
    with pytest.raises(StorageError):
        check(tmp_path, [*photos, photo((30, 25), seed=30)])
    assert not (tmp_path / "run").exists()


def test_more_photos_than_wanted_are_left_out(tmp_path: Path) -> None:
    settings = RECIPE.with_overrides({"identities.max_photos": 3})
    person = check(tmp_path, [photo((angle, 25), seed=angle) for angle in range(5)], settings)
    assert len(person.photos) == 3
    assert [w.split(" is left out")[0] for w in person.warnings] == ["in/3.png", "in/4.png"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [({"hpo.bta": "5"}, "hpo.bta"), ({"hpo.beta": "-1"}, "hpo.beta"), ({"backbone.path": "x"}, "cannot override")],
)
def test_a_refused_override_names_the_identity_and_the_key(
    tmp_path: Path, overrides: dict[str, str], problem: str
) -> None:
    with pytest.raises(IdentityError, match=f"ada: .*{problem}"):
        check(tmp_path, [photo((0, 25))], overrides=overrides)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: str) -> bytes:
        raise AssertionError("the file was read")

    monkeypatch.setattr("magicid.identities.read_bytes", read)
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(30_000_000)  # a sparse file
    with pytest.raises(IdentityError, match=r"huge\.png has 30\.0 MB, more than 25"):
        check_identity(ManifestRow("ada", [str(path)]), RECIPE, PictureReader(), None, str(tmp_path))


def test_the_example_people_pass_the_face_worlds_own_recogniser(tmp_path: Path) -> None:
    from magicid.rewards.identity import IdentityReward

    settings = recipes.load("face-world")
    faces, metric_faces = (
        IdentityReward.from_pretrained(resolve(folder), detection_size=settings.rewards.detection_size)
        for folder in (settings.rewards.identity, settings.evaluation.identity)
    )
    rows, rejected = read_manifest(str(EXAMPLES))
    assert rejected == []
    people = [check_identity(row, settings, faces, metric_faces, str(tmp_path)) for row in rows]
    assert [len(person.photos) for person in people] == [len(row.photos) for row in rows]
    assert all(person.warnings == [] for person in people)
    assert all(len(person.metric_references) == len(person.photos) for person in people)

    stranger = ManifestRow("mixed", [*rows[0].photos, rows[1].photos[0]])
    mixed = check_identity(stranger, settings, faces, None, str(tmp_path))
    assert len(mixed.photos) == len(rows[0].photos)
    assert rows[1].photos[0].rsplit("/", 1)[-1] in mixed.warnings[0]


# ---- consent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consent", [None, "", "  "])
def test_a_person_without_a_consent_reference_is_refused_before_a_photo_is_read(
    tmp_path: Path, consent: str | None
) -> None:
    settings = RECIPE.with_overrides({"identities.require_consent": True})
    row = ManifestRow("ada", [str(tmp_path / "absent.png")], consent=consent)
    with pytest.raises(IdentityError, match=r"^ada has no consent reference — name the person's consent") as caught:
        check_identity(row, settings, PictureReader(), None, str(tmp_path / "run"))
    assert "absent" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_who_has_a_consent_reference_passes_and_no_row_can_lift_the_rule(tmp_path: Path) -> None:
    settings = RECIPE.with_overrides({"identities.require_consent": True})
    photos = [photo((angle, 25), seed=angle) for angle in (0, 10, 20)]
    assert check(tmp_path, photos, settings, consent="form-17").consent == "form-17"
    row = ManifestRow("eve", [], overrides={"identities.require_consent": "false"})
    with pytest.raises(IdentityError, match="cannot override"):
        check_identity(row, settings, PictureReader(), None, str(tmp_path / "run"))


@pytest.mark.parametrize("name", recipes.shipped())
def test_only_the_recipe_of_drawn_people_asks_for_no_consent(name: str) -> None:
    assert recipes.load(name).identities.require_consent is (name != "face-world")
