"""The deployment that denoises: a base model in memory, and one `work()` call for each video in progress."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import uuid
from typing import Any

from serve import logs
from serve.settings import ServeSettings


class EngineReplica:
    """Ray Serve actor around `serve.worker.Worker`.

    Args:
        settings: `ServeSettings` as plain values.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        from magicid import recipe
        from magicid.backbones import load_backbone
        from serve.adapter_cache import AdapterCache, load_adapter
        from serve.clip_writer import ClipWriter
        from serve.engine import Engine
        from serve.metrics import EngineMetrics
        from serve.parts import open_jobs
        from serve.worker import Worker

        self.settings = ServeSettings.model_validate(settings)
        logs.set_up(self.settings.log_level)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        loaded = recipe.load(self.settings.recipe)
        device = "cuda" if torch.cuda.is_available() and self.settings.replica_gpus else "cpu"
        backbone = load_backbone(loaded, parts=("transformer", "vae", "text"), device=device)
        engine = Engine(backbone, max_batch=self.settings.max_batch, compiler=self.settings.compiler)
        load = functools.partial(load_adapter, base_sha256=backbone.base_sha256, transformer=backbone.transformer)
        self.worker = Worker(
            f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            engine,
            AdapterCache(load, self.settings.cache_bytes),
            open_jobs(self.settings),
            ClipWriter(self.settings, backbone.base_sha256),
            EngineMetrics(),
            lease_s=self.settings.lease_s,
        )
        self.worker.start()

    async def work(self) -> dict[str, Any]:
        """Make one video, if one waits; returns how it ended and how long it took."""
        began = asyncio.get_running_loop().time()
        future = await asyncio.to_thread(self.worker.take)
        if future is None:
            return {"outcome": "idle", "seconds": 0.0}
        outcome = await asyncio.wrap_future(future)
        return {"outcome": outcome, "seconds": asyncio.get_running_loop().time() - began}

    def check_health(self) -> None:
        """Raises what broke the engine; Serve then replaces this replica."""
        if self.worker.failure is not None:
            raise self.worker.failure

    def __del__(self) -> None:
        worker = getattr(self, "worker", None)
        if worker is not None and worker.failure is None:
            worker.stop()
