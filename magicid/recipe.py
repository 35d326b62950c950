"""The typed recipe: every setting of a run, in one TOML file.

`load("face-world")` reads a shipped recipe, `load("my.toml")` a file; `overrides` are dotted keys, `{"hpo.beta": 500}`,
on the command line `--hpo.beta=500`. Unknown keys are refused and the nearest known one is named.
The resolved copy is kept with the run and its hash marks everything the run makes.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pydantic
import tomli_w
from pydantic import BaseModel, ConfigDict, Field

from magicid.errors import RecipeError
from magicid.storage import sha256_json

# What one identity may override in its manifest row: settings that need no other model, pool or trainer.
IDENTITY_SECTIONS = ("sft", "hpo", "selection")


class Section(BaseModel):
    """Base of all sections: frozen; unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Backbone(Section):
    """The text-to-video model."""

    kind: Literal["hunyuan", "wan"]
    path: str = Field(description="a diffusers pipeline folder, or world:video for the shipped face-world model")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    prompt_template: str | None = Field(None, description="text around the prompt, with {}; null: the pipeline's own")
    max_sequence_length: int = Field(256, ge=8, le=1024, description="text tokens")
    licence: str = Field("", description="the licence a user must accept, shown by `magicid check`")


class Sampling(Section):
    """How clips are sampled."""

    frames: int = Field(ge=5, description="4k+1")
    height: int = Field(ge=16, description="px, a multiple of 16")
    width: int = Field(ge=16, description="px, a multiple of 16")
    fps: int = Field(24, ge=1, le=60)
    steps: int = Field(50, ge=1)
    guidance_scale: float = Field(
        6.0, ge=1, description="embedded guidance (Hunyuan) or true CFG where there is none (Wan)"
    )
    true_cfg_scale: float = Field(1.0, ge=1, description="1 is off: one forward per step")
    shift: float = Field(7.0, gt=0, description="flow-match timestep shift")
    negative_prompt: str = ""

    @pydantic.field_validator("frames")
    @classmethod
    def _whole_latent_frames(cls, value: int) -> int:
        if value % 4 != 1:
            raise ValueError(f"must be 4k+1 (5, 9, 13, ...); the nearest is {4 * max(1, round((value - 1) / 4)) + 1}")
        return value

    @pydantic.field_validator("height", "width")
    @classmethod
    def _whole_patches(cls, value: int) -> int:
        if value % 16:  # 8 px per latent, 2 latents per patch; the pipelines take nothing else
            raise ValueError(f"must be a multiple of 16; the nearest is {16 * max(1, round(value / 16))}")
        return value


class Prompts(Section):
    """Where action prompts come from (paper: 20 sampled from a language model; 40 others for evaluation)."""

    source: Literal["shipped", "openai", "transformers"] = "shipped"
    name: str = Field("human-actions", description="the shipped set")
    training: int = Field(20, ge=1)
    heldout: int = Field(40, ge=0)
    url: str = Field("", description="openai: base URL of an OpenAI-compatible server")
    model: str = Field("", description="openai: model name; transformers: local folder")


class Identities(Section):
    """Limits on reference photos, and whose may be used."""

    require_consent: bool = Field(True, description="an identity without a consent reference is set aside")

    min_photos: int = Field(3, ge=1)
    max_photos: int = Field(20, ge=1)
    max_megabytes: float = Field(25, gt=0, description="per photo file")
    max_megapixels: float = Field(50, gt=0, description="per photo, decoded")
    min_face_px: int = Field(48, ge=8, description="shorter side of the face box")
    detection_threshold: float = Field(0.5, gt=0, lt=1)
    outlier_similarity: float = Field(0.3, ge=-1, le=1, description="a photo below it, against the others, is left out")
    caption_question: str = Field(
        'Describe this picture in one short sentence, as a still picture. Call the person "a {class_word}".',
        description="what `magicid identities caption` asks the vision-language model about each photo",
    )

    @pydantic.model_validator(mode="after")
    def _some_number_of_photos(self) -> Identities:
        if self.min_photos > self.max_photos:
            raise ValueError(f"min_photos = {self.min_photos} is more than max_photos = {self.max_photos}")
        return self


class Repository(Section):
    """The preference repository B = V_t + V_s + V_id (paper: 100, 20 and the photos)."""

    trained_clips: int = Field(100, ge=1, description="V_t, per identity")
    base_clips: int = Field(20, ge=1, description="V_s, per run")
    seed: int = 0
    attempts: int = Field(3, ge=1, description="tries of one clip before it becomes a row with a reason")


