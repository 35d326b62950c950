"""The metrics on clips whose motion, faces and labels are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from magicid import recipe, schema
from magicid.errors import BackboneError, RewardError
from magicid.evaluation.metrics import COLUMNS, Metrics, Sample
from magicid.evaluation.metrics.actions import ActionMetrics
from magicid.evaluation.metrics.clip import ClassifierEmbedder, ClipEmbedder, EmbeddingMetrics
from magicid.evaluation.metrics.faces import FaceMetrics
from magicid.evaluation.metrics.flicker import temporal_flickering, warp_error
from magicid.evaluation.metrics.motion import (
    MotionMetrics,
    dis_flow,
    dynamic_magnitude,
    is_dynamic,
    raft_flow,
    top_mean,
)
from magicid.evaluation.metrics.pose import LENGTHS, PoseMetrics, head_motion, head_motion_columns, landmark_pose
from magicid.evaluation.metrics.video import I3DEmbedder, VideoMetrics, frechet_distance
from magicid.world.classifier import ActionPlaceClassifier
from magicid.world.language import caption
from tests.rewards.folders import identity_folder, motion_folder


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
        actions, places = np.full((len(frames_BFHWC), 8), 0.5 / 7), np.full((len(frames_BFHWC), 8), 0.6 / 7)
        actions[:, 2], places[:, 3] = 0.5, 0.4
        return actions, places


class KnownEmbedder:
    """The unit vector at the angle of the first pixel's red, in degrees; the prompt is at 0 degrees."""

    def images(self, images):
        degrees = np.radians([float(image[0, 0, 0]) for image in images])
        return np.stack([np.cos(degrees), np.sin(degrees)], 1)

    def text(self, prompt):
        return np.array([1.0, 0.0])


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


def faces(**more) -> FaceMetrics:
    return FaceMetrics(KnownFaces(), **more)  # type: ignore[arg-type]


# ---- motion and flicker ---------------------------------------------------------------------------------------------


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


def test_a_clip_is_dynamic_by_vbench_rule() -> None:
    # 61 frames of 24 fps at 720 px are thinned to 21: 5 of 20 pairs above 16.875 px
    tops = np.zeros(20)
    tops[:5] = 16.9
    assert is_dynamic(tops, 21, 720)
    tops[0] = 16.87
    assert not is_dynamic(tops, 21, 720)
    assert is_dynamic(np.array([6.1, 0, 0]), 4, 256)
    assert not is_dynamic(np.zeros(1), 2, 256)  # where the rule asks for no pair at all


def test_known_flow_gives_known_motion_columns() -> None:
    def flow(frames):  # 8 px to the right everywhere, in frames of 128 px
        return np.tile(np.float32([8, 0]), (len(frames) - 1, 128, 128, 1))

    frames = moving_texture(7, 0)
    still, fast = (MotionMetrics(f).measure([Sample(frames, 8)])[0] for f in (None, flow))
    assert still["dynamic_degree"] == 0
    assert still["warp_error"] == pytest.approx(0, abs=0.05)
    assert fast["dynamic_degree"] == 1  # 8 px above 6 * 128 / 256
    assert fast["dynamic_magnitude"] == pytest.approx(16)
    assert fast["warp_error"] > 5  # the flow explains nothing here


def test_raft_comes_from_a_folder(tmp_path) -> None:
    flow = raft_flow(motion_folder(tmp_path / "raft"), updates=1)
    assert flow(moving_texture(3, 1.0)).shape == (2, 128, 128, 2)
    with pytest.raises(RewardError, match="cannot load the motion model"):
        raft_flow(tmp_path)


def test_flicker_by_hand() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1] = 51
    assert temporal_flickering(frames) == pytest.approx(1 - 51 / 255)
    assert temporal_flickering(frames[:1].repeat(2, 0)) == 1
    assert warp_error(frames, np.zeros((2, 8, 8, 2))) == pytest.approx(51)


def test_what_motion_explains_is_no_warp_error() -> None:
    ramp = np.arange(16, dtype=np.uint8)[None, :, None] * np.ones((16, 1, 3), np.uint8) * 10
    frames = np.stack([ramp, np.roll(ramp, 1, axis=1)])
    right = np.tile(np.float32([1, 0]), (1, 16, 16, 1))
    assert warp_error(frames, right) == pytest.approx(0, abs=1e-4)
    assert warp_error(frames, 0 * right) == pytest.approx((15 * 10 + 150) / 16)


