"""The bodies of the HTTP API, as typed models: what a client may send, and what it is answered."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve.jobs import EXHAUSTED
from serve.schema import CANCELLED, FAILED, Job

MAX_PROMPT = 4000  # characters; text encoders read a few hundred tokens
MAX_SEED = 2**53 - 1  # the largest that every JSON reader keeps exactly
_MAX_NAME = 300
_PATH = re.compile(r"[/\\]|\.safetensors$", re.IGNORECASE)


def _storable(text: str) -> str:
    """Text that databases and logs take. Lone surrogates never come so far: pydantic refuses them."""
    if "\x00" in text:
        raise ValueError("must not contain the character U+0000")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must say something")
    return text


def _from_json(value: Any) -> Any:
    """Multipart sends an object as its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError('must be JSON such as {"name": "ada", "scale": 0.8}') from None


Text = Annotated[str, AfterValidator(_storable)]


class Lora(BaseModel):
    """The identity, and how strongly its adapter acts."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Annotated[Text, Field(min_length=1, max_length=_MAX_NAME)] | None = Field(
        None, description="an identity, as an alternative to naming it in `model`; never a path"
    )
    scale: float = Field(1.0, ge=0, le=2, description="factor on the adapter; 1 is as trained")

    @model_validator(mode="before")
    @classmethod
    def _by_name_only(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError('must be an object such as {"name": "ada", "scale": 0.8}')
        name = value.get("name")
        if set(value) - set(cls.model_fields) or (isinstance(name, str) and _PATH.search(name)):
            raise ValueError("takes `name` (an identity of GET /v1/models, not a path) and `scale`, nothing else")
        return value


class CreateVideo(BaseModel):
    """The body of POST /v1/videos. What is left out takes the base model's own setting."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[Text, AfterValidator(_not_blank)] = Field(max_length=MAX_PROMPT, description="what happens")
    model: Annotated[Text, Field(min_length=1, max_length=_MAX_NAME)] | None = Field(
        None, description="`<base>`, `<base>:<identity>` or `<base>:<identity>@<version or alias>` of GET /v1/models"
    )
    seconds: Annotated[str, Field(max_length=20, coerce_numbers_to_str=True)] | None = Field(
        None, description="length of the clip: one of the lengths that `num_frames` allows at `fps`"
    )
    size: Annotated[str, Field(pattern=r"^[0-9]{1,5}x[0-9]{1,5}$")] | None = Field(
        None, description="WIDTHxHEIGHT in px, multiples of 16"
    )
    num_frames: int | None = Field(None, ge=1, le=100_000, description="4k+1; an alternative to `seconds`")
    fps: int | None = Field(None, ge=1, le=60, description="frames shown per second")
    num_inference_steps: int | None = Field(None, ge=1, le=100_000, description="denoising steps")
    guidance_scale: float | None = Field(None, ge=1, le=30)
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of the initial noise; drawn when left out")
    negative_prompt: Annotated[Text, Field(max_length=MAX_PROMPT)] | None = Field(
        None, description="what to keep away from; only where the base model runs with classifier-free guidance"
    )
    lora: Annotated[Lora, BeforeValidator(_from_json)] | None = Field(
        None, description="an object; in multipart its JSON text, or the fields `lora[name]` and `lora[scale]`"
    )
    webhook_url: Annotated[Text, Field(min_length=1, max_length=2000)] | None = Field(
        None, description="told, signed, when the video is done"
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        """Clearer words than pydantic's for what clients get wrong most."""
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object")
        for name, given in value.items():
            if name not in cls.model_fields:
                raise ValueError(f"unknown field {str(name)[:60]!r}; known are {', '.join(cls.model_fields)}")
            if isinstance(given, bool):  # pydantic would read true as 1
                raise ValueError(f"{name} must not be {str(given).lower()}")
        return value


class VideoError(BaseModel):
    """Why a video failed; `cancelled` when its owner stopped it."""

    code: str
    message: str


class Video(BaseModel):
    """One video, in whatever state. Times are Unix seconds."""

    id: str
    object: Literal["video"] = "video"
    model: str = Field(description="with the version that made it: `<base>:<identity>@<version>`")
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="denoising steps done, in per cent")
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoError | None = None
    prompt: str
    seconds: str
    size: str
    seed: int
    lora_version: str | None = None
    attempt: int = Field(ge=1, description="one more each time a lost worker's video went back to the queue")
    queue_position: int | None = Field(None, description="how many are before it; null unless queued")

    @classmethod
    def of(cls, job: Job, queue_position: int | None) -> Video:
        """The public view of a record."""
        error = None
        if job.status == FAILED:
            code = job.error_code or "internal_error"
            error = VideoError(code=code, message=job.error_message or _REASONS.get(code, "the video failed"))
        return cls.model_validate(
            {
                "id": job.id,
                "model": job.target.model,
                "status": job.status,
                "progress": job.progress,
                "created_at": int(job.created_at),
                "completed_at": _seconds(job.completed_at),
                "expires_at": _seconds(job.expires_at),
                "error": error,
                "prompt": job.request.prompt,
                "seconds": job.request.seconds,
                "size": job.request.size,
                "seed": job.request.seed,
                "lora_version": job.target.version,
                "attempt": job.attempt,
                "queue_position": queue_position,
            }
        )


_REASONS = {
    CANCELLED: "the video was cancelled",
    "adapter_unusable": "the identity's adapter cannot be used: its owner can publish it again, or roll back",
    "generation_failed": "the video could not be made: ask again, with fewer frames or another lora.scale",
    "storage_failed": "the finished video could not be stored: ask again later",
    EXHAUSTED: "the video was lost with its worker too often: ask again later",
}


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


class VideoList(BaseModel):
    """One page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None = Field(description="the next page's `after`")
    has_more: bool


class VideoDeleted(BaseModel):
    """A video whose record and files are gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class IdentityDeleted(BaseModel):
    """A person of whom nothing is left, and what there was."""

    id: str
    object: Literal["identity.deleted"] = "identity.deleted"
    deleted: Literal[True] = True
    adapters: list[str] = Field(description="versions")
    files: int = Field(description="photos, embeddings, training files and clips removed from the run")
    videos: int


class Alias(BaseModel):
    """A name that stands for a version; a canary takes its share of the requests."""

    version: str
    canary_version: str | None = None
    canary_share: float = 0.0


class Model(BaseModel):
    """The base model, or one identity on it."""

    id: str = Field(description="what `model` takes")
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    identity: str | None = None
    versions: list[str] = []
    aliases: dict[str, Alias] = {}


class ModelList(BaseModel):
    """What this key may use."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The endpoint takes requests."""

    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    """What is wrong and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail
