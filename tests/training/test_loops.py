"""SFT and HPO as loops: resume, the pinned reference, kept reference errors, stopping on what is not finite."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny_backbone import LORA, SHAPE, MemoryPairs, TinyBackbone, hpo_settings, tiny_text, trainer_settings
from torch import Tensor

from magicid import recipe
from magicid.backbones.base import add_noise
from magicid.errors import NonFiniteLossError, ReferenceMovedError, StorageError, TrainingError
from magicid.training import lora
from magicid.training.checkpoint import CheckpointStore
from magicid.training.engine import Engine, create_engine
from magicid.training.hpo import LOGGED, train_hpo
from magicid.training.loop import Progress
from magicid.training.pairs import draw
from magicid.training.sft import train_sft

CLIPS = {f"photo{i}": torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3)}
TEXTS = {name: tiny_text("a") for name in CLIPS}
SFT = recipe.Sft.model_validate({"steps": 6, "learning_rate": 1e-2, "batch_size": 2})


class Killed(Exception):
    """Stands for the end of the process."""


def make(**changes: object) -> tuple[Engine, TinyBackbone, recipe.Trainer]:
    backbone, trainer = TinyBackbone(), trainer_settings(**changes)
    engine = create_engine(
        backbone.transformer, backbone.lora_target_modules(), LORA, trainer, kind="torch", device="cpu"
    )
    return engine, backbone, trainer


def kill_at(step: int):
    def hook(done: int) -> None:
        if done == step:
            raise Killed

    return hook


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def reference_of(engine: Engine) -> lora.LoraState:
    state = lora.initial_state(engine.shapes, 5)
    return {name: tensor + 0.05 for name, tensor in state.items()}


def test_hpo_resumes_bit_for_bit(tmp_path: Path) -> None:
    engine, backbone, trainer = make()
    settings, reference = hpo_settings(steps=7), reference_of(engine)
    whole = train_hpo(engine, backbone, MemoryPairs(), reference, settings, trainer, 6.0)
    store = CheckpointStore(str(tmp_path), "hpo")
    with pytest.raises(Killed):
        train_hpo(engine, backbone, MemoryPairs(), reference, settings, trainer, 6.0, store, on_step=kill_at(5))
    engine, backbone, trainer = make()  # another process
    steps: list[int] = []
    resumed = train_hpo(engine, backbone, MemoryPairs(), reference, settings, trainer, 6.0, store, on_step=steps.append)
    assert steps == [5, 6, 7]  # checkpoints every 2 steps: step 4 was the last
    assert equal(resumed.lora_state, whole.lora_state)
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]


def test_sft_resumes_bit_for_bit_and_learns(tmp_path: Path) -> None:
    engine, backbone, trainer = make()
    whole = train_sft(engine, backbone, CLIPS, TEXTS, SFT, trainer)
    store = CheckpointStore(str(tmp_path), "sft")
    with pytest.raises(Killed):
        train_sft(engine, backbone, CLIPS, TEXTS, SFT, trainer, store, on_step=kill_at(3))
    engine, backbone, trainer = make()
    resumed = train_sft(engine, backbone, CLIPS, TEXTS, SFT, trainer, store)
    assert equal(resumed.lora_state, whole.lora_state)
    longer = SFT.model_copy(update={"steps": 60})
    losses = [row["loss"] for row in train_sft(engine, backbone, CLIPS, TEXTS, longer, trainer).history]
    assert sum(losses[-15:]) < 0.97 * sum(losses[:15])


def test_sft_learns_each_clip_under_its_own_caption() -> None:
    engine, backbone, trainer = make()
    settings = SFT.model_copy(update={"steps": 1, "batch_size": 3})
    texts = {name: tiny_text(name) for name in CLIPS}
    (row,) = train_sft(engine, backbone, CLIPS, texts, settings, trainer).history
    engine, backbone, trainer = make()
    errors = {}
    for name, clean in CLIPS.items():
        drawn = draw(settings.seed, name, 0, clean.shape, trainer.shift)
        noise, sigma = drawn.noise[None], drawn.sigma[None]
        with torch.no_grad():
            velocity = backbone.predict_velocity(add_noise(clean[None], noise, sigma), sigma, texts[name], 1.0)
        errors[name] = float(((velocity - (noise - clean)) ** 2).mean())
    assert row["loss"] == pytest.approx(sum(errors.values()) / 3, rel=1e-5)
    for name in CLIPS:  # all three differ, so a caption at another clip would show
        (other,) = train_sft(engine, backbone, CLIPS, {**texts, name: tiny_text("other")}, settings, trainer).history
        assert other["loss"] != pytest.approx(row["loss"], rel=1e-5)


def test_hpo_goes_the_right_way_and_logs_everything() -> None:
    engine, backbone, trainer = make()
    rows: list[dict[str, float]] = []
    settings = hpo_settings(steps=40, beta=200.0, noise_draws=1, learning_rate=3e-3)
    reference = reference_of(engine)
    train_hpo(engine, backbone, MemoryPairs(), reference, settings, trainer, 6.0, on_log=rows.append)
    assert set(LOGGED) | {"step", "gradient_norm", "steps_per_second"} == set(rows[0])
    assert rows[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-7)
    assert rows[0]["gradient_factor"] == 0.5
    late = rows[-10:]
    assert sum(row["inside"] for row in late) > 0
    assert sum(row["accuracy"] for row in late) / 10 > 0.9
    margin = sum(
        (r["policy_loser"] - r["reference_loser"]) - (r["policy_winner"] - r["reference_winner"]) for r in late
    )
    assert margin > 0


def test_the_reference_is_computed_once_per_draw_and_never_moves() -> None:
    engine, backbone, trainer = make()
    reference = reference_of(engine)
    settings = hpo_settings(steps=6, batch_size=5, noise_draws=1)  # five pairs: all of them in every step
    train_hpo(engine, backbone, MemoryPairs(), reference, settings, trainer, 6.0)
    assert backbone.calls == 6 + 1
    frozen = {n: p.detach() for n, p in lora.parameters(backbone.transformer, lora.REFERENCE).items()}
    assert equal(frozen, reference)
    assert not any(p.requires_grad for p in lora.parameters(backbone.transformer, lora.REFERENCE).values())
    backbone.calls = 0
    fresh = settings.model_copy(update={"noise_draws": 0})
    train_hpo(engine, backbone, MemoryPairs(), reference, fresh, trainer, 6.0)
    assert backbone.calls == 12


def test_the_adapters_are_apart_and_switching_keeps_the_gradients_right() -> None:
    engine, backbone, _ = make()
    engine.reset(reference_of(engine), learning_rate=1e-3, weight_decay=0.0)
    engine.set_reference(lora.initial_state(engine.shapes, 0))  # B = 0: the base itself
    latents, text = torch.randn(1, *SHAPE), tiny_text("a")
    outputs = {}
    with torch.no_grad():
        for name in ("policy", "reference", "policy"):
            engine.use(name)  # type: ignore[arg-type]
            outputs.setdefault(name, backbone.predict_velocity(latents, torch.tensor([0.5]), text, 6.0))
        base = TinyBackbone().predict_velocity(latents, torch.tensor([0.5]), text, 6.0)
    assert torch.allclose(outputs["reference"], base, atol=1e-6)
    assert not torch.allclose(outputs["policy"], base, atol=1e-3)
    trainable = {name for name, p in backbone.transformer.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".policy." in name for name in trainable)


def test_another_reference_stops_a_resumed_run(tmp_path: Path) -> None:
    engine, backbone, trainer = make()
    reference, store = reference_of(engine), CheckpointStore(str(tmp_path), "hpo")
    train_hpo(engine, backbone, MemoryPairs(), reference, hpo_settings(steps=2), trainer, 6.0, store)
    moved = {name: tensor + 1e-6 for name, tensor in reference.items()}
    with pytest.raises(ReferenceMovedError, match="SFT adapter"):
        train_hpo(engine, backbone, MemoryPairs(), moved, hpo_settings(steps=4), trainer, 6.0, store)


def test_other_settings_or_pairs_stop_a_resumed_run(tmp_path: Path) -> None:
    engine, backbone, trainer = make()
    reference, store = reference_of(engine), CheckpointStore(str(tmp_path), "hpo")
    train_hpo(engine, backbone, MemoryPairs(), reference, hpo_settings(steps=2), trainer, 6.0, store)
    for settings, pairs in ((hpo_settings(beta=51.0), MemoryPairs()), (hpo_settings(), MemoryPairs(1, 1))):
        with pytest.raises(TrainingError, match="other settings"):
            train_hpo(engine, backbone, pairs, reference, settings, trainer, 6.0, store)
    # More steps of the same are no other settings.
    assert train_hpo(engine, backbone, MemoryPairs(), reference, hpo_settings(steps=3), trainer, 6.0, store).steps == 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_that_is_not_finite_takes_no_step_and_keeps_the_checkpoint(tmp_path: Path, checkpointing: bool) -> None:
    engine, backbone, trainer = make(gradient_checkpointing=checkpointing, checkpoint_every=1)
    store, reference = CheckpointStore(str(tmp_path), "hpo"), reference_of(engine)
    settings = hpo_settings(batch_size=1, static_share=0.4)
    broken = MemoryPairs(1, 3, broken={"id0"})  # the first P_id pair comes at the third or fourth step
    with pytest.raises(NonFiniteLossError, match="not finite"):
        train_hpo(engine, backbone, broken, reference, settings, trainer, 6.0, store)
    kept = store.load()
    assert kept is not None
    assert 0 < kept.step < 4
    assert equal(engine.lora_state(), kept.lora)


def test_validation_comes_when_due_with_the_policy_active() -> None:
    engine, backbone, trainer = make()
    seen: list[int] = []

    def validate(step: int) -> None:
        assert not torch.is_grad_enabled()
        seen.append(step)

    settings = hpo_settings(steps=5, validate_every=2)
    train_hpo(engine, backbone, MemoryPairs(), reference_of(engine), settings, trainer, 6.0, validate=validate)
    assert seen == [2, 4]


def test_a_kill_loses_no_validation_and_validation_draws_change_nothing(tmp_path: Path) -> None:
    engine, backbone, trainer = make()  # checkpoints every 2 steps
    settings, reference = hpo_settings(steps=5, validate_every=2), reference_of(engine)
    plain = settings.model_copy(update={"validate_every": 0})
    whole = train_hpo(engine, backbone, MemoryPairs(), reference, plain, trainer, 6.0)
    store, done = CheckpointStore(str(tmp_path), "hpo"), []

    def validate(step: int) -> None:
        torch.manual_seed(step)
        torch.randn(3)
        if step == 4 and 4 not in killed:
            killed.append(4)
            raise Killed
        done.append(step)

    killed: list[int] = []
    with pytest.raises(Killed):
        train_hpo(engine, backbone, MemoryPairs(), reference, settings, trainer, 6.0, store, validate=validate)
    engine, backbone, trainer = make()
    resumed = train_hpo(engine, backbone, MemoryPairs(), reference, settings, trainer, 6.0, store, validate=validate)
    assert done == [2, 4]
    assert equal(resumed.lora_state, whole.lora_state)


class Unsendable(Exception):
    """Pickles, but cannot be made again from its one argument."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class ThreadEngine:
    """The meeting of two workers, in threads."""

    world_size = 2
    barrier = threading.Barrier(2, timeout=10)
    board: ClassVar[list[object]] = [None, None]

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def gather(self, value: object) -> list[object]:
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values