# ---- head pose ------------------------------------------------------------------------------------------------------


def test_head_motion_is_the_path_per_second() -> None:
    poses = np.zeros((9, 6))
    poses[:, 0] = 0.1 * np.arange(9)  # to the right, 0.1 half heads a frame
    assert head_motion(poses, 8) == pytest.approx(0.8)
    poses[:, 2] = 0.2 * np.arange(9)  # and the head turns
    assert head_motion(poses, 8) == pytest.approx(8 * math.hypot(0.1, 0.2 * LENGTHS[2]))


def test_jitter_is_no_head_motion() -> None:
    poses = np.zeros((13, 6))
    poses[::2, 1] = 0.3
    assert head_motion(poses, 8) == pytest.approx(0)


def test_heads_that_are_not_seen_are_bridged_or_make_a_null() -> None:
    poses = np.zeros((9, 6))
    poses[:, 0] = 0.1 * np.arange(9)
    poses[3:5] = np.nan
    assert head_motion_columns(poses, 8)["head_motion"] == pytest.approx(0.8)
    poses[1:7] = np.nan
    assert "seen in 3 of 9 frames" in head_motion_columns(poses, 8)["error"]
    assert "error" in head_motion_columns(np.zeros((4, 6)), 8)


def test_poses_are_looked_for_in_thinned_frames() -> None:
    class Estimator:
        def poses(self, frames):
            rows = np.zeros((*frames.shape[:2], 6), np.float32)
            rows[..., 0] = 0.01 * frames[:, :, 0, 0, 0]
            return rows

    frames = angles(*range(0, 60, 2))  # 30 frames, 0.02 each
    slow, fast = PoseMetrics(Estimator()).measure([Sample(frames, 8), Sample(frames, 24)])  # type: ignore[arg-type]
    assert slow["head_motion"] == pytest.approx(0.02 * 8, rel=1e-4)
    assert fast["head_motion"] == pytest.approx(0.02 * 24, rel=1e-4)


def test_landmarks_give_a_pose() -> None:
    face = np.float64([[-20, -20], [20, -20], [0, 0], [-15, 20], [15, 20]])
    straight = landmark_pose(face + 100)
    assert straight[:2] == pytest.approx([100, 100])
    assert straight[2] == pytest.approx(0, abs=1e-9)
    assert math.exp(straight[5]) == pytest.approx(60)
    turned = face.copy()
    turned[2, 0] = 8
    assert landmark_pose(turned)[2] > 0.3
    c, s = math.cos(0.3), math.sin(0.3)
    tilted = landmark_pose(face @ np.array([[c, s], [-s, c]]))
    assert tilted[4] == pytest.approx(0.3)
    assert tilted[2] == pytest.approx(0, abs=1e-9)


# ---- faces ----------------------------------------------------------------------------------------------------------


def test_face_metrics_by_hand() -> None:
    (row,) = faces().measure([Sample(angles(0, 90, 255, 255), 8, "", REFERENCES)])
    assert row["face_sim"] == pytest.approx(0.5, abs=1e-6)
    assert row["face_sim_missing0"] == pytest.approx(0.25, abs=1e-6)
    assert row["face_detect_rate"] == 0.5


def test_sixteen_evenly_spaced_frames_are_looked_at() -> None:
    frames = angles(*([255] * 31))
    frames[::2, 0, 0, 0] = 60  # every second frame: exactly the sixteen
    (row,) = faces().measure([Sample(frames, 8, "", REFERENCES[:1])])
    assert (row["face_sim"], row["face_detect_rate"]) == (pytest.approx(0.5, abs=1e-6), 1.0)


def test_a_clip_without_a_face_is_null_with_a_reason() -> None:
    row = Metrics([faces(), MotionMetrics()]).measure(angles(255, 255), 8, "", REFERENCES)
    assert (row["face_sim"], row["face_sim_missing0"], row["face_detect_rate"]) == (None, 0.0, 0.0)
    assert row["error"] == "face_sim: no face was found in any frame"
    assert row["dynamic_magnitude"] is not None


def test_several_threads_give_the_same_in_order() -> None:
    samples = [Sample(angles(a, a), 8, "", REFERENCES[:1]) for a in (0, 30, 60, 90)]
    rows = faces(threads=3).measure(samples)
    assert [row["face_sim"] for row in rows] == pytest.approx(np.cos(np.radians([0, 30, 60, 90])), abs=1e-6)


# ---- actions, embeddings, sets of clips -----------------------------------------------------------------------------


