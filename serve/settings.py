"""How an endpoint is set up: typed, unknown keys refused; `serve run serve.app:app recipe=...` fills it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from magicid.errors import RecipeError
from serve.proxy import MAX_BODY_BYTES


class ServeSettings(BaseModel):
    """Settings of the endpoint. Locations are local paths or fsspec URLs; `data` holds what has none of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field("face-world", description="a shipped recipe or a .toml file: base model and sampling")
    base: str = Field("", description="the base model's name in model names; empty: the recipe's name")
    adapters: str = Field("runs/demo", description="run directory whose adapters/ are served")
    data: str = Field("runs/serve", description="folder for the records and clips that have no location of their own")
    database: str = Field("", description="SQLAlchemy URL; empty: SQLite in `data`")
    clips: str = Field("", description="where videos are kept; empty: in `data`")

    max_batch: int = Field(4, ge=1, description="videos that one replica denoises together")
    cache_bytes: int = Field(2 << 30, ge=1, description="adapters kept in memory by one replica")
    min_replicas: int = Field(0, ge=0)
    max_replicas: int = Field(1, ge=1)
    replica_cpus: float = Field(0.5, ge=0)
    replica_gpus: float = Field(0, ge=0)
    compiler: str = Field(
        "", description="backend of torch.compile for the denoiser, such as inductor; empty: not compiled"
    )
    threads: int = Field(1, ge=0, description="torch threads of a replica; 0: torch's default")
    idle_s: float = Field(300, ge=0, description="a replica without work is stopped after this")
    drain_s: float = Field(60, gt=0, description="replicas are added until the queue would be done in this time")
    shutdown_s: float = Field(3600, gt=0, description="a replica that stops may finish its videos for this long")

    max_queued: int = Field(1000, ge=1, description="open jobs of all tenants; above: 429")
    max_body_bytes: int = Field(64 << 10, ge=1 << 10, le=MAX_BODY_BYTES)
    max_frames: int = Field(0, ge=0, description="0: the recipe's")
    max_steps: int = Field(100, ge=1)
    lease_s: float = Field(30, gt=0, description="a replica that is silent for this long has lost its jobs")
    max_attempts: int = Field(5, ge=1)
    dedupe_s: float = Field(60, ge=0, description="an equal POST without Idempotency-Key within this is the same video")
    retention_s: float = Field(7 * 24 * 3600, gt=0, description="a finished video is kept for this long")
    webhook_secret: str = Field("", description="signs webhooks; empty: webhook_url is refused", repr=False)
    certificate: str = Field(
        "", description="PEM file with the chain that signs provenance; empty: self-made in `data`"
    )
    private_key: str = Field("", description="PEM file of its key")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_prompts: bool = Field(False, description="write prompts to the logs")

    @property
    def database_url(self) -> str:
        """The database, with its default."""
        return self.database or f"sqlite:///{Path(self.data).absolute() / 'records.sqlite'}"

    @property
    def clips_location(self) -> str:
        """Where videos are kept, with its default."""
        return self.clips or f"{self.data.rstrip('/')}/clips"


def load(values: dict[str, Any]) -> ServeSettings:
    """Settings from strings or values. Raises RecipeError, naming the key."""
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(ServeSettings.model_fields)
        raise RecipeError(f"endpoint setting {key}: {first['msg']}", f"known settings: {known}") from error
