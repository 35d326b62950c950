"""The metrics on clips whose motion, faces and labels are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from magicid import recipe, schema
from magicid.errors import BackboneError, RewardError
from magicid.evaluation.metrics import Metrics, dis_flow, dynamic_magnitude, top_mean
from magicid.world.classifier import ActionPlaceClassifier
from magicid.world.language import caption
from tests.rewards.folders import identity_folder


class KnownFaces:
    """A recogniser that reads the embedding from the first pixel: its red is the angle in degrees, 255 is no face."""

    def embed(self, frames):
        degrees = frames[:, 0, 0, 0].astype(np.float32)
        rows = np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)
        rows[degrees == 255] = np.nan
        return rows.astype(np.float32)


class KnownClassifier:
    """P(action 2) = 0.5, P(place 3) = 0.4 for every clip."""

    def predict(self, frames_BFHWC):
        assert frames_BFHWC.ndim == 5
        actions, places = np.full((1, 8), 0.5 / 7), np.full((1, 8), 0.6 / 7)
        actions[0, 2], places[0, 3] = 0.5, 0.4
        return actions, places


def moving_texture(frames: int, step: float, size: int = 128) -> np.ndarray:
    """A smooth texture that moves `step` px per frame to the right."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    clip = []
    for t in range(frames):
        u = x - step * t
        wave = np.sin(u * 0.35 + 0.5 * np.sin(y * 0.21)) + np.cos(y * 0.3 + u * 0.13) + np.sin((u + 2 * y) * 0.17)
        clip.append(127.5 + 40 * wave)
    return np.repeat(np.clip(np.stack(clip), 0, 255).astype(np.uint8)[..., None], 3, -1)


def angles(*degrees: int) -> np.ndarray:
    frames = np.zeros((len(degrees), 128, 128, 3), np.uint8)
    frames[:, 0, 0, 0] = degrees
    return frames


REFERENCES = np.array([[1, 0], [0, 1]], np.float32)


def test_flow_is_known_motion_in_px_of_the_given_frames() -> None:
    flow = dis_flow(moving_texture(3, 2.0))
    assert flow.shape == (2, 128, 128, 2)
    inner = flow[:, 16:-16, 16:-16]
    assert np.median(inner[..., 0]) == pytest.approx(2, abs=0.1)
    assert np.median(np.abs(inner[..., 1])) < 0.1
    small = dis_flow(moving_texture(3, 2.0)[:, ::2, ::2])  # half the size, half the motion
    assert small.shape == (2, 64, 64, 2)
    assert np.median(small[:, 8:-8, 8:-8, 0]) == pytest.approx(1, abs=0.1)


def test_top_mean_is_of_the_largest_five_percent() -> None:
    assert top_mean(np.arange(100.0).reshape(10, 10)) == np.mean([95, 96, 97, 98, 99])
    assert top_mean(np.array([3.0, 1.0])) == 3


def test_dynamic_magnitude_is_scaled_to_256_px() -> None:
    clip = moving_texture(5, 2.0)
    flow = dis_flow(clip)
    tops = [np.sort(np.linalg.norm(pair, axis=-1).ravel())[-819:].mean() for pair in flow]  # 5 % of 128 * 128
    assert dynamic_magnitude(clip, 8) == pytest.approx(np.mean(tops) * 2, rel=1e-5)
    assert dynamic_magnitude(clip[:1].repeat(4, 0), 8) == pytest.approx(0, abs=1e-3)


def test_frames_are_thinned_to_about_eight_per_second() -> None:
    clip = moving_texture(7, 1.0)
    assert dynamic_magnitude(clip, 24) == pytest.approx(dynamic_magnitude(clip[::3], 8))
    assert dynamic_magnitude(clip, 24) > 2 * dynamic_magnitude(clip, 8)
    with pytest.raises(RewardError, match="1 frames"):
        dynamic_magnitude(clip[:3], 24)


def test_face_metrics_by_hand() -> None:
    metrics = Metrics(KnownFaces(), None)  # type: ignore[arg-type]
    row = metrics.measure(angles(0, 90, 255, 255), 8, "", REFERENCES)
    assert row["face_sim"] == pytest.approx(0.5, abs=1e-6)
    assert row["face_detect_rate"] == 0.5
    assert metrics.face_metrics(angles(0, 0), REFERENCES[:1]) == (pytest.approx(1), 1.0)


