"""What travels between the endpoint's parts: the request that a client made, and the durable record of a video.

Times are Unix seconds. Words of `status` are those of the videos convention and no others: clients stop polling at a
word they do not know.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
OPEN = (QUEUED, IN_PROGRESS)
CANCELLED = "cancelled"  # the error code of a job that its owner stopped


@dataclass(frozen=True)
class VideoRequest:
    """What one video depends on, besides base model and adapter: every value checked and filled in.

    Attributes:
        frames, height, width: of the clip; px.
        steps: denoising steps.
        guidance_scale: embedded guidance.
        seed: of the initial noise.
        lora_scale: factor on the adapter's own scale, 0..2; 1 is as trained.
    """

    prompt: str
    frames: int
    height: int
    width: int
    fps: int
    steps: int
    guidance_scale: float
    seed: int
    negative_prompt: str | None = None
    lora_scale: float = 1.0

    @property
    def seconds(self) -> str:
        """Length of the clip as the convention spells it."""
        return f"{self.frames / self.fps:g}"

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Target:
    """The adapter that a model name meant when the request came; both None: the base model alone.

    Attributes:
        model: the name as it is answered, `<base>:<identity>@<version>`.
        location: the adapter's folder; never shown to a client.
        owner: the tenant that the identity belongs to.
        consent: reference to the person's consent, for the audit log.
    """

    model: str
    identity_id: str | None = None
    version: str | None = None
    location: str | None = None
    owner: str | None = None
    consent: str | None = None


@dataclass(frozen=True)
class Job:
    """The durable record of one video.

    Attributes:
        progress: denoising steps done, in per cent of all, 0..100; falls back to 0 only with a new attempt.
        attempt: 1 for the first; one more each time a lost or pre-empted job goes back to the queue.
        fence: grows with each claim; who holds an older one may write nothing.
        lease_until: when the claim lapses unless its holder renews it; None while nobody holds it.
        error_code, error_message: of a failed job.
        video_uri: where the bytes lie, relative to the clips' location; None until completed.
    """

    id: str
    tenant: str
    request_id: str
    target: Target
    request: VideoRequest
    status: str
    progress: int
    attempt: int
    fence: int
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    worker: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    error_code: str | None = None
    error_message: str | None = None
    video_uri: str | None = None
    video_sha256: str | None = None
    webhook_url: str | None = None


def to_json(value: VideoRequest | Target) -> dict[str, Any]:
    """A request or target as plain JSON values."""
    return dataclasses.asdict(value)
