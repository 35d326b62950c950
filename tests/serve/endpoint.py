"""The HTTP API in a thread, over real records and adapters, with a stand-in for the engine replicas."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from starlette.types import ASGIApp

from magicid import adapters, recipe, storage
from magicid.adapters import AdapterManifest, AdapterRef
from magicid.clips import encode_mp4
from magicid.provenance import Claim, sign
from serve import webhooks
from serve.api import Parts, create_api
from serve.audit import AuditLog
from serve.catalog import Catalog
from serve.clip_writer import open_signer
from serve.database import Database
from serve.jobs import JobStore
from serve.schema import Job
from serve.settings import ServeSettings
from serve.tenants import TenantStore

BASE = "face-world"
BASE_SHA256 = "b" * 64
FRAMES, SIDE, FPS = 13, 48, 8


def publish(run: str, identity_id: str, owner: str, value: float = 1.0) -> AdapterRef:
    """A tiny adapter; another `value` is another version."""
    tensors = {f"transformer.proj.lora_{side}.weight": torch.full((1, 2), value) for side in "AB"}
    manifest = AdapterManifest(BASE_SHA256, "r" * 64, rank=1, alpha=1.0, owner=owner, consent=f"form of {identity_id}")
    return adapters.publish(run, identity_id, adapters.to_bytes(tensors, 1, 1.0), manifest)


def picture(seed: int) -> bytes:
    """A clip of moving colours that differs with the seed."""
    x, y, t = np.meshgrid(np.arange(SIDE), np.arange(SIDE), np.arange(FRAMES), indexing="xy")
    channels = [128 + 90 * np.sin((x * a + y * b) / 9 + t / 2 + seed) for a, b in ((1, 0), (0, 1), (1, 1))]
    frames = np.stack(channels, axis=-1).transpose(2, 0, 1, 3)
    return encode_mp4(frames.astype(np.uint8), FPS)


class Endpoint:
    """Everything behind one API, and the API's app.

    Attributes:
        keys: by tenant: `team-a` owns ada, `team-b` owns bruno, `root` is an admin.
    """

    def __init__(self, folder: Path, **values: Any) -> None:
        self.run = str(folder / "run")
        self.settings = ServeSettings.model_validate(
            {"recipe": BASE, "adapters": self.run, "data": str(folder / "data"), **values}
        )
        self.ada, self.bruno = publish(self.run, "ada", "team-a"), publish(self.run, "bruno", "team-b")
        self.database = Database(self.settings.database_url)
        self.database.migrate()
        self.jobs = JobStore(
            self.database,
            lease_s=self.settings.lease_s,
            max_attempts=self.settings.max_attempts,
            retention_s=self.settings.retention_s,
            max_queued=self.settings.max_queued,
        )
        self.tenants, self.audit = TenantStore(self.database), AuditLog(self.database)
        self.catalog = Catalog(self.run, BASE, BASE_SHA256, refresh_s=0)
        self.keys = {name: self.tenants.add(name) for name in ("team-a", "team-b")}
        self.keys["root"] = self.tenants.add("root", admin=True)
        self.signer = open_signer(self.settings)
        parts = Parts(
            jobs=self.jobs,
            tenants=self.tenants,
            audit=self.audit,
            catalog=self.catalog,
            recipe=recipe.load(BASE),
            check_webhook=webhooks.check_url,
            metrics=lambda: b"magicid_queue_jobs 0\n",
            signer=self.signer,
        )
        self.app = create_api(self.settings, parts)

    def file(self, job: Job) -> str:
        """Where a finished job's video lies."""
        return storage.join(self.settings.clips_location, str(job.video_uri))

    def claim(self) -> Job:
        """The next job, as a replica takes it."""
        return self.jobs.claim("worker")[0]

    def finish(self, job: Job) -> Job:
        """Write a clip for a claimed job and complete it."""
        uri = f"{job.id[-2:]}/{job.id}-{job.fence}.mp4"
        claim = Claim(BASE, BASE_SHA256, job.target.version, "2030-01-01T00:00:00+00:00")
        video = sign(picture(job.request.seed), claim, self.signer)
        digest = storage.write_bytes(storage.join(self.settings.clips_location, uri), video)
        assert self.jobs.complete(job.id, job.fence, video_uri=uri, video_sha256=digest)
        return self.jobs.get(job.id, None)

    @contextlib.contextmanager
    def engine(self) -> Iterator[None]:
        """Take and finish jobs in a thread, half-way steps included."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.02):
                for job in self.jobs.claim("worker"):
                    self.jobs.heartbeat("worker", {job.id: (job.fence, 50)})
                    self.finish(job)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class Server(uvicorn.Server):
    """uvicorn in a thread; `address` is there once it is entered."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
        self._up = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.run, kwargs={"sockets": [self._socket]})

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, and say so."""
        await super().startup(sockets)
        self._up.set()

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.should_exit = True
        self._thread.join()
        self._socket.close()
