"""The renderer's labels are the truth of its frames."""

from __future__ import annotations

import numpy as np
import pytest

from magicid.world.examples import EXAMPLE_PEOPLE, write_examples
from magicid.world.language import ACTIONS, CLASS_WORDS, PLACES, STILL, VARIANTS, caption, parse, vocabulary
from magicid.world.renderer import (
    PARAMETERS,
    POSE,
    RenderedClips,
    render_clips,
    render_crowd,
    render_photos,
    render_scene,
    sample_people,
)

EVERY = np.arange(len(ACTIONS))


@pytest.fixture(scope="module")
def clips() -> RenderedClips:
    """Two clips of every action."""
    return render_clips(sample_people(16, 4), np.tile(EVERY, 2), np.arange(16) % len(PLACES), np.arange(16))


def _sample(image_HWC: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear samples at pixel indices."""
    height, width, _ = image_HWC.shape
    x, y = np.clip(x, 0, width - 1.001), np.clip(y, 0, height - 1.001)
    x0, y0 = x.astype(int), y.astype(int)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = image_HWC[y0, x0] * (1 - fx) + image_HWC[y0, x0 + 1] * fx
    bottom = image_HWC[y0 + 1, x0] * (1 - fx) + image_HWC[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def test_warping_the_next_frame_back_gives_this_frame(clips: RenderedClips) -> None:
    rows, columns = np.mgrid[:48, :48].astype(np.float64)
    after, before, share = [], [], []
    for clip in range(len(clips.frames)):
        frames = clips.frames[clip].astype(np.float64)
        for t in range(12):
            flow, valid = clips.flow[clip, t], clips.flow_valid[clip, t]
            moving = valid & (np.hypot(flow[..., 0], flow[..., 1]) > 0.5)
            warped = _sample(frames[t + 1], columns + flow[..., 0], rows + flow[..., 1])
            after.append(np.abs(warped - frames[t]).mean(-1)[moving])
            before.append(np.abs(frames[t + 1] - frames[t]).mean(-1)[moving])
            share.append(valid.mean())
    error, still = np.concatenate(after), np.concatenate(before)
    # What is left is interpolation at edges one pixel wide.
    assert np.median(error) < 2.0
    assert error.mean() < 0.5 * still.mean()
    assert np.mean(share) > 0.9


def test_flow_is_the_motion_of_the_labelled_points() -> None:
    # The nose is the topmost layer at its own landmark, so flow there is the landmark's displacement.
    clips = render_clips(sample_people(8, 6), EVERY, EVERY, EVERY + 20, size=96)
    worst = 0.0
    for clip in range(8):
        for t in range(12):
            here, there = clips.landmarks[clip, t, 2], clips.landmarks[clip, t + 1, 2]
            column, row = (int(v) for v in np.floor(here))
            if 0 <= column < 96 and 0 <= row < 96:
                # A pixel centre lies up to half a pixel from the landmark; rotation and zoom account for the slack.
                worst = max(worst, float(np.abs(clips.flow[clip, t, row, column] - (there - here)).max()))
    assert worst < 0.25


def test_a_still_person_moves_less_than_any_action(clips: RenderedClips) -> None:
    def top(flow: np.ndarray) -> np.ndarray:
        size = np.sort(np.hypot(flow[..., 0], flow[..., 1]).reshape(*flow.shape[:2], -1), -1)
        return size[..., -115:].mean((1, 2))

    still = render_clips(sample_people(16, 4), [STILL] * 16, [0] * 16, np.arange(16))
    assert top(still.flow).mean() < 0.2
    assert top(clips.flow).min() > 2.0 * top(still.flow).max()


def test_labels_lie_on_the_face(clips: RenderedClips) -> None:
    left, top, right, bottom = (clips.boxes[..., None, i] for i in range(4))
    x, y = clips.landmarks[..., 0], clips.landmarks[..., 1]
    assert ((x > left) & (x < right) & (y > top) & (y < bottom)).mean() == 1.0
    assert (clips.landmarks[:, :, 0, 0] < clips.landmarks[:, :, 1, 0]).all()
    assert (clips.landmarks[:, :, 3, 0] < clips.landmarks[:, :, 4, 0]).all()
    # Roll turns the eyes about each other by its own angle.
    apart = clips.landmarks[:, :, 1] - clips.landmarks[:, :, 0]
    roll = clips.pose[..., POSE.index("roll")]
    np.testing.assert_allclose(np.arctan2(apart[..., 1], apart[..., 0]), roll, atol=1e-3)
    height = (clips.boxes[:, 0, 3] - clips.boxes[:, 0, 1]) / 48
    assert ((height > 0.4) & (height < 0.65)).all()


def test_poses_follow_their_action() -> None:
    def path(action: str, name: str) -> np.ndarray:
        made = render_clips(sample_people(12, 1), [ACTIONS.index(action)] * 12, [0] * 12, np.arange(12))
        return made.pose[..., POSE.index(name)]

    walked = path("walks across", "x")
    assert (np.abs(walked[:, -1] - walked[:, 0]) > 0.4 * 48).all()
    assert (np.abs(np.diff(walked, axis=1)) > 1.0).mean() > 0.95
    assert (np.ptp(path("jumps", "y"), axis=1) > 0.15 * 48).all()
    assert (np.ptp(path("nods", "pitch"), axis=1) > 1.0).all()
    assert (np.ptp(path("shakes the head", "yaw"), axis=1) > 1.0).all()
    turned = np.diff(path("turns around", "yaw"), axis=1)
    assert ((turned >= -1e-6).all(1) | (turned <= 1e-6).all(1)).all()
    grown = path("leans in", "scale")
    assert (grown[:, -1] > 1.35 * grown[:, 0]).all()
    assert (np.ptp(path("talks", "mouth"), axis=1) > 0.6).all()
    assert (np.ptp(path("tilts the head", "roll"), axis=1) > 0.35).all()


def test_equal_seeds_give_equal_clips_in_any_batch(clips: RenderedClips) -> None:
    people = sample_people(16, 4)
    again = render_clips(people[3:5], [3, 4], [3, 4], [3, 4])
    np.testing.assert_array_equal(again.frames, clips.frames[3:5])
    np.testing.assert_array_equal(again.flow, clips.flow[3:5])
    other = render_clips(people[3:5], [3, 4], [3, 4], [5, 6])
    assert (other.frames != again.frames).any((1, 2, 3, 4)).all()


def test_every_parameter_shows() -> None:
    people = sample_people(12, 3)
    people[:, PARAMETERS.index("hair_length")] = 0.5  # nobody is bald, so that the hair's parameters can show
    still = {"actions": [STILL] * 12, "places": [0] * 12, "seeds": [3] * 12, "frames": 1, "size": 96}
    pictures = render_clips(people, **still).frames.astype(int)
    for i, name in enumerate(PARAMETERS):
        changed = people.copy()
        changed[:, i] = np.where(people[:, i] < 0.5, people[:, i] + 0.5, people[:, i] - 0.5)
        other = render_clips(changed, **still).frames.astype(int)
        shows = (np.abs(other - pictures).max(-1) > 8).sum((1, 2, 3))
        assert np.median(shows) >= 12, (name, shows)


def test_photos_scenes_and_crowds() -> None:
    people = sample_people(2, 9)
    photos = render_photos(people[0], 5, 1)
    assert photos.shape == (5, 96, 96, 3)
    np.testing.assert_array_equal(photos, render_photos(people[0], 5, 1))
    assert all((photos[i] != photos[i + 1]).mean() > 0.5 for i in range(4))
    crowd, empty = render_crowd(people, 2, 7), render_scene([2], [7], 96)[0]
    changed = (crowd != empty).any(-1)
    assert changed[:, :48].mean() > 0.15
    assert changed[:, 48:].mean() > 0.15


@pytest.mark.parametrize(
    ("people", "actions", "places", "seeds", "message"),
    [
        (np.zeros((1, 3)), [0], [0], [0], "people must be"),
        (np.full((1, len(PARAMETERS)), np.nan), [0], [0], [0], r"0\.\.1"),
        (np.zeros((1, len(PARAMETERS))), [8], [0], [0], "actions"),
        (np.zeros((1, len(PARAMETERS))), [0], [-1], [0], "places"),
        (np.zeros((1, len(PARAMETERS))), [0], [0], [0, 1], "seeds has 2"),
    ],
)
def test_wrong_input_is_refused(people, actions, places, seeds, message) -> None:
    with pytest.raises(ValueError, match=message):
        render_clips(people, actions, places, seeds)


def test_captions_are_read_back() -> None:
    words = set(vocabulary())
    for place in range(len(PLACES)):
        for action in (None, *range(len(ACTIONS))):
            for variant in range(VARIANTS):
                for class_word in CLASS_WORDS:
                    prompt = caption(action, place, class_word=class_word, variant=variant)
                    assert parse(prompt) == (action, place)
                    assert set(prompt.replace(",", "").split()) <= words
    assert caption(0, 0) == "a person nods in the kitchen"
    assert parse("a person nods and jumps in the rain") == (None, None)
    with pytest.raises(IndexError):
        caption(len(ACTIONS), 0)


def test_examples_are_unseen_people_in_their_folders(tmp_path) -> None:
    rows = write_examples(tmp_path)
    assert all(seed >= 9_000_000 for _, seed in EXAMPLE_PEOPLE)
    assert [row["id"] for row in rows] == [name for name, _ in EXAMPLE_PEOPLE]
    for row in rows:
        assert 4 <= len(row["photos"]) <= 6
        assert all((tmp_path / photo).is_file() for photo in row["photos"])