class Rewards(Section):
    """The three reward models."""

    identity: str = Field(description="an insightface folder (detector + ArcFace), or world:identity")
    motion: str = Field(description="a RAFT folder, or world:motion")
    semantics: str = Field(description="a Qwen-VL-type folder, or world:prompt")
    detection_size: int = Field(640, ge=32, description="square input of the face detector, px")
    semantics_frames: int = Field(8, ge=1, description="frames shown to the vision-language model; 0 < n <= frames")
    identity_range: tuple[float, float] = Field((0.0, 1.0), description="raw values shown as 1 and 10")
    motion_window: int = Field(
        1, ge=1, description="R_dy: pairs of frames over which flow is averaged; 1: the paper; 3: jitter earns less"
    )
    motion_range: tuple[float, float] = Field((0.0, 20.0), description="raw values shown as 1 and 10, px per frame")

    @pydantic.field_validator("identity_range", "motion_range")
    @classmethod
    def _increases(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError("the first number must be smaller than the second")
        return value


class Selection(Section):
    """How pairs are made (paper sections on P_id and P_dy; docs/method.md for the rules where it is silent)."""

    static_pairs: int = Field(100, ge=0, description="P_id, at most")
    dynamic_pairs: int = Field(100, ge=0, description="P_dy, the paper's top 100")
    motion_tolerance: float = Field(ge=0, description="P_id: R_dy the winner may lose against the loser, px per frame")
    min_identity_gap: float = Field(0.0, ge=-2, le=2, description="pairs with a smaller R_id gap are dropped")
    rewards: Literal["id", "id+dy", "all"] = Field(
        "all", description="rewards that decide: identity, and motion, and the prompt (Table 3)"
    )
    static_prompt: Literal["loser", "own"] = Field(
        "loser", description="what a P_id pair is trained under: its loser's action, or the caption of the photos"
    )
    still_pairs: int = Field(
        0,
        ge=0,
        description="V_t clips, the most moving first, each preferred to its own first frame held still; 0: the paper",
    )
    same_prompt: bool = Field(True, description="P_dy pairs share the prompt where enough such pairs exist")


class Lora(Section):
    """The adapter."""

    rank: int = Field(32, ge=1, le=256)
    alpha: float = Field(32, gt=0)
    blocks: Literal["all", "double"] = Field(
        "all", description="double: only double-stream blocks (keeps motion better)"
    )
    layers: Literal["attention", "all"] = Field(
        "attention", description="all: the feed-forward layers too (learns a person better in a small model)"
    )


class Sft(Section):
    """Stage 1: self-reconstruction on inflated photos (paper: 1000 steps)."""

    steps: int = Field(1000, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(1, ge=1, description="clips per step, over all workers")
    guidance_scale: float = Field(1.0, ge=1)
    prompt: str = Field("a {class_word}", description="caption of the inflated photos that have none of their own")
    captions: bool = Field(True, description="photos under their captions in the manifest; false: all under `prompt`")
    moving: int = Field(
        0, ge=0, description="moving copies of each photo beside the still one, panned and turned; 0: the paper"
    )
    frames: int = Field(0, ge=0, description="of the photo clips trained on; 1: single frames (DreamBooth); 0: all")
    tokens: int = Field(0, ge=0, description="above 0: so many extended tokens instead of a LoRA (MagicMe)")
    seed: int = 0

    @pydantic.field_validator("frames")
    @classmethod
    def _whole_latent_frames(cls, value: int) -> int:
        if value and value % 4 != 1:
            raise ValueError("must be 0 or 4k+1 (1, 5, 9, ...)")
        return value


class Hpo(Section):
    """Stage 2: Hybrid Preference Optimization (paper: AdamW, 2e-5, 1e-4, 5000 steps)."""

    steps: int = Field(5000, ge=0, description="0: the SFT adapter is the result")
    learning_rate: float = Field(2e-5, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(1, ge=1, description="pairs per step, over all workers")
    beta: float = Field(2000, gt=0, description="for errors that are means over C, F, H, W")
    anchor: float = Field(
        0.0, ge=0, description="weight of a reconstruction term on the winner, beside the loss; 0: the paper"
    )
    static_share: float = Field(0.5, ge=0, le=1, description="at most this share of a step's pairs is P_id")
    max_grad_norm: float = Field(1.0, gt=0)
    noise_draws: int = Field(
        8,
        ge=0,
        description="(timestep, noise) draws per pair, their reference errors kept; 0: fresh draws at every step",
    )
    seed: int = 0
    validate_every: int = Field(500, ge=0, description="a validation clip every so many steps; 0 is never")


class Trainer(Section):
    """What SFT and HPO share."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    checkpoint_every: int = Field(100, ge=1, description="steps")
    log_every: int = Field(10, ge=1, description="steps")
    shift: float = Field(7.0, gt=0, description="shift of the training timesteps")


class Training(Section):
    """Curves of SFT and HPO for other tools. Changes no result."""

    loggers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(
        [], description="off by default; no account needed"
    )
    folder: str = Field("", description="where their files go; empty: training/<id>/<stage>/logs of the run")


class Pool(Section):
    """One Ray Data actor pool."""

    min_size: int = Field(1, ge=1)
    max_size: int = Field(1, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)


class Resources(Section):
    """Pool sizes and shares. Leave spare CPUs: pools that take them all starve the read tasks."""

    slots: int = Field(1, ge=1, description="identities trained at the same time")
    workers_per_slot: int = Field(1, ge=1, description="data-parallel workers of one slot")
    worker_cpus: float = Field(1, gt=0)
    worker_gpus: float = Field(0, ge=0)
    threads: int = Field(0, ge=0, description="torch threads per process; 0: torch's own default")
    max_failures: int = Field(3, ge=0, description="worker-group restarts of a slot")
    generator: Pool = Pool()
    identity: Pool = Pool()
    motion: Pool = Pool()
    semantics: Pool = Pool()

    def pool_cpus(self) -> float:
        """CPUs that the four pools hold at their smallest: the sum of min_size x cpus."""
        return sum(pool.min_size * pool.cpus for pool in (self.generator, self.identity, self.motion, self.semantics))


class Fleet(Section):
    """How a driver shares machines between tenants and identities, and when it gives up waiting. Changes no result."""

    weights: dict[str, float] = Field({}, description="share of each owner; 1 where not named")
    quotas: dict[str, int] = Field(
        {}, description="most identities of an owner that train at once; no limit if unnamed"
    )
    ageing_s: float = Field(3600, gt=0, description="waiting that outweighs one step of priority")
    deadline_lead_s: float = Field(86400, ge=0, description="so long before its deadline an identity is due")
    window: int = Field(0, ge=0, description="identities under way at once; 0: enough to keep slots and pools busy")
    manifest_s: float = Field(30, gt=0, description="how often the manifest and commands are looked at")
    lease_s: float = Field(60, gt=0, description="a driver that was not heard of for so long has lost its run")
    slot_idle_s: float = Field(120, ge=0, description="a slot or the pools without work give their machines back")
    clip_limit_s: float = Field(0, ge=0, description="one clip in one stage; the process ends beyond it; 0: no limit")
    step_limit_s: float = Field(0, ge=0, description="one training step, likewise; 0: no limit")
    memory_limit_gib: float = Field(0, ge=0, description="what a worker may allocate beyond its start; 0: no limit")
    report_identities: int = Field(50, ge=1, description="identities that report.html shows in full")

    @pydantic.field_validator("weights", "quotas")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if any(number <= 0 for number in value.values()):
            raise ValueError("each must be above 0")
        return value


class Evaluation(Section):
    """The table: held-out prompts, networks that no reward used. An empty folder leaves its metrics null."""

    clips: int = Field(40, ge=0, description="held-out clips per identity and method; 0: no table")
    identity: str = Field("", description="an insightface folder, not the reward's")
    detection_size: int = Field(0, ge=0, description="square input of its face detector, px; 0: as for the reward")
    motion: str = Field("dis", description="a RAFT folder, not the reward's, or dis: OpenCV's DIS flow")
    vbench: str = Field("", description="VBench's raft-things.pth, for its own dynamic degree; needs its package")
    pose: str = Field("", description="world:pose, or landmarks: by the five points of the face detector")
    clip: str = Field("", description="a transformers CLIP folder; empty: the classifier's features where there are")
    video: str = Field("", description="a folder with the I3D TorchScript file; empty: likewise")
    classifier: str = Field("", description="world:classifier, or empty")
    every: int = Field(0, ge=0, description="also of the adapter every so many training steps, for curves; 0: never")
    seed: int = 1000


class Recipe(Section):
    """A whole run."""

    name: str
    backbone: Backbone
    sampling: Sampling
    prompts: Prompts = Prompts()
    identities: Identities = Identities()
    repository: Repository = Repository()
    rewards: Rewards
    selection: Selection
    lora: Lora = Lora()
    sft: Sft = Sft()
    hpo: Hpo = Hpo()
    trainer: Trainer = Trainer()
    training: Training = Training()
    resources: Resources = Resources()
    fleet: Fleet = Fleet()
    evaluation: Evaluation = Evaluation()

    @property
    def sha256(self) -> str:
        """Hash of all settings."""
        return sha256_json(self.model_dump(mode="json"))

    @property
    def content_sha256(self) -> str:
        """Hash of all settings but `resources`, `fleet` and `training`: what a run makes, wherever it is made."""
        return sha256_json(self.model_dump(mode="json", exclude={"resources", "fleet", "training"}))

    @pydantic.model_validator(mode="after")
    def _frames_to_show(self) -> Recipe:
        shown, there = self.rewards.semantics_frames, self.sampling.frames
        if shown > there:
            raise ValueError(f"rewards.semantics_frames = {shown} is more than sampling.frames = {there}")
        if self.sft.frames > there:
            raise ValueError(f"sft.frames = {self.sft.frames} is more than sampling.frames = {there}")
        if self.sft.tokens and self.hpo.steps:
            raise ValueError(
                f"sft.tokens = {self.sft.tokens} trains no LoRA that HPO could begin with; set hpo.steps = 0"
            )
        return self

    def to_toml(self) -> str:
        """The resolved recipe as TOML; `load` of it gives an equal recipe."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def with_overrides(self, overrides: dict[str, Any]) -> Recipe:
        """A copy with dotted keys replaced. Raises RecipeError as `load` does."""
        values = self.model_dump(mode="json")
        for key, value in overrides.items():
            _set_dotted(values, key, value)
        return _validate(values, self.name)

    def for_identity(self, overrides: dict[str, str]) -> Recipe:
        """The recipe of one identity: manifest overrides are TOML values of the sections sft, hpo and selection."""
        parsed = {}
        for key, text in overrides.items():
            if key.split(".")[0] not in IDENTITY_SECTIONS:
                raise RecipeError(
                    f"an identity cannot override {key!r}",
                    f"only {', '.join(IDENTITY_SECTIONS)} differ between identities; change the run's recipe",
                )
            parsed[key] = parse_value(text)
        return self.with_overrides(parsed)


def shipped() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("magicid.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def parse_value(text: str) -> Any:
    """A command-line value as TOML (`5`, `1e-4`, `true`, `"text"`); anything else is taken as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Command-line arguments `--section.key=value` as the overrides `load` takes; the last of equal keys counts.

    Raises:
        RecipeError: an argument of another form.
    """
    overrides = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or not all(key.split(".")):
            raise RecipeError(f"cannot read the argument {argument!r}", "recipe keys are given as --section.key=value")
        overrides[key] = parse_value(text)
    return overrides


def load(name_or_path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a TOML file.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key (the nearest known one is named), an impossible value.
    """
    return from_toml(_read(str(name_or_path)), str(name_or_path), overrides)


def from_toml(text: str, name: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe's text; `name` is what errors call it. Raises RecipeError as `load` does."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name} is not valid TOML: {error}", "correct that line") from error
    for key, value in (overrides or {}).items():
        _set_dotted(values, key, value)
    return _validate(values, name)


def _read(name: str) -> str:
    if name in shipped():
        return (resources.files("magicid.recipes") / f"{name}.toml").read_text()
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path.read_text()
    near = difflib.get_close_matches(name, shipped(), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RecipeError(f"no recipe {name!r}", f"{hint}shipped recipes: {', '.join(shipped())}; or give a .toml file")


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"unknown recipe key {key!r}", f"{parent!r} is a value, not a section")
    values[last] = value


def _validate(values: dict[str, Any], name: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        problems, actions = [], []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key {key!r}")
                near = difflib.get_close_matches(key, known_keys(), 1, cutoff=0.4)
                actions.append(f"did you mean {near[0]!r}?" if near else "remove it")
            elif item["type"] == "missing":
                problems.append(f"missing key {key!r}")
                actions.append(f"add {key}")
            else:
                message = item["msg"].removeprefix("Value error, ")
                if item["type"] == "value_error" and isinstance(item["input"], dict):
                    # Keys that do not go together: the input is the whole section.
                    problems.append(f"{key}: {message}" if key else message)
                    actions.append("correct one of the two")
                else:
                    problems.append(f"{key} = {item['input']!r} is not possible: {message}")
                    actions.append(f"correct {key}")
        raise RecipeError(f"recipe {name}: {'; '.join(problems)}", "; ".join(actions)) from error


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key a recipe may have."""
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
    return keys
