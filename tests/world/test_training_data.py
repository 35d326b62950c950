"""What the reward networks learn from: degraded pictures, detection targets, aligned crops, questions and scores."""

from __future__ import annotations

import numpy as np

from magicid.rewards.semantics import RATING_QUESTION
from magicid.world import prompt_examples, train_detector, train_identity, train_prompt
from magicid.world.clip_pool import clip_pool
from magicid.world.degradation import degrade, fold_frames, unfold_frames
from magicid.world.face_pool import face_images, picture_pool
from magicid.world.language import parse
from magicid.world.prompt_model import make_tokenizer
from magicid.world.train_motion import raft_input, training_pairs


def test_degrading_is_seeded_and_can_be_nothing() -> None:
    clips = np.random.default_rng(0).integers(0, 256, (3, 5, 48, 48, 3), dtype=np.uint8)
    folded = fold_frames(clips)
    assert folded.shape == (3, 48, 48, 15)
    np.testing.assert_array_equal(unfold_frames(folded), clips)
    np.testing.assert_array_equal(degrade(folded, np.random.default_rng(1), amount=0.0), folded)
    first, second = (degrade(folded, np.random.default_rng(2)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != folded).mean() > 0.3


def test_detection_targets_point_at_the_face() -> None:
    """The sides and offsets at every positive place lead back to the box and the key points."""
    points = [[50, 55], [75, 55], [62, 65], [53, 80], [72, 80]]
    face = np.array([[40, 35], [85, 95], *points], dtype=np.float32)
    labels, sides, offsets = train_detector.make_targets([face[None]], 1)
    rows = np.flatnonzero(labels[0].numpy() == 1)
    assert len(rows) >= 1
    for row in rows:
        place = np.array([row % 8, row // 8]) * 16
        box = sides[0, row].numpy() * 16
        np.testing.assert_allclose([*(place - box[:2]), *(place + box[2:])], [40, 35, 85, 95], atol=1e-4)
        np.testing.assert_allclose(offsets[0, row].numpy().reshape(5, 2) * 16 + place, points, atol=1e-4)
    assert (train_detector.make_targets([face[None]], 0)[0] == 1).sum() == 0  # too large for the finest stride


def test_canvas_moves_points_with_the_picture() -> None:
    image = np.zeros((48, 48, 3), dtype=np.uint8)
    image[20:23, 30:33] = 255
    rng = np.random.default_rng(5)
    for _ in range(12):
        canvas, moved = train_detector.place_on_canvas(image, np.array([[31, 21]], np.float32), image * 0, rng)
        bright = canvas[..., 0].astype(float)
        if bright.sum() and (moved > 12).all() and (moved < 116).all():
            rows, columns = np.indices(bright.shape)
            centre = np.array([(columns * bright).sum(), (rows * bright).sum()]) / bright.sum()
            np.testing.assert_allclose(centre, moved[0], atol=0.6)


def test_pictures_and_people_are_told_apart_by_seed() -> None:
    one, again, other = (picture_pool(4, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.kinds["two_faces"][0][1], again.kinds["two_faces"][0][1])
    assert (one.kinds["one_face"][0][0] != other.kinds["one_face"][0][0]).any()
    assert [len(f) for f in one.kinds["two_faces"][1]] == [2, 2]
    pool = face_images(3, 5, clips=2, frames_per_clip=3, photos=2)
    assert pool.frames.people.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert pool.photos.people.tolist() == [0, 0, 1, 1, 2, 2]
    eyes = pool.photos.landmarks[:, 1, 0] - pool.photos.landmarks[:, 0, 0]
    assert (eyes > 8).all()


def test_aligned_crops_put_the_eyes_on_the_template() -> None:
    image = np.zeros((48, 48, 3), dtype=np.uint8)
    landmarks = train_identity.arcface_dst[None] * (30 / 112) + 8
    image[
        int(landmarks[0, 0, 1]) - 1 : int(landmarks[0, 0, 1]) + 2,
        int(landmarks[0, 0, 0]) - 1 : int(landmarks[0, 0, 0]) + 2,
    ] = 255
    crop = (train_identity.aligned_crops([image], landmarks.astype(np.float32))[0, 0].numpy() + 1) / 2
    rows, columns = np.indices(crop.shape)
    centre = [(columns * crop).sum() / crop.sum(), (rows * crop).sum() / crop.sum()]
    np.testing.assert_allclose(centre, train_identity.arcface_dst[0], atol=4.0)


def test_threshold_and_verification() -> None:
    same, different = np.array([0.9, 0.8, 0.7, 0.3], np.float32), np.array([0.1, 0.2, 0.4, 0.5], np.float32)
    threshold = train_identity.best_threshold(same, different)
    assert 0.5 <= threshold < 0.7
    assert train_identity.verification(same, different, threshold) == 0.875


def test_area_under_curve() -> None:
    assert train_prompt.area_under_curve(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == 0.875


def test_flow_pairs_are_scaled_with_the_frames() -> None:
    pool = clip_pool(6, 9, with_flow=True)
    first, second, flow, weight = training_pairs(pool, 4, np.random.default_rng(3))
    assert first.shape == second.shape == (4, 3, 128, 128)
    assert flow.shape == (4, 2, 128, 128)
    assert 0 < float(weight.mean()) <= 1
    assert abs(float(flow.abs().max()) - np.abs(pool.flow).max() * 128 / 48) < np.abs(pool.flow).max() * 128 / 48
    assert raft_input(np.zeros((2, 160, 200, 3), np.uint8)).shape == (2, 3, 160, 200)


def test_questions_ask_what_the_answers_say() -> None:
    pool = clip_pool(24, 11)
    examples = prompt_examples.draw_examples(pool, 24, np.random.default_rng(1))
    for texts, answers, action, place in zip(examples.texts, examples.answers, examples.actions, examples.places):
        assert texts[0].startswith(RATING_QUESTION.split("{")[0])
        for text, answer in zip(texts, answers):
            if text == prompt_examples.DESCRIBE:
                assert parse(answer) == ((int(action) if action >= 0 else None), int(place))
                continue
            asked = parse(text.split('"')[1])
            if asked == (int(action), int(place)):
                assert answer in ("10", "7")
            elif action >= 0 and asked[0] not in (None, int(action)) and asked[1] != int(place):
                assert answer == "1"


def test_tokenizer_keeps_words_whole_and_digits_apart() -> None:
    tokenizer = make_tokenizer(RATING_QUESTION)
    assert tokenizer.tokenize("10") == ["1", "0"]
    assert tokenizer.tokenize(" a woman who nods in the kitchen") == [
        "Ġa", "Ġwoman", "Ġwho", "Ġnods", "Ġin", "Ġthe", "Ġkitchen",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("Zürich, 雪!")["input_ids"]) == "Zürich, 雪!"