def test_prompt_score_is_the_probability_of_the_prompts_action_and_place() -> None:
    metrics = Metrics([ActionMetrics(KnownClassifier())])  # type: ignore[arg-type]
    right, wrong, unknown = metrics.measure_many(
        [
            Sample(angles(0, 0), 8, caption(2, 3, class_word="man", variant=1)),
            Sample(angles(0, 0), 8, caption(1, 3)),
            Sample(angles(0, 0, 0), 8, "a person juggles"),
        ]
    )
    assert (right["prompt_score"], right["action"], right["place"]) == (pytest.approx(0.5 * 0.4), 1, 1)
    assert (wrong["prompt_score"], wrong["action"], wrong["place"]) == (pytest.approx(0.5 / 7 * 0.4), 0, 1)
    assert (unknown["prompt_score"], unknown["action"]) == (None, None)
    assert "names no single action and place" in unknown["error"]


def test_embeddings_by_hand() -> None:
    photos = [angles(0)[0], angles(60)[0]]
    sample = Sample(angles(0, 60, 60), 8, "words", photos=photos)
    (row,) = EmbeddingMetrics(KnownEmbedder()).measure([sample])
    assert row["temporal_consistency"] == pytest.approx((0.5 + 1) / 2)
    assert row["clip_t"] == pytest.approx(100 * (1 + 0.5 + 0.5) / 3)
    assert row["clip_i"] == pytest.approx(100 * np.mean([1, 0.5, 0.5, 1, 0.5, 1]))
    (bare,) = EmbeddingMetrics(KnownEmbedder()).measure([Sample(angles(0, 60), 8)])
    assert set(bare) == {"temporal_consistency"}


def test_the_classifiers_features_make_a_frame_embedding() -> None:
    torch.manual_seed(0)
    embedder = ClassifierEmbedder(ActionPlaceClassifier(width=4))
    frames = moving_texture(3, 4.0, size=96)
    vectors = embedder.images([*frames, frames[0]])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert vectors[0] @ vectors[3] == pytest.approx(1, abs=1e-5)
    assert embedder.text("x") is None


def test_clip_comes_from_a_folder(tmp_path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from magicid.world.text_encoders import clip_tokenizer

    tokenizer = clip_tokenizer(["a", "person", "nods"])
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(tmp_path)
    embedder = ClipEmbedder.from_pretrained(tmp_path)
    frames = moving_texture(2, 3.0, size=64)
    vectors, prompt = embedder.images(list(frames)), embedder.text("a person nods")
    assert vectors.shape == (2, 8)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(2), abs=1e-5)
    assert np.linalg.norm(prompt) == pytest.approx(1, abs=1e-5)
    (row,) = EmbeddingMetrics(embedder).measure([Sample(frames, 8, "a person nods", photos=[frames[0]])])
    assert row["clip_t"] == pytest.approx(100 * float((vectors @ prompt).mean()), abs=1e-3)
    assert row["clip_i"] == pytest.approx(100 * (1 + float(vectors[0] @ vectors[1])) / 2, abs=1e-3)
    with pytest.raises(RewardError, match="cannot load CLIP"):
        ClipEmbedder.from_pretrained(tmp_path / "absent")


@pytest.mark.filterwarnings("ignore:a Fréchet distance")
def test_frechet_distance_of_known_sets() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + np.float64([3, 0, 4])) == pytest.approx(25)
    assert frechet_distance(a, 2 * a - a.mean(0)) == pytest.approx(np.trace(np.cov(a.T)))  # (s - 2 s)^2 along each axis
    one, other = np.array([[0.0], [2.0]]), np.array([[0.0], [6.0]])  # variances 2 and 18, means 1 and 3
    assert frechet_distance(one, other) == pytest.approx(4 + 2 + 18 - 2 * math.sqrt(36))
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(a, a[:, :2])


def test_few_clips_make_the_distance_say_so() -> None:
    with pytest.warns(UserWarning, match="from 9 and 400 clips is biased"):
        frechet_distance(np.random.default_rng(0).normal(size=(9, 2)), np.random.default_rng(1).normal(size=(400, 2)))


