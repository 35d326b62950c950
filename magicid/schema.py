"""The data contract: Identity + Prompt -> Clip -> Rewards -> Pair -> Adapter, and the Arrow schemas made from them.

This is the only place where a column is named. Rows are immutable and gain columns; pixels, latents and text embeddings
travel as URI + SHA-256. Every `*_uri` is relative to the run directory, so that a run can be moved as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa

BASE_CLIP = "V_s"  # from the untouched base model, shared by all identities
TRAINED_CLIP = "V_t"  # from the identity's SFT adapter
STATIC_CLIP = "V_id"  # a reference photo inflated to a clip
MOVING_CLIP = "V_mov"  # a reference photo panned and turned; not in the paper, for SFT alone
STILL_CLIP = "V_still"  # a V_t clip's first frame held still; not in the paper, without rewards
EVALUATION_CLIP = "evaluation"  # a held-out prompt, for the table
CURVE_CLIP = "curve"  # the same prompts by an adapter on its way, for curves
VALIDATION_CLIP = "validation"  # what a trainer sampled on its way, kept as latents; `seed` is the step
REWARDED = (BASE_CLIP, TRAINED_CLIP, STATIC_CLIP)  # the kinds that rewards look at, and selection compares

REWARD_NAMES = ("identity", "motion", "semantics")  # the order of the columns of every rewards matrix (N, 3)


@dataclass(frozen=True)
class Identity:
    """One person, checked. `photos` are the URIs of normalised PNG copies under the run directory.

    `captions` say what each of them shows, empty where the manifest does not say it.
    """

    identity_id: str
    owner: str
    photos: list[str]
    class_word: str = "person"
    consent: str | None = None
    priority: int = 0
    overrides: dict[str, str] = field(default_factory=dict)  # dotted recipe key -> TOML value
    references: list[list[float]] = field(default_factory=list)  # (photos, D) unit face embeddings, reward recogniser
    metric_references: list[list[float]] = field(default_factory=list)  # the same by the metric recogniser
    warnings: list[str] = field(default_factory=list)  # e.g. a photo left out, and why
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rejected:
    """Something set aside, and why: an identity, a photo, a clip, a pair."""

    kind: str
    name: str
    problem: str
    action: str


@dataclass(frozen=True)
class Prompt:
    """One prompt; `split` is `training` or `heldout`."""

    prompt_id: str
    text: str
    split: str


@dataclass(frozen=True)
class Clip:
    """One clip, wanted or made. `clip_id` is a content address: the same request always has the same id.

    `error` is the reason of the last failed try, after all tries; then the URIs are null.
    """

    clip_id: str
    kind: str  # V_s, V_t, V_id, V_still, evaluation or validation
    identity_id: str | None  # null for V_s and for evaluation clips of the base model
    method: str  # base, sft, hpo, photo or validation
    prompt_id: str
    prompt: str
    seed: int
    photo_uri: str | None = None  # V_id only
    adapter_uri: str | None = None
    adapter_sha256: str | None = None
    video_uri: str | None = None
    video_sha256: str | None = None
    latents_uri: str | None = None
    latents_sha256: str | None = None
    text_uri: str | None = None  # text embeddings of the prompt, shared by all clips of this prompt
    attempts: int = 0
    error: str | None = None
    step: int = 0  # training steps behind the adapter, all stages together; evaluation clips only
    source_id: str | None = None  # V_still only: the clip whose first frame it holds


@dataclass(frozen=True)
class ScoredClip(Clip):
    """A clip with its raw rewards. A reward that failed is null and `*_error` says why; never a number.

    `embeddings` are the face embeddings of its frames, null where no face was found in a frame, so the identity reward
    against any person is a dot product. `identity_reward` is null for V_s, which is shared by all identities.
    """

    embeddings: list[list[float] | None] | None = None  # (F, D)
    identity_reward: float | None = None  # mean cosine, -1..1
    identity_error: str | None = None
    motion_reward: float | None = None  # px per frame
    motion_error: str | None = None
    semantics_reward: float | None = None  # expected rating, 1..10
    semantics_error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> s that it worked on this clip, the last time


@dataclass(frozen=True, slots=True)
class Made:
    """What the driver learns of a clip that left the pools; its row, with all else, lies in the run by then."""

    clip_id: str
    kind: str
    identity_id: str | None
    latents_uri: str | None = None
    text_uri: str | None = None
    attempts: int = 0
    error: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # stage -> s that it worked on this clip
    again: str | None = None  # why the next start tries it again: it was not made, or a reward failed


@dataclass(frozen=True)
class RewardRow:
    """What selection saw of one clip for one identity: raw rewards, the same on 1..10 for show, and the fronts."""

    clip_id: str
    kind: str
    prompt: str
    identity: float | None  # mean cosine, -1..1
    motion: float | None  # px per frame
    semantics: float | None  # 1..10
    identity_scaled: float | None
    motion_scaled: float | None
    semantics_scaled: float | None
    upper_front: bool
    lower_front: bool


@dataclass(frozen=True)
class Pair:
    """One preference pair: the winner is preferred to the loser. Both carry latents; the prompt is common.

    Rewards are raw values in the order identity, motion, semantics.
    """

    pair_id: str
    identity_id: str
    kind: str  # P_id, P_dy or P_still
    rank: int  # 0 is the pair with the largest identity gap of its kind; of P_still, the clip that moves most
    prompt: str  # the prompt both sides are trained under
    text_uri: str
    winner_id: str
    winner_kind: str
    winner_latents_uri: str
    winner_rewards: list[float | None]
    loser_id: str
    loser_kind: str
    loser_latents_uri: str
    loser_rewards: list[float | None]


@dataclass(frozen=True)
class MetricRow:
    """One evaluation clip measured by networks that were never optimised against; null where it cannot be measured.

    Columns of measurements: `magicid.evaluation.metrics`.
    """

    clip_id: str
    identity_id: str  # whose references it was compared with
    method: str  # base, sft, hpo or validation; outside a run any name
    prompt: str
    seed: int
    face_sim: float | None  # mean cosine with the references, metric recogniser, -1..1
    face_detect_rate: float | None  # 0..1
    dynamic_magnitude: float | None  # px per step of about 1/8 s, scaled to 256 px: mean of the top 5 % flow magnitudes
    prompt_score: float | None  # 0..1
    fps: int
    frames: int
    height: int
    width: int
    video_uri: str | None
    error: str | None = None
    face_sim_missing0: float | None = None  # as face_sim, a frame without a face counts 0
    dynamic_degree: float | None = None  # 1 dynamic, 0 not, by VBench's rule
    dynamic_degree_vbench: float | None = None  # the same by VBench's own package
    head_motion: float | None = None  # half head heights per second
    temporal_flickering: float | None = None  # VBench's, 0..1; 1 is frozen
    warp_error: float | None = None  # grey levels 0..255
    temporal_consistency: float | None = None  # mean cosine of adjacent frames' embeddings
    clip_t: float | None = None  # 100 x cosine with the prompt
    clip_i: float | None = None  # 100 x cosine with the reference photos
    action: float | None = None  # 1 when the prompt's action is recognised, else 0
    place: float | None = None  # the same for the place
    video_features: list[float] | None = None  # for the Fréchet video distance
    train_seed: int = 0
    step: int = 0  # training steps behind the clip, all stages together; 0: base model, or not known
    setting: str = ""  # what differs from the method's recipe, as key=value
    base_sha256: str = ""
    adapter_sha256: str = ""


T = TypeVar("T")

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_type(annotation: Any) -> pa.DataType:
    """The Arrow type of a field annotation: scalars, Optional, list[...] and dict[str, str]."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = [a for a in arguments if a is not type(None)]
        return _arrow_type(inner)
    if origin is list:
        return pa.list_(_arrow_type(arguments[0]))
    if origin is dict:
        return pa.map_(_arrow_type(arguments[0]), _arrow_type(arguments[1]))
    return _ARROW[annotation]


