"""Identity reward, detection, photo checks and face metrics on photographs of real people, by real models."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from magicid import recipe
from magicid.errors import IdentityError
from magicid.evaluation.metrics import Metrics, Sample
from magicid.evaluation.metrics.faces import FaceMetrics
from magicid.evaluation.metrics.pose import LandmarkPose, PoseMetrics
from magicid.identities import check_identity
from magicid.manifests import ManifestRow
from magicid.rewards.identity import IdentityReward, identity_reward
from tests.real_faces import identity_folder, photo

PEOPLE = {"a1": "a", "a2": "a", "b1": "b", "b2": "b", "c": "c", "d": "d"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> IdentityReward:
    return IdentityReward.from_pretrained(identity_folder(tmp_path_factory.mktemp("faces") / "real"))


@pytest.fixture(scope="module")
def embeddings(model) -> dict[str, np.ndarray]:
    return {name: model.detect(photo(name))[0].embedding for name in PEOPLE}


def panned(picture: np.ndarray, frames: int, step: float) -> np.ndarray:
    """A camera that moves over a picture, `step` px per frame to the right: the picture goes left."""
    height, width = picture.shape[:2]
    view = width - round(step * (frames - 1))
    image = Image.fromarray(picture)
    return np.stack([
        np.asarray(image.resize((view, height), Image.Resampling.BICUBIC, box=(step * t, 0, step * t + view, height)))
        for t in range(frames)
    ])  # fmt: skip


def test_one_face_is_found_where_there_is_one(model) -> None:
    for name in PEOPLE:
        faces = model.detect(photo(name))
        assert len(faces) == 1, name
        assert faces[0].score > 0.9
        left_eye, right_eye, nose, left_mouth, right_mouth = faces[0].landmarks
        assert left_eye[0] < nose[0] < right_eye[0]
        assert left_eye[1] < nose[1] < left_mouth[1]
        assert left_mouth[0] < right_mouth[0]


def test_the_same_person_years_later_is_above_every_stranger(embeddings) -> None:
    names = list(PEOPLE)
    pairs = [(x, y) for i, x in enumerate(names) for y in names[i + 1 :]]
    cosines = {pair: float(embeddings[pair[0]] @ embeddings[pair[1]]) for pair in pairs}
    same = [value for (x, y), value in cosines.items() if PEOPLE[x] == PEOPLE[y]]
    strangers = [value for (x, y), value in cosines.items() if PEOPLE[x] != PEOPLE[y]]
    assert min(same) > 0.55
    assert max(strangers) < 0.35


def test_no_face_and_two_faces(model) -> None:
    astronaut = data.astronaut()
    assert len(model.detect(astronaut)) == 1
    assert model.detect(astronaut[300:]) == []  # a suit
    assert np.isnan(model.embed(astronaut[None, 300:])).all()
    height = min(photo("a2").shape[0], photo("b1").shape[0])
    both = np.concatenate([photo("a2")[:height], photo("b1")[:height]], axis=1)
    assert len(model.detect(both)) == 2


def row(tmp_path, **pictures: np.ndarray) -> ManifestRow:
    locations = []
    for name, picture in pictures.items():
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        (tmp_path / f"{name}.png").write_bytes(data.getvalue())
        locations.append(str(tmp_path / f"{name}.png"))
    return ManifestRow("ann", locations, consent="form-1")


def test_photos_are_checked_as_people_send_them(model, tmp_path) -> None:
    settings = recipe.load("hunyuan-480p", {"identities.min_photos": 2, "identities.outlier_similarity": 0.3})
    astronaut, pair = data.astronaut(), np.concatenate([photo("b1"), photo("b1")], axis=1)
    pictures = {
        "first": photo("b1"),
        "second": photo("b2"),
        "stranger": photo("d"),
        "two": pair,
        "none": astronaut[300:],
    }
    person = check_identity(row(tmp_path, **pictures), settings, model, None, str(tmp_path / "run"))
    assert len(person.photos) == 2
    warnings = " ".join(person.warnings)
    for name in ("stranger.png", "two.png", "none.png"):
        assert name in warnings
    assert float(np.array(person.references[0]) @ np.array(person.references[1])) > 0.7
    with pytest.raises(IdentityError):
        check_identity(row(tmp_path, none=astronaut[300:]), settings, model, None, str(tmp_path / "other"))


def test_face_metrics_of_a_clip_of_a_real_person(model, embeddings) -> None:
    clip = panned(photo("b1"), 7, 4.0)
    hidden = clip.copy()
    hidden[4:] = 127  # the face is gone in three of seven frames
    own, other = embeddings["b2"][None], embeddings["a2"][None]
    metrics = Metrics([FaceMetrics(model)], model)
    right, wrong, gone = metrics.measure_many(
        [Sample(clip, 8, "", own), Sample(clip, 8, "", other), Sample(hidden, 8, "", own)]
    )
    assert right["face_sim"] > 0.55 > 0.3 > wrong["face_sim"]
    assert right["face_sim_missing0"] == right["face_sim"] == pytest.approx(identity_reward(model.embed(clip), own))
    assert gone["face_detect_rate"] == pytest.approx(4 / 7)
    assert gone["face_sim"] == pytest.approx(right["face_sim"], abs=0.1)
    assert gone["face_sim_missing0"] == pytest.approx(gone["face_sim"] * 4 / 7)


def test_head_motion_of_a_known_pan(model) -> None:
    """The head goes 4 px a frame; half a head is one and a half times the distance of eyes and mouth."""
    clip = panned(photo("b1"), 9, 4.0)
    eyes, mouth = (model.detect(photo("b1"))[0].landmarks[rows].mean(0) for rows in ([0, 1], [3, 4]))
    half = 1.5 * float(np.linalg.norm(mouth - eyes))
    moving, still = PoseMetrics(LandmarkPose(model)).measure([Sample(clip, 8), Sample(clip[:1].repeat(9, 0), 8)])
    assert moving["head_motion"] == pytest.approx(4 / half * 8, rel=0.25)
    assert still["head_motion"] == pytest.approx(0, abs=1e-4)