class TinyI3D(torch.nn.Module):
    """Called as the usual I3D file is; its features are the mean of each channel."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale
        assert resize
        assert return_features
        return x.mean((2, 3, 4)) / 255


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_i3d_comes_from_a_folder(tmp_path) -> None:
    torch.jit.save(torch.jit.script(TinyI3D()), str(tmp_path / "i3d_torchscript.pt"))
    frames = np.zeros((10, 8, 8, 3), np.uint8)
    frames[..., 1] = 51
    few, whole = VideoMetrics(I3DEmbedder.from_pretrained(tmp_path)).measure([Sample(frames[:9], 8), Sample(frames, 8)])
    assert whole["video_features"] == pytest.approx([0, 0.2, 0])
    assert few == {"error": "video_features: fewer than 10 frames"}
    with pytest.raises(RewardError, match=r"0 \.pt files"):
        I3DEmbedder.from_pretrained(tmp_path / "absent")


# ---- all together ---------------------------------------------------------------------------------------------------


def test_the_row_is_what_the_schema_wants() -> None:
    values = Metrics([]).measure(moving_texture(4, 1.0)[:, :64], 8, "")
    assert (values["fps"], values["frames"], values["height"], values["width"]) == (8, 4, 64, 128)
    assert {values[name] for name in (*COLUMNS, "error")} == {None}
    common = {"clip_id": "c", "identity_id": "ann", "method": "hpo", "prompt": "", "seed": 1, "video_uri": None}
    row = schema.from_row(schema.MetricRow, {**values, **common})
    assert {name: value for name, value in dataclasses.asdict(row).items() if name in {**values, **common}} == {
        **values,
        **common,
    }
    with pytest.raises(RewardError, match="uint8 RGB"):
        Metrics([]).measure(np.zeros((2, 8, 8)), 8, "")


def test_one_clip_that_fails_takes_nothing_from_the_others() -> None:
    class Brittle:
        columns = ("clip_t",)

        def measure(self, samples):
            if any(sample.prompt == "bad" for sample in samples):
                raise RuntimeError("kernel")
            return [{"clip_t": 1.0} for _ in samples]

    good, bad = Metrics([Brittle()]).measure_many([Sample(angles(0), 8, "good"), Sample(angles(0), 8, "bad")])
    assert (good["clip_t"], good["error"]) == (1.0, None)
    assert (bad["clip_t"], bad["error"]) == (None, "clip_t: kernel")


def test_from_recipe_loads_what_the_recipe_names(tmp_path) -> None:
    folder = identity_folder(tmp_path / "metric")
    (tmp_path / "classifier").mkdir()
    ActionPlaceClassifier(width=4).save_pretrained(tmp_path / "classifier")
    raft = str(motion_folder(tmp_path / "raft"))
    settings = {
        "identity": str(folder),
        "classifier": str(tmp_path / "classifier"),
        "pose": "landmarks",
        "motion": raft,
    }
    settings = {f"evaluation.{key}": value for key, value in settings.items()}
    metrics = Metrics.from_recipe(recipe.load("face-world", settings))
    frames = np.zeros((13, 48, 48, 3), np.uint8)
    row = metrics.measure(frames, 8, caption(0, 0), np.eye(12, dtype=np.float32), [frames[0]])
    assert 0 < row["prompt_score"] < 1
    assert (row["face_sim"], row["face_detect_rate"], row["head_motion"]) == (None, 0.0, None)
    assert row["temporal_consistency"] == pytest.approx(1, abs=1e-5)
    assert row["clip_i"] == pytest.approx(100, abs=1e-3)
    assert len(row["video_features"]) == 16
    assert metrics.looks_at_photos
    empty = Metrics.from_recipe(recipe.load("wan-480p", {"evaluation.identity": "", "evaluation.motion": ""}))
    assert (empty.faces, len(empty.parts)) == (None, 1)


@pytest.mark.parametrize("key", ["identity", "motion"])
def test_the_rewards_own_network_is_refused(tmp_path, key) -> None:
    folder = str(identity_folder(tmp_path / "identity"))
    with pytest.raises(RewardError, match="reward's own network"):
        Metrics.from_recipe(recipe.load("face-world", {f"evaluation.{key}": folder, f"rewards.{key}": folder}))


def test_folders_that_cannot_be_loaded_are_named(tmp_path) -> None:
    with pytest.raises(BackboneError, match="no model folder"):
        Metrics.from_recipe(recipe.load("face-world", {"evaluation.identity": str(tmp_path / "absent")}))
    for key, what in (("classifier", "classifier"), ("pose", "pose regressor")):
        settings = {"evaluation.identity": "", "evaluation.pose": "", f"evaluation.{key}": str(tmp_path)}
        with pytest.raises(RewardError, match=f"cannot load the {what}"):
            Metrics.from_recipe(recipe.load("face-world", settings))
