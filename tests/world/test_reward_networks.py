"""The shipped networks of the face world on a few unseen people: each meets its bound through the production loader."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from insightface.app import FaceAnalysis
from insightface.utils.face_align import estimate_norm
from transformers import AutoModelForImageTextToText, AutoProcessor

from magicid.rewards.dynamics import MotionReward
from magicid.rewards.identity import IdentityReward
from magicid.rewards.semantics import SemanticsReward
from magicid.world import prompt_examples, train_detector, train_identity, train_motion, train_prompt
from magicid.world.build import WEIGHTS
from magicid.world.classifier import ActionPlaceClassifier
from magicid.world.clip_pool import ClipPool, clip_pool
from magicid.world.face_pool import picture_pool
from magicid.world.language import ACTIONS, PLACES, caption
from magicid.world.renderer import render_crowd, render_photos, render_scene, sample_people

UNSEEN = 770_000


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _clips() -> ClipPool:
    return clip_pool(48, UNSEEN, with_flow=True)


def test_detector_counts_faces() -> None:
    figures = train_detector.measure(WEIGHTS / "identity" / "detector.onnx", seed=UNSEEN, people=40)
    assert min(figures[k] for k in ("one_face", "one_face_photos", "two_faces", "no_face")) >= 0.95
    assert figures["landmark_error"] < 0.15


@pytest.mark.parametrize("size", [128, 640])
def test_detector_is_right_at_any_detection_size(size: int) -> None:
    reward = IdentityReward.from_pretrained(WEIGHTS / "identity", detection_size=size)
    people = sample_people(4, UNSEEN)
    assert [len(reward.detect(p)) for p in render_photos(people[0], 4, 1)] == [1] * 4
    assert len(reward.detect(render_crowd(people[:2], 3, 7))) == 2
    assert [len(reward.detect(s)) for s in render_scene(np.arange(8), np.arange(8), 48)] == [0] * 8


@pytest.mark.parametrize("folder", ["identity", "identity_metric"])
def test_recogniser_tells_unseen_people_apart(folder: str) -> None:
    figures = train_identity.measure(WEIGHTS / folder, people=20, seed=UNSEEN)
    assert figures["verification"] >= 0.97
    assert figures["same"] > figures["different"] + 0.5
    assert figures["found"] > 0.98


@pytest.mark.parametrize("folder", ["identity", "identity_metric"])
def test_identity_folder_in_insightface(folder: str) -> None:
    analysis = FaceAnalysis(name=str(WEIGHTS / folder), providers=["CPUExecutionProvider"])
    recogniser = analysis.models["recognition"]
    assert set(analysis.models) == {"detection", "recognition"}
    assert (recogniser.input_mean, recogniser.input_std, recogniser.input_size) == (127.5, 127.5, (112, 112))


def test_the_two_recognisers_differ() -> None:
    photo = render_photos(sample_people(1, UNSEEN)[0], 1, 3)
    first, second = (
        IdentityReward.from_pretrained(WEIGHTS / f, detection_size=128) for f in ("identity", "identity_metric")
    )
    assert abs(float((first.embed(photo) * second.embed(photo)).sum())) < 0.5
    sizes = [(WEIGHTS / f / "recognizer.onnx").stat().st_size for f in ("identity", "identity_metric")]
    assert sizes[0] != sizes[1]


def test_alignment_is_insightfaces() -> None:
    faces = np.stack([f[0, 2:] for f in picture_pool(4, UNSEEN).kinds["one_face"][1]])
    expected = np.stack([estimate_norm(face) for face in faces])
    np.testing.assert_allclose(train_identity.similarity(faces), expected, atol=1e-3)


def test_flow_error_below_a_pixel_and_below_dis() -> None:
    figures = train_motion.measure(WEIGHTS / "motion", clips=16, seed=UNSEEN)
    assert figures["epe"] < 0.5
    assert figures["epe_moving"] < 1.0
    assert figures["epe"] < figures["dis_epe"]
    assert figures["still"] < 0.15


def test_motion_score_follows_the_true_flow() -> None:
    pool, reward = _clips(), MotionReward.from_pretrained(WEIGHTS / "motion")
    true = np.linalg.norm(pool.flow[:10].astype(np.float32), axis=-1).mean((1, 2, 3))
    scores = np.array([reward.score(clip) for clip in pool.frames[:10]])
    assert np.corrcoef(true, scores)[0, 1] > 0.9
    still = np.repeat(pool.frames[0][:1], 13, axis=0)
    assert reward.score(still) < 0.1 * scores.mean()


def test_rating_model_prefers_right_prompts() -> None:
    figures = train_prompt.measure(WEIGHTS / "prompt", clips=64, seed=UNSEEN)
    assert min(figures[f"auc_{wrong}"] for wrong in ("action", "place", "both")) >= 0.85
    assert figures["right"] > figures["wrong_action"] + 2
    assert figures["right"] > figures["wrong_place"] + 2


def test_packed_ratings_equal_production() -> None:
    """Several questions in one sequence get the answers that the reward's separate conversations get."""
    pool, reward = _clips(), SemanticsReward.from_pretrained(WEIGHTS / "prompt", frames=13)
    encode = train_prompt.PackedEncoder(AutoProcessor.from_pretrained(WEIGHTS / "prompt"))
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS / "prompt", dtype=torch.float32).eval()
    prompts = [
        [caption(0, 1), caption(int(a), int(p), variant=2), "a zebra!"] for a, p in zip(pool.actions[:2], pool.places)
    ]
    packed = train_prompt.expected_ratings(model, encode, pool.frames[:2], prompts)
    single = [[reward.score(clip, prompt, 8) for prompt in asked] for clip, asked in zip(pool.frames[:2], prompts)]
    np.testing.assert_allclose(packed, single, atol=1e-3)


def test_teacher_ratings() -> None:
    assert prompt_examples.rating((2, 3), (2, 3)) == 10
    assert prompt_examples.rating((2, 3), (2, 3), stops=True) == 7
    assert prompt_examples.rating((2, 3), (2, 4)) == prompt_examples.rating((2, 3), (1, 3)) == 4
    assert prompt_examples.rating((-1, 3), (2, 3)) == 4
    assert prompt_examples.rating((-1, 3), (2, 4)) == prompt_examples.rating((2, 3), (1, 4)) == 1
    assert prompt_examples.rating((-1, 3), (-1, 3)) == 10
    assert prompt_examples.rating((2, 3), (-1, 3)) == 8
    assert prompt_examples.rating((2, 3), (-1, 4)) == 2


def test_classifier_names_action_and_place() -> None:
    pool, model = _clips(), ActionPlaceClassifier.from_pretrained(WEIGHTS / "classifier")
    actions, places = model.predict(pool.frames)
    assert actions.shape == (48, len(ACTIONS))
    assert places.shape == (48, len(PLACES))
    np.testing.assert_allclose(actions.sum(1), 1, rtol=1e-5)
    assert (actions.argmax(1) == pool.actions).mean() > 0.95
    assert (places.argmax(1) == pool.places).mean() > 0.95


def test_folders_name_what_they_are() -> None:
    motion = json.loads((WEIGHTS / "motion" / "config.json").read_text())
    assert motion["architecture"] == "raft_small"
    prompt = json.loads((WEIGHTS / "prompt" / "config.json").read_text())
    assert prompt["architectures"] == ["Qwen2VLForConditionalGeneration"]
