"""The graph: `serve run serve.app:app recipe=face-world adapters=runs/demo`, or a config file for `serve deploy`.

client ─▶ Api (FastAPI) ─▶ records (SQL) ◀─ Engine replicas: claim, denoise in one batch, write the clip
                               ▲                 ▲
                               └── Dispatcher ───┘ nudges, lapsed leases, retention, webhooks
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serve import logs
from serve.replica import EngineReplica
from serve.settings import ServeSettings, load


@serve.ingress()
class Api:
    """The HTTP door. Holds no state: any number of replicas share the records."""

    def __init__(self, settings: dict[str, Any], dispatcher: DeploymentHandle) -> None:
        self.settings = ServeSettings.model_validate(settings)

    def __serve_build_asgi_app__(self) -> Any:
        from serve.api import create_api
        from serve.parts import open_parts

        logs.set_up(self.settings.log_level)
        return create_api(self.settings, open_parts(self.settings))


class DispatcherReplica:
    """The one dispatcher. The API holds a handle to it, so that Serve starts both."""

    def __init__(self, settings: dict[str, Any], engine: DeploymentHandle) -> None:
        from serve.dispatcher import Dispatcher
        from serve.metrics import TenantMetrics
        from serve.parts import open_jobs, open_outbox

        self.settings = ServeSettings.model_validate(settings)
        logs.set_up(self.settings.log_level)

        async def work() -> dict[str, Any]:
            return await engine.work.remote()

        self.dispatcher = Dispatcher(
            self.settings, open_jobs(self.settings), work, open_outbox(self.settings), TenantMetrics().queues
        )
        self.task = asyncio.get_running_loop().create_task(self.dispatcher.run())

    def check_health(self) -> None:
        """Raises what ended the dispatcher's task; Serve then starts another."""
        if self.task.done():
            self.task.result()


def app(arguments: dict[str, Any]) -> Application:
    """The Serve application from its settings (`serve.settings.ServeSettings`); called by `serve run` and `deploy`.

    Raises:
        RecipeError: an unknown or impossible setting.
    """
    settings = load(arguments)
    plain = settings.model_dump(mode="json")
    engine = serve.deployment(
        name="Engine",
        max_ongoing_requests=settings.max_batch,
        graceful_shutdown_timeout_s=settings.shutdown_s,
        health_check_timeout_s=max(30.0, settings.lease_s),
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.max_batch,
            "upscale_delay_s": 1.0,
            "downscale_delay_s": settings.idle_s,
            "downscale_to_zero_delay_s": settings.idle_s,
        },
    )(EngineReplica)
    dispatcher = serve.deployment(
        name="Dispatcher", ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=5
    )(DispatcherReplica)
    api = serve.deployment(name="Api", max_ongoing_requests=200, ray_actor_options={"num_cpus": 0.2})(Api)
    return api.bind(plain, dispatcher.bind(plain, engine.bind(plain)))