@functools.cache
def arrow_schema(cls: type) -> pa.Schema:
    """The Arrow schema of one of the dataclasses above, its fields in order."""
    hints = typing.get_type_hints(cls)
    return pa.schema([(f.name, _arrow_type(hints[f.name])) for f in dataclasses.fields(cls)])


@functools.cache
def _columns(cls: type) -> dict[str, bool]:
    """The fields of a dataclass, in order, and whether each is a mapping."""
    hints = typing.get_type_hints(cls)
    return {f.name: typing.get_origin(hints[f.name]) is dict for f in dataclasses.fields(cls)}


def to_row(value: Any) -> dict[str, Any]:
    """A dataclass as a plain row."""
    return {name: getattr(value, name) for name in _columns(type(value))}  # type: ignore[arg-type]


def from_row(cls: type[T], row: dict[str, Any]) -> T:
    """A row as the dataclass; other columns are ignored, absent ones take their default."""
    values = {}
    for name, is_mapping in _columns(cls).items():  # type: ignore[arg-type]
        if name in row:
            value = row[name]
            if is_mapping and not isinstance(value, dict):
                value = dict(value or [])  # Arrow maps come back as lists of pairs
            values[name] = value
    return cls(**values)


def to_rows(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Dataclasses as plain rows."""
    return [to_row(value) for value in values]
