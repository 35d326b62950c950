"""One study, from the people to the rows: SFT, repository, selection, preference training, held-out clips."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from magicid import schema, storage, weights
from magicid.backbones import load_backbone
from magicid.errors import RecipeError
from magicid.laboratory.clips import Bank, Sampler, TextBank
from magicid.laboratory.measuring import Measuring
from magicid.laboratory.methods import TOKENS_COUNT, TOKENS_RATE, Plan, Variant
from magicid.laboratory.pairs import BASE_REFERENCE, make_pairs
from magicid.laboratory.people import CLASS_WORD, SEED, heldout_prompts, people
from magicid.laboratory.population import Stack, StackedLora, take
from magicid.laboratory.repositories import Owner, Repositories, Repository, Say, Start, captions_of
from magicid.laboratory.rows import Asked, Rows
from magicid.laboratory.training import Preference, train_hpo, train_sft
from magicid.prompts import for_class, load_prompts
from magicid.recipe import Recipe
from magicid.rewards.dynamics import MotionReward
from magicid.schema import MetricRow
from magicid.training.tokens import TOKENS, first_tokens
from magicid.world import language
from magicid.world.renderer import render_clips, sample_people

SEEDED = ("repository", "sft", "hpo")  # sections whose seeds differ from one training to the next
TRUE_SEED = 700_000  # of the renderer's clips of training prompts: far from those of held-out clips


class Study:
    """A plan on its way. Finished rows lie in `out` and are not made again, nor is what only leads to them.

    Args:
        recipe: whose settings every variant starts from.
        out: folder of the rows, one file for each method, setting and step.
        say: told how far it is.
    """

    def __init__(
        self, plan: Plan, recipe: Recipe, measuring: Measuring, out: Path, device: str = "cpu", say: Say = print
    ) -> None:
        self.plan, self.recipe, self.measuring, self._say = plan, recipe, measuring, say
        self.device = torch.device(device)
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing changes on a CPU
        backbone: Any = load_backbone(recipe, parts=("transformer", "vae", "text"), device=device)
        backbone.transformer.requires_grad_(False)
        backbone.transformer.eval()
        adapters = StackedLora(
            backbone.transformer,
            str(backbone.lora_target_modules()),
            rank=recipe.lora.rank,
            scale=recipe.lora.alpha / recipe.lora.rank,
        )
        self.sampler = Sampler(backbone, adapters, TextBank(backbone, self.device), self.device)
        rewards = recipe.rewards
        motion = MotionReward.from_pretrained(weights.resolve(rewards.motion), device, rewards.motion_window)
        self.bank = Bank(motion, recipe.sampling.fps)
        self.training = [for_class(p.text, CLASS_WORD) for p in load_prompts(recipe.prompts) if p.split == "training"]
        heldout = heldout_prompts(recipe, plan.group)
        if len(heldout) < plan.prompts:
            raise ValueError(f"{plan.prompts} prompts are wanted, half of the set has {len(heldout)}")
        self.prompts = heldout[: plan.prompts]
        self.seeds = [recipe.evaluation.seed + i for i in range(plan.prompts)]
        self.people = people(plan.group, plan.people)
        self.looks = sample_people(plan.people, SEED + {"dev": 0, "test": 1}[plan.group])
        found = measuring.references([person.photos for person in self.people])
        self.references = {person.name: both for person, both in zip(self.people, found)}
        rates = plan.sft_rates or (recipe.sft.learning_rate,)
        self.owners = [Owner(p, seed, rate) for rate in rates for p in self.people for seed in plan.train_seeds]
        self.repositories = Repositories(
            recipe, self.sampler, self.bank, measuring, self.training,
            {name: reward for name, (reward, _) in self.references.items()}, self.owners, say,
        )  # fmt: skip
        self.rows = Rows(
            out, measuring, {name: metric for name, (_, metric) in self.references.items()}, fps=recipe.sampling.fps,
            base_sha256=backbone.base_sha256, suffix="seed" + "-".join(map(str, plan.train_seeds)),
        )  # fmt: skip

    # ---- the whole --------------------------------------------------------------------------------------------

    def run(self) -> list[MetricRow]:
        """What is missing of the plan; returns all its rows.

        Raises:
            RecipeError: the folder holds rows of other settings.
        """
        self.rows.folder.mkdir(parents=True, exist_ok=True)
        self._same_settings()
        self._base()
        static = [self.sampler.static(owner.person.photos) for owner in self.owners]
        trained = self._self_reconstruction(static)
        if self.plan.frames_steps:
            self._sft("dreambooth", [latents[:, :, :1] for latents in static], self.plan.frames_steps)
        if self.plan.tokens_steps:
            self._sft("magicme", static, self.plan.tokens_steps)
        if self.plan.true_steps:
            self._true_clips(self.plan.true_steps)
        missing = [variant for variant in self.plan.variants if not self._is_measured(variant)]
        repositories = {start: self.repositories.make(start, trained[start], static) for start in self._starts(missing)}
        once = [variant for variant in missing if not variant.twice]
        # A GPU has room for all; on a CPU nothing is gained by it, and a variant that is finished stays.
        for variants in [once] if self.device.type == "cuda" else [[variant] for variant in once]:
            self._preferences(variants, trained, repositories, self.plan.hpo_steps)
        for variant in missing:
            if variant.twice:
                self._two_rounds(variant, trained, repositories, static)
        return self.rows.read()

    def _same_settings(self) -> None:
        """Refuse a folder whose rows were made with other settings; seeds differ from one training to the next."""
        sections = {**self.recipe.model_dump(mode="json"), "base_sha256": self.rows.base_sha256}
        for name in SEEDED:
            sections[name] = {key: value for key, value in sections[name].items() if key != "seed"}
        mine, file = storage.sha256_json(sections), str(self.rows.folder / "settings.json")
        if not storage.exists(file):
            storage.write_json(file, {"sha256": mine})
        elif storage.read_json(file)["sha256"] != mine:
            raise RecipeError(f"{self.rows.folder} holds rows of other settings or another base", "name another folder")

    def _start(self, variant: Variant) -> Start:
        sft = self._settings(variant).sft
        return Start(sft.moving, sft.captions, sft.steps)

    def _starts(self, variants: Sequence[Variant]) -> list[Start]:
        return sorted({self._start(variant) for variant in variants})

    def _is_measured(self, variant: Variant) -> bool:
        start = self._settings(variant).sft.steps
        steps = [start + max(self.plan.hpo_steps)] if variant.twice else [start + n for n in self.plan.hpo_steps]
        return all(file.exists() for step in steps for file in self._files(variant.method, variant.setting, step))

    def _settings(self, variant: Variant) -> Recipe:
        return self.recipe.with_overrides(dict(variant.overrides))

    # ---- stages -----------------------------------------------------------------------------------------------

    def _base(self) -> None:
        """Held-out clips of the base model, and the renderer's own of the same people and prompts: the truth."""
        frames = self.sampler.decode(self.sampler.sample(None, self.prompts, self.seeds))
        for person in self.people:
            clips = [Asked(person, 0, self.prompts[i], self.seeds[i], f) for i, f in enumerate(frames)]
            self.rows.measure("base", "", 0, clips, person.name)
        asked = [language.parse(prompt) for prompt in self.prompts]
        known = [(i, a, p) for i, (a, p) in enumerate(asked) if a is not None and p is not None]
        for person, look in zip(self.people, self.looks):
            rows, actions, places = zip(*known)
            made = render_clips(np.repeat(look[None], len(rows), 0), actions, places, [self.seeds[i] for i in rows])
            clips = [Asked(person, 0, self.prompts[i], self.seeds[i], f) for i, f in zip(rows, made.frames)]
            self.rows.measure("renderer", "", 0, clips, person.name)

    def _self_reconstruction(self, static: Sequence[torch.Tensor]) -> dict[Start, Stack]:
        """SFT on photos held still under one caption, the paper's, and all others that variants begin with."""
        starts, found = self._starts(self.plan.variants), dict[Start, Stack]()
        for moving, captions in sorted({(0, False), *((start.moving, start.captions) for start in starts)}):
            copies = [self.sampler.moving(o.person.photos, moving) for o in self.owners] if moving else []
            clips = [torch.cat(both) for both in zip(static, copies)] if moving else static
            mine = [start for start in starts if (start.moving, start.captions) == (moving, captions)]
            method = Start(moving, captions, 0).method
            trained = self._sft(method, clips, self.plan.sft_steps, [start.steps for start in mine], captions)
            found |= {start: trained[start.steps] for start in mine}
        return found

    def _true_clips(self, at: Sequence[int]) -> None:
        """Self-reconstruction of the renderer's clips of each person doing the training prompts, as many as V_t has.

        Nobody has such clips of a person: it shows what an adapter of this base model can be when it is given all.
        """
        count, names = self.recipe.repository.trained_clips, [person.name for person in self.people]
        known = [(p, *pair) for p in self.training if None not in (pair := language.parse(p))]
        prompts, actions, places = zip(*(known[i % len(known)] for i in range(count)))
        clips = []
        for owner in self.owners:
            look = self.looks[names.index(owner.person.name)]
            seeds = [self.recipe.repository.seed + TRUE_SEED + owner.seed * count + i for i in range(count)]
            made = render_clips(np.repeat(look[None], count, 0), actions, places, seeds)
            clips.append(self.sampler.backbone.encode_video(made.frames))
        self._sft("true_clips", clips, at, prompts=prompts)

    def _sft(
        self,
        method: str,
        static: Sequence[torch.Tensor],
        at: Sequence[int],
        starts: Sequence[int] = (),
        captions: bool = False,
        prompts: Sequence[str] = (),
    ) -> dict[int, Stack]:
        """Train and measure, or find it done; returns at least the adapters that preference training starts from."""
        at = sorted({*at, *starts})
        rates = list(dict.fromkeys(owner.rate for owner in self.owners))
        settings = {rate: f"sft.learning_rate={rate:g}" if self.plan.sft_rates else "" for rate in rates}
        kept = self.rows.folder / f"{method}-{self.rows.suffix}.safetensors"
        files = [f for setting in settings.values() for step in at for f in self._files(method, setting, step)]
        if all(file.exists() for file in [kept, *files]):
            flat = safetensors.torch.load_file(kept, device=str(self.device))
            found = {s: {key[5:]: flat[key] for key in flat if key.startswith(f"{s:04d}/")} for s in starts}
            if all(found.values()):  # an earlier call may have wanted other starts
                return found
        told = [
            prompts or captions_of(self.recipe, owner.person, len(clips), captions)
            for owner, clips in zip(self.owners, static)
        ]
        fresh = self._fresh_tokens(told[0][0]) if method == "magicme" else self._fresh_adapters()
        trained = train_sft(
            self.sampler, fresh, static, told, self.recipe.sft, self.recipe.trainer.shift, at,
            self._tick, [TOKENS_RATE if method == "magicme" else owner.rate for owner in self.owners],
        )  # fmt: skip
        safetensors.torch.save_file({f"{s:04d}/{k}": v.cpu() for s in starts for k, v in trained[s].items()}, kept)
        for step, weights_ in trained.items():
            for rate, setting in settings.items():
                members = [k for k, owner in enumerate(self.owners) if owner.rate == rate]
                self._held_out(method, setting, step, take(weights_, members), members)
        self._keep()
        return trained

    def _fresh_adapters(self) -> Stack:
        return self.sampler.adapters.initial([owner.seed for owner in self.owners], self.device)

    def _fresh_tokens(self, caption: str) -> Stack:
        text = self.sampler.text([caption])
        return {TOKENS: torch.stack([first_tokens(text, TOKENS_COUNT, o.seed) for o in self.owners]).to(self.device)}

    def _preferences(
        self,
        variants: Sequence[Variant],
        trained: Mapping[Start, Stack],
        repositories: Mapping[Start, list[Repository]],
        at: Sequence[int],
        before: int = 0,
    ) -> Stack | None:
        """Train variants of all adapters in one batch and measure them.

        Args:
            trained, repositories: where each start is, adapter by adapter.
            at: preference steps to measure after, beyond `before`, which are behind `trained` already.

        Returns:
            All adapters of all variants after the last step; None if somebody has no pairs.
        """
        trainings: list[tuple[Variant, Start, int]] = []  # variant, start, adapter
        preferences: list[Preference] = []
        for variant in variants:
            settings = self._settings(variant)
            start = self._start(variant)
            for k, repository in enumerate(repositories[start]):
                owner = repository.owner
                if owner.rate != settings.sft.learning_rate:
                    continue
                foreign = [
                    clip
                    for other in repositories[start]
                    if (other.owner.seed, other.owner.rate) == (owner.seed, owner.rate) and other is not repository
                    for clip in other.clips
                    if clip.kind == schema.TRAINED_CLIP
                ]
                pairs = make_pairs(variant, owner.person.name, repository.clips, foreign, settings.selection)
                if not pairs:
                    self._say(f"{variant.method} {variant.setting}: {owner.person.name} has no pairs")
                    continue
                trainings.append((variant, start, k))
                draws = {"seed": settings.hpo.seed + before}  # a second round is no copy of the first
                preferences.append(Preference(pairs, settings.hpo.model_copy(update=draws)))
        if not preferences:
            return None
        rows = [take(trained[start], [k]) for _, start, k in trainings]
        fresh = self._fresh_adapters()  # they change nothing yet: the base model
        frozen = [
            take(fresh, [k]) if BASE_REFERENCE in variant.readings else row
            for (variant, _, k), row in zip(trainings, rows)
        ]
        begin, reference = ({name: torch.cat([row[name] for row in x]) for name in rows[0]} for x in (rows, frozen))
        self._say(f"preference training of {len(preferences)} adapters")
        made = train_hpo(
            self.sampler, begin, reference, preferences, self.bank, self.recipe.sampling.guidance_scale,
            self.recipe.trainer.shift, at, self._tick,
        )  # fmt: skip
        for steps, population in made.items():
            for variant in variants:
                members = [(i, k) for i, (v, _, k) in enumerate(trainings) if v is variant]
                if members:
                    behind = self._start(variant).steps + before
                    own = take(population, [i for i, _ in members])
                    adapters = [k for _, k in members]
                    self._held_out(variant.method, variant.setting, behind + steps, own, adapters)
        self._keep()
        return made[max(at)] if len(preferences) == len(variants) * len(self.owners) else None

    def _two_rounds(
        self,
        variant: Variant,
        trained: Mapping[Start, Stack],
        repositories: Mapping[Start, list[Repository]],
        static: Sequence[torch.Tensor],
    ) -> None:
        """Half of the steps; then clips, rewards and pairs of what they made, from which the other half goes on."""
        start, steps = self._start(variant), max(self.plan.hpo_steps)
        first = self._preferences([variant], trained, repositories, [steps // 2])
        if first is not None:
            second = self.repositories.make(start._replace(steps=start.steps + steps // 2), first, static)
            self._preferences([variant], {start: first}, {start: second}, [steps - steps // 2], steps // 2)

    # ---- clips ------------------------------------------------------------------------------------------------

    def _held_out(
        self,
        method: str,
        setting: str,
        step: int,
        population: Stack,
        members: Sequence[int] | None = None,
    ) -> None:
        """Sample the held-out prompts from adapters and begin to measure them; longer clips from the first ones."""
        owners = [self.owners[k] for k in (members if members is not None else range(len(self.owners)))]
        for frames, file in zip(self._lengths(method, setting, step), self._files(method, setting, step)):
            if file.exists():
                continue
            prompts = self.prompts if frames is None else self.prompts[: max(1, len(self.prompts) // 4)]
            seeds = self.seeds[: len(prompts)]
            clips = self.sampler.decode(self.sampler.sample(population, prompts, seeds, frames=frames))
            whose = [(o, i) for o in owners for i in range(len(prompts))]
            asked = [Asked(o.person, o.seed, prompts[i], seeds[i], f) for (o, i), f in zip(whose, clips)]
            self.rows.measure(method, setting, step, asked, self._key(frames))
        self.rows.collect()

    def _keep(self) -> None:
        """Write what is finished before hours of other training; a GPU is through in minutes and goes on meanwhile."""
        self.rows.collect(wait=self.device.type == "cpu")

    def _lengths(self, method: str, setting: str, step: int) -> list[int | None]:
        """In how many frames clips are sampled: None, the recipe's, and at the end of some methods others too."""
        return [None, *(self.plan.lengths if not setting and step == self._longest(method) else ())]

    def _key(self, frames: int | None) -> str:
        return f"{frames}frames-{self.rows.suffix}" if frames else self.rows.suffix

    def _files(self, method: str, setting: str, step: int) -> list[Path]:
        """The files of rows after a step, one for each of `_lengths`."""
        lengths = self._lengths(method, setting, step)
        return [self.rows.file(method, setting, step, self._key(frames)) for frames in lengths]

    def _longest(self, method: str) -> int | None:
        """The step at which a method's clips are sampled in other lengths too."""
        if method == "dreambooth":
            return max(self.plan.frames_steps, default=None)
        if method.startswith("sft"):
            return max(self.plan.sft_steps)
        return self.recipe.sft.steps + max(self.plan.hpo_steps, default=0) if method == "hpo" else None

    def _tick(self, stage: str, step: int, loss: float) -> None:
        self._say(f"{stage} {step}: loss {loss:.4f}")


def clock() -> Say:
    """Says things with the seconds since it was made."""
    began = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)
