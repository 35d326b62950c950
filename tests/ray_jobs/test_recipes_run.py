"""Every production recipe goes from photo to published adapter, on tiny random-weight folders of the same classes.

The stages are called as plain objects, one after the other; Ray carries the same objects in `test_job.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from magicid import adapters, repository, schema, storage
from magicid.backbones import base_sha256, load_backbone
from magicid.clips import decode_mp4, pan_photo
from magicid.generation import Generator
from magicid.prompts import load_prompts
from magicid.recipe import Recipe
from magicid.repository import AdapterRef
from magicid.run import Run, training_uri
from magicid.schema import Clip, Identity, Pair, ScoredClip
from ray_jobs.customize import photo_examples
from ray_jobs.queue import Task
from ray_jobs.slot_worker import RAW_FILE, WEIGHTS_FILE, SlotWorker
from ray_jobs.stages import GenerateClips, ScoreIdentity, ScoreMotion, ScoreSemantics
from tests.rewards.folders import motion_folder, semantics_folder
from tests.tiny_models import tiny_hunyuan_folder, tiny_recipe, tiny_wan_folder

PHOTO = Path(__file__).parent.parent.parent / "examples" / "identities" / "ada" / "01.png"


def through(stage: object, rows: list[ScoredClip] | list[Clip], cls: type) -> list[ScoredClip]:
    """Rows through one stage, as Ray Data would pass them."""
    batch = pa.Table.from_pylist(schema.to_rows(rows), schema=schema.arrow_schema(cls))
    return [schema.from_row(ScoredClip, row) for row in stage(batch).to_pylist()]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["hunyuan-480p", "hunyuan-paper", "wan-480p"])
def test_a_production_recipe_runs_on_a_tiny_folder(name: str, tmp_path: Path) -> None:
    make = tiny_wan_folder if name.startswith("wan") else tiny_hunyuan_folder
    recipe = tiny_recipe(
        name,
        make(tmp_path / "video"),
        rewards__identity="world:identity",
        rewards__motion=str(motion_folder(tmp_path / "motion")),
        rewards__semantics=str(semantics_folder(tmp_path / "semantics")),
        rewards__semantics_frames=5,
        repository__base_clips=2,
        repository__trained_clips=1,
        sft__steps=2,
        sft__moving=1,
        hpo__steps=2,
        hpo__validate_every=2,
        hpo__learning_rate=1e-3,
        trainer__precision="float32",
    )
    run, base = Run(str(tmp_path / "run")), base_sha256(recipe)
    run.open(recipe, base)
    storage.write_bytes(run.path("identities/ada/photo-1.png"), PHOTO.read_bytes())
    ada = Identity("ada", "team", ["identities/ada/photo-1.png"], class_word="woman")
    prompts = load_prompts(recipe.prompts)
    settings = recipe.model_dump(mode="json")
    generate = GenerateClips(settings, run.location, "test")

    wanted = repository.base_clips(recipe, base, prompts, "woman") + repository.static_clips(recipe, base, ada)
    wanted += repository.moving_clips(recipe, base, ada)
    made = through(generate, wanted, Clip)
    for stage in (ScoreIdentity, ScoreMotion, ScoreSemantics):
        made = through(stage(settings, run.location, "test"), made, ScoredClip)
    for clip in made:
        assert clip.error is None
        assert clip.motion_error is None
        assert clip.semantics_error is None
    moving, _, still, panned = made
    assert still.motion_reward is not None
    assert panned.motion_reward is None, "it is for SFT alone"
    size = (recipe.sampling.frames, recipe.sampling.height, recipe.sampling.width)
    photo = pan_photo(np.asarray(Image.open(PHOTO).convert("RGB")), *size, panned.seed)
    assert torch.equal(load_latents(run, panned), generate.generator.backbone.encode_video(photo[None]))
    examples = photo_examples(made, ada)
    assert {example["clip_id"] for example in examples} == {still.clip_id, panned.clip_id}

    worker = SlotWorker(recipe, run, engine="torch")
    steps: list[int] = []
    payload = {"identity_id": "ada", "overrides": {}, "stage": "sft", "examples": examples}
    worker.train(Task("ada/sft", "team", 2, payload=payload), lambda step, metrics: steps.append(step))
    sft_uri = training_uri("ada", "sft", WEIGHTS_FILE)
    sft = AdapterRef(sft_uri, storage.sha256_bytes(storage.read_bytes(run.path(sft_uri))))
    trained = through(generate, repository.trained_clips(recipe, base, prompts, ada, sft), Clip)
    assert trained[0].error is None
    assert trained[0].latents_sha256 != moving.latents_sha256
    (copy,) = through(generate, repository.still_clips(trained), Clip)
    assert copy.error is None
    (unscored,) = through(ScoreMotion(settings, run.location, "test"), [copy], ScoredClip)
    assert unscored == copy
    frames, shown = (decode_mp4(storage.read_bytes(run.path(str(c.video_uri))))[0] for c in (trained[0], copy))
    assert shown.shape == frames.shape
    encoded = generate.generator.backbone.encode_video(np.repeat(frames[:1], len(frames), 0)[None])
    assert torch.equal(load_latents(run, copy), encoded)

    pair = Pair(
        "pair", "ada", "P_id", 0, moving.prompt, str(moving.text_uri),
        still.clip_id, still.kind, str(still.latents_uri), [0.9, 0.0, 5.0],
        moving.clip_id, moving.kind, str(moving.latents_uri), [0.1, 1.0, 5.0],
    )  # fmt: skip
    run.write("pairs/ada.parquet", [pair], Pair)
    payload = {"identity_id": "ada", "overrides": {}, "stage": "hpo"}
    worker.train(Task("ada/hpo", "team", 2, payload=payload), lambda step, metrics: steps.append(step))
    assert steps == [0, 1, 2, 0, 1, 2]
    log = storage.read_table(run.path(training_uri("ada", "hpo", "log.parquet")))
    assert log[-1]["step"] == 2
    validation = run.path(training_uri("ada", "hpo", "validation/step-000002.safetensors"))
    assert np.isfinite(storage.read_arrays(validation)["latents"]).all()
    before, after = (storage.read_arrays(run.path(training_uri("ada", s, RAW_FILE))) for s in ("sft", "hpo"))
    assert any(np.abs(after[key] - before[key]).max() > 0 for key in after if ".lora_B." in key)

    manifest = adapters.AdapterManifest(base, recipe.sha256, recipe.lora.rank, recipe.lora.alpha)
    weights = storage.read_bytes(run.path(training_uri("ada", "hpo", WEIGHTS_FILE)))
    published = adapters.publish(run.location, "ada", weights, manifest)
    assert plain_sample(recipe, published.location, moving).shape == load_latents(run, moving).shape


def load_latents(run: Run, clip: ScoredClip) -> torch.Tensor:
    """The kept latents of a clip, (1, C, F, H, W)."""
    return torch.from_numpy(storage.read_arrays(run.path(str(clip.latents_uri)))["latents"])[None]


def plain_sample(recipe: Recipe, adapter: str, clip: ScoredClip) -> torch.Tensor:
    """Latents of the clip's prompt by the pipeline class itself, the adapter loaded by its own `load_lora_weights`."""
    backbone = load_backbone(recipe)
    untouched = backbone.sample([clip.prompt], [clip.seed])
    backbone.pipeline.load_lora_weights(adapter)
    adapted = backbone.sample([clip.prompt], [clip.seed])
    assert (adapted - untouched).abs().max() > 0
    return adapted