def test_sixteen_evenly_spaced_frames_are_looked_at() -> None:
    frames = angles(*([255] * 31))
    frames[::2, 0, 0, 0] = 60  # every second frame: exactly the sixteen
    row = Metrics(KnownFaces(), None).measure(frames, 8, "", REFERENCES[:1])  # type: ignore[arg-type]
    assert (row["face_sim"], row["face_detect_rate"]) == (pytest.approx(0.5, abs=1e-6), 1.0)


def test_a_clip_without_a_face_is_null_with_a_reason() -> None:
    row = Metrics(KnownFaces(), None).measure(angles(255, 255), 8, "", REFERENCES)  # type: ignore[arg-type]
    assert (row["face_sim"], row["face_detect_rate"]) == (None, 0.0)
    assert row["error"] == "face_sim: no face was found in any frame"
    assert row["dynamic_magnitude"] is not None


def test_prompt_score_is_the_probability_of_the_prompts_action_and_place() -> None:
    metrics = Metrics(None, KnownClassifier())  # type: ignore[arg-type]
    row = metrics.measure(angles(0, 0), 8, caption(2, 3, class_word="man", variant=1), REFERENCES)
    assert row["prompt_score"] == pytest.approx(0.5 * 0.4)
    assert metrics.prompt_score(angles(0, 0), caption(1, 3)) == pytest.approx(0.5 / 7 * 0.4)
    unknown = metrics.measure(angles(0, 0), 8, "a person juggles", REFERENCES)
    assert unknown["prompt_score"] is None
    assert "names no single action and place" in unknown["error"]


def test_the_row_is_what_the_schema_wants() -> None:
    values = Metrics(None, None).measure(moving_texture(4, 1.0)[:, :64], 8, "", REFERENCES)
    assert (values["fps"], values["frames"], values["height"], values["width"]) == (8, 4, 64, 128)
    assert (values["face_sim"], values["face_detect_rate"], values["prompt_score"], values["error"]) == (None,) * 4
    common = {"clip_id": "c", "identity_id": "ann", "method": "hpo", "prompt": "", "seed": 1, "video_uri": None}
    row = schema.from_row(schema.MetricRow, {**values, **common})
    assert dataclasses.asdict(row) == {**values, **common}
    with pytest.raises(RewardError, match="uint8 RGB"):
        Metrics(None, None).measure(np.zeros((2, 8, 8)), 8, "", REFERENCES)


def test_from_recipe_loads_what_the_recipe_names(tmp_path) -> None:
    folder = identity_folder(tmp_path / "metric")
    (tmp_path / "classifier").mkdir()
    ActionPlaceClassifier(width=4).save_pretrained(tmp_path / "classifier")
    settings = {"evaluation.identity": str(folder), "evaluation.classifier": str(tmp_path / "classifier")}
    metrics = Metrics.from_recipe(recipe.load("face-world", settings))
    frames = np.zeros((13, 48, 48, 3), np.uint8)
    row = metrics.measure(frames, 8, caption(0, 0), np.eye(12, dtype=np.float32))
    assert metrics.classifier is not None
    actions, places = metrics.classifier.predict(frames[None])
    assert row["prompt_score"] == pytest.approx(float(actions[0, 0] * places[0, 0]))
    assert (row["face_sim"], row["face_detect_rate"]) == (None, 0.0)
    empty = Metrics.from_recipe(recipe.load("wan-480p", {"evaluation.identity": ""}))
    assert (empty.faces, empty.classifier) == (None, None)


def test_the_rewards_own_recogniser_is_refused(tmp_path) -> None:
    folder = str(identity_folder(tmp_path / "identity"))
    with pytest.raises(RewardError, match="reward's own recogniser"):
        Metrics.from_recipe(recipe.load("face-world", {"evaluation.identity": folder, "rewards.identity": folder}))
    with pytest.raises(BackboneError, match="no model folder"):
        Metrics.from_recipe(recipe.load("face-world", {"evaluation.identity": str(tmp_path / "absent")}))


def test_a_classifier_that_cannot_be_loaded_is_named(tmp_path) -> None:
    settings = {"evaluation.identity": "", "evaluation.classifier": str(tmp_path)}
    with pytest.raises(RewardError, match="cannot load the classifier"):
        Metrics.from_recipe(recipe.load("face-world", settings))