@pytest.mark.parametrize("error", [StorageError("cannot read x", "look"), Unsendable("cannot ", "read x")])
def test_an_error_of_one_worker_is_raised_on_all(error: Exception) -> None:
    def work(rank: int) -> object:
        progress = Progress(ThreadEngine(rank), None, trainer_settings(), 0, settings_sha256="")  # type: ignore[arg-type]
        assert progress.together(lambda: rank * 10) == rank * 10

        def fails_on_the_second() -> int:
            if rank == 1:
                raise error
            return 0

        with pytest.raises((StorageError, TrainingError), match="cannot read x") as caught:
            progress.together(fails_on_the_second)
        return caught.type

    with ThreadPoolExecutor(2) as workers:
        kinds = list(workers.map(work, range(2)))
    assert kinds == [StorageError if isinstance(error, StorageError) else TrainingError] * 2


def test_bfloat16_follows_float32_with_float32_adapters() -> None:
    results = []
    for precision in ("float32", "bfloat16"):
        engine, backbone, trainer = make(precision=precision)
        if precision == "bfloat16":
            for module in backbone.transformer.modules():
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad and parameter.dtype == torch.float32:
                        parameter.data = parameter.data.bfloat16().float()
        results.append(train_sft(engine, backbone, CLIPS, TEXTS, SFT, trainer))
        assert all(tensor.dtype == torch.float32 for tensor in results[-1].lora_state.values())
    losses = [[row["loss"] for row in result.history] for result in results]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_wrong_lora_tensors_and_modules_are_errors() -> None:
    engine, _, _ = make()
    state = lora.initial_state(engine.shapes, 0)
    state.pop(sorted(state)[0])
    with pytest.raises(TrainingError, match="do not fit"):
        engine.reset(state, learning_rate=1e-3, weight_decay=0.0)
    with pytest.raises(TrainingError, match="no LoRA can be attached"):
        create_engine(TinyBackbone().transformer, ["nothing"], LORA, trainer_settings(), kind="torch", device="cpu")
    with pytest.raises(TrainingError, match="without gradients"):
        engine.step()
    with pytest.raises(TrainingError, match="no photo clips"):
        train_sft(engine, TinyBackbone(), {}, TEXTS, SFT, trainer_settings())