def test_a_clip_that_fails_each_time_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe("hunyuan-480p", tiny_hunyuan_folder(tmp_path / "video"), repository__base_clips=2)
    run = Run(str(tmp_path / "run"))
    generator = Generator(recipe, run, job="one")
    bad, good = repository.base_clips(recipe, "base", load_prompts(recipe.prompts), "man")
    sample = generator.backbone.sample
    tries: list[int] = []

    def fails_for_one(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        if seeds == [bad.seed]:
            tries.append(1)
            raise RuntimeError("out of luck")
        return sample(prompts, seeds)

    monkeypatch.setattr(generator.backbone, "sample", fails_for_one)
    failed, made = generator.make([bad, good])
    assert len(tries) == recipe.repository.attempts == 3
    assert (failed.video_uri, failed.attempts, failed.error) == (None, 3, "failed 3 times: RuntimeError: out of luck")
    assert (made.error, made.attempts) == (None, 1)
    again = next(Generator(recipe, run, job="one").make([bad]))
    assert again.error == "given up after 3 tries: the process died each time — see its worker's log"
    mended = next(Generator(recipe, run, job="two").make([bad]))
    assert mended.error is None


def test_a_reward_that_fails_is_null_with_a_reason(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "hunyuan-480p",
        tiny_hunyuan_folder(tmp_path / "video"),
        repository__base_clips=2,
        rewards__motion=str(motion_folder(tmp_path / "motion")),
    )
    run, settings = Run(str(tmp_path / "run")), recipe.model_dump(mode="json")
    wanted = repository.base_clips(recipe, "base", load_prompts(recipe.prompts), "man")
    damaged, whole = through(GenerateClips(settings, run.location, "job"), wanted, Clip)
    Path(run.path(str(damaged.video_uri))).write_bytes(b"half a clip")
    failed, scored = through(ScoreMotion(settings, run.location, "job"), [damaged, whole], ScoredClip)
    assert failed.motion_reward is None
    assert "differs from its hash" in str(failed.motion_error)
    assert scored.motion_reward is not None
