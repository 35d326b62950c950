"""The identity reward on a detector and a recogniser whose answers are known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from insightface.utils import face_align

from magicid.errors import RewardError
from magicid.rewards.identity import IdentityReward, identity_reward
from tests.rewards.folders import LANDMARKS, identity_folder

NAN = math.nan
pytestmark = pytest.mark.filterwarnings("ignore:.*estimate.*is deprecated:FutureWarning")  # of insightface


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> IdentityReward:
    folder = identity_folder(tmp_path_factory.mktemp("models") / "identity")
    return IdentityReward.from_pretrained(folder, detection_size=64)


def picture(small=(), large=()) -> np.ndarray:
    """Black, with red faces of 8 px and green ones of 16 px at (x, y), each with a blue right half."""
    image = np.zeros((64, 64, 3), np.uint8)
    for places, side, channel in ((small, 8, 0), (large, 16, 1)):
        for x, y in places:
            image[y : y + side, x : x + side, channel] = 255
            image[y : y + side, x + side // 2 : x + side, 2] = 255
    return image


def at(x: int, y: int, scale: int = 1) -> np.ndarray:
    """The landmarks of a face at (x, y)."""
    return scale * LANDMARKS + np.array([x, y], np.float32)


def expected_embedding(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The tiny recogniser in NumPy, on the RGB picture."""
    crop = face_align.norm_crop(image, landmark=landmarks, image_size=112).astype(np.float64)
    scaled = (crop - 127.5) / 127.5
    quarters = scaled.reshape(2, 56, 2, 56, 3).mean((1, 3)).transpose(2, 0, 1).ravel()
    return quarters / np.linalg.norm(quarters)


def test_faces_are_found_where_they_are_the_largest_first(model: IdentityReward) -> None:
    image = picture(small=[(8, 16)], large=[(32, 48)])
    large, small = model.detect(image)
    np.testing.assert_allclose(large.box, [32, 48, 48, 64], atol=1e-3)
    np.testing.assert_allclose(small.box, [8, 16, 16, 24], atol=1e-3)
    np.testing.assert_allclose(small.landmarks, at(8, 16), atol=1e-3)
    np.testing.assert_allclose(large.landmarks, at(32, 48, 2), atol=1e-3)
    assert (small.shorter_side, large.shorter_side) == (pytest.approx(8), pytest.approx(16))
    assert 0.5 < small.score <= 1
    for face in (large, small):
        np.testing.assert_allclose(face.embedding, expected_embedding(image, face.landmarks), atol=0.01)
        assert np.linalg.norm(face.embedding) == pytest.approx(1, abs=1e-6)


def test_pictures_of_other_sizes_are_resized_for_the_detector(model: IdentityReward) -> None:
    (face,) = model.detect(picture(small=[(8, 16)]).repeat(2, 0).repeat(2, 1))
    np.testing.assert_allclose(face.box, [16, 32, 32, 48], atol=1e-3)
    assert model.detect(np.zeros((20, 30, 3), np.uint8)) == []


def test_embed_takes_the_largest_face_and_leaves_nan_without_one(model: IdentityReward) -> None:
    frames = np.stack([picture(small=[(8, 16)], large=[(32, 48)]), picture(), picture(small=[(40, 8)])])
    rows = model.embed(frames)
    assert rows.dtype == np.float32
    assert rows.shape == (3, 12)
    np.testing.assert_allclose(rows[0], expected_embedding(frames[0], at(32, 48, 2)), atol=0.01)
    assert np.isnan(rows[1]).all()
    np.testing.assert_allclose(rows[2], expected_embedding(frames[2], at(40, 8)), atol=0.01)
    assert np.isnan(model.embed(frames[1:2])).all()
    # Red, green and blue are told apart: the small face is red, so its first four numbers are high.
    assert rows[2, :4].mean() > rows[2, 4:8].mean()


def test_a_recogniser_for_one_face_at_a_time_gives_the_same(model: IdentityReward, tmp_path) -> None:
    single = IdentityReward.from_pretrained(identity_folder(tmp_path / "one", batch=1), detection_size=64)
    frames = np.stack([picture(small=[(8, 16)]), picture(large=[(16, 16)])])
    np.testing.assert_allclose(single.embed(frames), model.embed(frames), atol=1e-6)


def test_loading_and_running_say_nothing(model: IdentityReward, tmp_path, capsys, recwarn) -> None:
    IdentityReward.from_pretrained(identity_folder(tmp_path / "quiet"), detection_size=64).detect(picture([(8, 8)]))
    assert capsys.readouterr() == ("", "")
    assert list(recwarn) == []


@pytest.mark.parametrize("missing", ["detector.onnx", "recognizer.onnx", None])
def test_an_incomplete_folder_is_refused(tmp_path, missing) -> None:
    folder = tmp_path / "identity"
    if missing:
        (identity_folder(folder) / missing).unlink()
    with pytest.raises(RewardError, match=str(folder)):
        IdentityReward.from_pretrained(folder)


def test_a_corrupt_model_is_refused(tmp_path) -> None:
    folder = identity_folder(tmp_path / "identity")
    (folder / "recognizer.onnx").write_bytes(b"not a model")
    with pytest.raises(RewardError, match="not an insightface folder"):
        IdentityReward.from_pretrained(folder)


def test_a_zero_embedding_is_an_error_not_a_number(tmp_path) -> None:
    broken = IdentityReward.from_pretrained(identity_folder(tmp_path / "zero", scale=0.0), detection_size=64)
    with pytest.raises(RewardError, match="non-finite or zero"):
        broken.embed(picture(small=[(8, 8)])[None])


@pytest.mark.parametrize("frames", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_frames_of_another_form_are_refused(model: IdentityReward, frames) -> None:
    with pytest.raises(RewardError, match="uint8 RGB"):
        model.embed(frames)


def test_identity_reward_is_the_mean_cosine_over_frames_with_a_face_and_references() -> None:
    frames = np.array([[1, 0], [NAN, NAN], [0.6, 0.8]])
    assert identity_reward(frames, np.array([[1.0, 0], [0, 1]])) == pytest.approx((1 + 0 + 0.6 + 0.8) / 4)
    assert identity_reward(frames[1:2], np.array([[1.0, 0]])) is None
    assert identity_reward(np.array([[-1.0, 0]]), np.array([[1.0, 0]])) == -1


@pytest.mark.parametrize("references", [np.zeros((0, 2)), np.array([[NAN, 1]]), np.ones((1, 3))])
def test_references_that_cannot_be_used_are_refused(references) -> None:
    with pytest.raises(RewardError, match="reference"):
        identity_reward(np.array([[1.0, 0]]), references)
