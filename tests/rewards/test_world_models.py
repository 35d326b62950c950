"""The rewards on the models that ship: unseen people of the face world, drawn by its renderer."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from magicid import recipe
from magicid.evaluation.metrics import Metrics, Sample
from magicid.evaluation.metrics.motion import dis_flow
from magicid.rewards.dynamics import MotionReward
from magicid.rewards.identity import IdentityReward, identity_reward
from magicid.rewards.semantics import SemanticsReward
from magicid.weights import resolve
from magicid.world.language import ACTIONS, PLACES, caption
from magicid.world.people import sample_people
from magicid.world.renderer import render_clips, render_photos, render_scene

PEOPLE = 6
SETTINGS = recipe.load("face-world")


def shipped(name: str, last_file: str = "model.safetensors") -> pytest.MarkDecorator:
    file = resources.files("magicid.world") / "weights" / name / last_file
    return pytest.mark.skipif(not file.is_file(), reason=f"world:{name} is not built")


@pytest.fixture(scope="module")
def people() -> np.ndarray:
    return sample_people(PEOPLE, seed=970_001)


@pytest.fixture(scope="module")
def clips(people):
    numbers = np.arange(PEOPLE)
    return render_clips(people, numbers % len(ACTIONS), (3 * numbers) % len(PLACES), 970_100 + numbers)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=shipped(n, "recognizer.onnx")) for n in ("identity", "identity_metric")]
)
def test_the_recognisers_tell_unseen_people_apart(name: str, people, clips) -> None:
    model = IdentityReward.from_pretrained(resolve(f"world:{name}"), detection_size=SETTINGS.rewards.detection_size)
    photos = [render_photos(person, 4, 970_200 + i) for i, person in enumerate(people)]
    faces = [[model.detect(photo) for photo in of_one] for of_one in photos]
    assert np.mean([len(found) == 1 for of_one in faces for found in of_one]) >= 0.9
    references = [np.stack([found[0].embedding for found in of_one if found]) for of_one in faces]
    rewards = np.array(
        [[identity_reward(embedded, r) for r in references] for embedded in (model.embed(c) for c in clips.frames)],
        dtype=float,
    )
    own, others = np.diag(rewards), rewards[~np.eye(PEOPLE, dtype=bool)]
    assert own.mean() > others.mean() + 0.3
    assert (rewards.argmax(1) == np.arange(PEOPLE)).mean() >= 0.8
    empty = render_scene(np.arange(4), np.arange(4), 48)
    assert np.isnan(model.embed(empty)).all(axis=1).mean() >= 0.75


@shipped("motion")
def test_the_motion_reward_is_the_true_motion(clips) -> None:
    model = MotionReward.from_pretrained(resolve("world:motion"))
    frames, flow, valid = clips.frames[:3], clips.flow[:3], clips.flow_valid[:3]
    errors, scores = [], []
    for one, true, seen in zip(frames, flow, valid):
        found = model.flow(one).transpose(0, 2, 3, 1)
        errors.append(np.linalg.norm(found - true, axis=-1)[seen].mean())
        scores.append((model.score(one), np.linalg.norm(true.astype(float), axis=-1).mean()))
        assert model.score(one) == pytest.approx(np.linalg.norm(found, axis=-1).mean(), rel=1e-5)
    assert np.mean(errors) < 1
    for measured, true in scores:
        assert measured == pytest.approx(true, abs=0.5)
    assert model.score(frames[0][:1].repeat(3, 0)) < 0.2


def test_the_metrics_flow_is_the_true_motion(clips) -> None:
    errors = [
        np.linalg.norm(dis_flow(one) - true, axis=-1)[seen].mean()
        for one, true, seen in zip(clips.frames, clips.flow, clips.flow_valid)
    ]
    assert np.mean(errors) < 1


@shipped("prompt")
def test_right_prompts_are_rated_above_wrong_ones(clips) -> None:
    model = SemanticsReward.from_pretrained(resolve("world:prompt"), frames=SETTINGS.rewards.semantics_frames)
    right, wrong = [], []
    for frames, action, place in zip(clips.frames, clips.actions, clips.places):
        right.append(model.score(frames, caption(int(action), int(place)), 8))
        wrong.append(model.score(frames, caption((int(action) + 3) % len(ACTIONS), int(place)), 8))
        wrong.append(model.score(frames, caption(int(action), (int(place) + 3) % len(PLACES)), 8))
    auc = np.mean([r > w for r in right for w in wrong])
    assert auc >= 0.75
    assert 1 <= min(wrong) < max(right) <= 10


@shipped("classifier")
def test_what_a_clip_shows_is_recognised(clips) -> None:
    metrics = Metrics.from_recipe(recipe.load("face-world", {"evaluation.identity": ""}))
    labels = [(int(action), int(place)) for action, place in zip(clips.actions, clips.places)]
    asked = [caption(a, p, variant=1) for a, p in labels] + [caption((a + 3) % 8, p) for a, p in labels]
    rows = metrics.measure_many([Sample(f, 8, prompt) for f, prompt in zip([*clips.frames, *clips.frames], asked)])
    right, wrong = rows[: len(labels)], rows[len(labels) :]
    assert np.mean([row["prompt_score"] for row in right]) > 0.7
    assert np.mean([row["prompt_score"] for row in wrong]) < 0.2
    assert [row["action"] for row in right] == [1.0] * len(labels)
    assert [row["action"] for row in wrong] == [0.0] * len(labels)
    assert [row["place"] for row in wrong] == [1.0] * len(labels)


@shipped("classifier")
def test_the_features_of_clips_change_slowly_and_tell_places_apart(clips) -> None:
    metrics = Metrics.from_recipe(recipe.load("face-world", {"evaluation.identity": ""}))
    jumbled = clips.frames[[0, 1, 2, 3, 4, 5] * 2, np.arange(12) % 13]  # a frame of another clip each time
    rows = metrics.measure_many([*(Sample(f, 8) for f in clips.frames), Sample(jumbled, 8)])
    assert min(row["temporal_consistency"] for row in rows[:-1]) > rows[-1]["temporal_consistency"] + 0.01
    assert len(rows[0]["video_features"]) == 96


@shipped("classifier")
@shipped("identity_metric", "recognizer.onnx")
def test_the_metrics_of_the_recipe(people, clips) -> None:
    metrics = Metrics.from_recipe(SETTINGS)
    assert metrics.faces is not None
    references = [metrics.faces.embed(render_photos(person, 4, 970_200 + i)) for i, person in enumerate(people[:2])]
    own, other = (
        metrics.measure(
            clips.frames[0], 8, caption(int(clips.actions[0]), int(clips.places[0])), r[~np.isnan(r).any(1)]
        )
        for r in references
    )
    assert own["face_sim"] > other["face_sim"] + 0.2
    assert own["face_detect_rate"] >= 0.8
    assert own["dynamic_magnitude"] > 1
    assert own["error"] is None


@pytest.mark.parametrize("name", [pytest.param("motion", marks=shipped("motion"))])
def test_motion_of_many_clips_is_that_of_each(name: str, clips) -> None:
    model = MotionReward.from_pretrained(resolve(f"world:{name}"))
    few = clips.frames[:3]
    assert model.score_many(few, batch=2) == pytest.approx([model.score(clip) for clip in few], rel=1e-4)
