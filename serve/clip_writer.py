"""Frames of a finished job -> an MP4 that says what made it, on storage."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from magicid import storage
from magicid.clips import encode_mp4
from magicid.provenance import Claim, Signer, sign
from serve.clips import clip_uri
from serve.schema import Job
from serve.settings import ServeSettings


class ClipWriter:
    """Encodes, signs and stores clips under `settings.clips_location`."""

    def __init__(self, settings: ServeSettings, base_sha256: str) -> None:
        self.settings, self.base_sha256 = settings, base_sha256
        self.signer = open_signer(settings)

    def write(self, job: Job, frames: np.ndarray) -> tuple[str, str]:
        """Store the clip of a job; returns its URI relative to the clips' location and its SHA-256.

        Raises:
            StorageError: it cannot be written.
        """
        claim = Claim(
            base=job.target.model.split(":")[0],
            base_sha256=self.base_sha256,
            adapter_version=job.target.version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        video = sign(encode_mp4(frames, job.request.fps), claim, self.signer)
        uri = clip_uri(job.id, job.fence)
        return uri, storage.write_bytes(storage.join(self.settings.clips_location, uri), video)

    def remove(self, uri: str) -> None:
        """Remove a clip that nobody wants any more. Raises StorageError."""
        storage.remove(storage.join(self.settings.clips_location, uri))


def open_signer(settings: ServeSettings) -> Signer:
    """The user's certificate where the settings name one, else one made once and kept with the records."""
    if settings.certificate:
        return Signer.from_files(settings.certificate, settings.private_key)
    return Signer.self_made(Path(settings.data) / "certificate")
