"""The fleet's figures for Prometheus, through Ray's exporter on the driver's node; there `ray_` comes before a name.

| metric                          | labels          | what                                                            |
|---------------------------------|-----------------|-----------------------------------------------------------------|
| magicid_fleet_identities        | state           | identities: waiting, running, done, failed, cancelled           |
| magicid_fleet_under_way         | stage           | running identities in each stage                                |
| magicid_fleet_busy_fraction     | stage           | of a pool's actors or the training slots, over 5 minutes        |
| magicid_fleet_queue_tasks       | queue, kind     | waiting and held tasks of the queues training, clips, admission |
| magicid_fleet_queue_age_seconds | queue, owner    | how long the oldest task of a tenant has waited                 |
| magicid_fleet_attempts          | stage           | a counter: tries of clips and of training stages                |
| magicid_fleet_device_seconds    | stage, identity | a counter: GPU-seconds, or those of a worker without a GPU      |

Prometheus keeps a series for every value of a label, so the label `identity` is bounded: the first IDENTITIES of a run
have their own, all later ones are `others`, clips that all share are `shared`. The ledger has the figures of everybody.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from ray.util import metrics as ray_metrics

from magicid import ledger
from magicid.recipe import Recipe, Resources
from ray_jobs.work import TRAINING

EVERY_S = 5.0  # Ray's exporter takes the newest value every ten seconds
WINDOW_S = 300.0
IDENTITIES, OTHERS, SHARED = 100, "others", "shared"
ADMISSION = "admission"
_STAGES = {  # pool's section of the recipe -> its stages, which are the names under which seconds are counted
    "generator": ("GenerateClips",),
    "identity": ("ScoreIdentity", "MeasureClips"),
    "motion": ("ScoreMotion",),
    "semantics": ("ScoreSemantics",),
}


def devices(resources: Resources) -> dict[str, float]:
    """Stage -> GPUs that one of its workers holds; 1 where it holds none, and its own seconds count."""
    return {stage: getattr(resources, pool).gpus or 1.0 for pool, stages in _STAGES.items() for stage in stages}


class Busy:
    """The part of some workers' time that was spent at work, over a sliding window.

    Args:
        workers: how many there are at most.
    """

    def __init__(self, workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._workers, self._clock = workers, clock
        self._began = clock()
        self._spent: deque[tuple[float, float]] = deque()  # when it was told, seconds
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count work that has just ended."""
        self._spent.append((self._clock(), seconds))
        self._sum += seconds

    def fraction(self) -> float:
        """0..1."""
        now = self._clock()
        while self._spent and self._spent[0][0] < now - WINDOW_S:
            self._sum -= self._spent.popleft()[1]
        window = min(WINDOW_S, now - self._began)
        return min(1.0, max(0.0, self._sum) / (window * self._workers)) if window > 0 else 0.0


class FleetMetrics:
    """What the driver reports; needs a Ray cluster. Every method is quick."""

    def __init__(self, recipe: Recipe, clock: Callable[[], float] = time.monotonic) -> None:
        resources = recipe.resources
        self._clock, self._reported, self._looked = clock, -EVERY_S, clock()
        self._named: set[str] = set()
        self._devices = devices(resources)
        self._busy = {TRAINING: Busy(resources.slots, clock)}
        for pool, stages in _STAGES.items():
            size = getattr(resources, pool)
            workers = max(size.min_size, size.max_size)
            self._busy |= {stage: Busy(workers, clock) for stage in stages}
        gauge, counter = ray_metrics.Gauge, ray_metrics.Counter
        self.identities = gauge("magicid_fleet_identities", "Identities by state.", ("state",))
        self.under_way = gauge("magicid_fleet_under_way", "Running identities by stage.", ("stage",))
        self.busy = gauge("magicid_fleet_busy_fraction", "Busy part of a pool or of the slots.", ("stage",))
        self.tasks = gauge("magicid_fleet_queue_tasks", "Tasks of a queue, waiting and held.", ("queue", "kind"))
        self.ages = gauge("magicid_fleet_queue_age_seconds", "Age of a tenant's oldest task.", ("queue", "owner"))
        self.attempts = counter("magicid_fleet_attempts", "Tries of clips and training stages.", ("stage",))
        self.seconds = counter("magicid_fleet_device_seconds", "Device-seconds spent.", ("stage", "identity"))
        self._owners: dict[str, set[str]] = {}

    def spent(self, identity_id: str | None, seconds: Mapping[str, float]) -> None:
        """Count seconds of an identity: of a pool's workers, or of the GPUs that trained it; None: of shared clips."""
        for stage, value in seconds.items():
            if value > 0:
                self.seconds.inc(
                    value * self._devices.get(stage, 1.0), {"stage": stage, "identity": self.label(identity_id)}
                )
            if stage in self._busy:
                self._busy[stage].add(value)

    def tried(self, stage: str, attempts: int) -> None:
        """Count the tries that something took."""
        if attempts > 0:
            self.attempts.inc(attempts, {"stage": stage})

    def training(self, held: int) -> None:
        """So many slots are at work; asked often, since training tells its seconds only at its end."""
        now = self._clock()
        self._busy[TRAINING].add(held * (now - self._looked))
        self._looked = now

    @property
    def due(self) -> bool:
        """Whether it is time for `report`."""
        return self._clock() - self._reported >= EVERY_S

    def report(
        self,
        states: Mapping[str, int],
        under_way: Mapping[str, int],
        queues: Mapping[str, tuple[int, int, Mapping[str, float]]],
    ) -> None:
        """Set every gauge.

        Args:
            states, under_way: identities by state, and those that run by stage.
            queues: by name: tasks that wait, tasks held, seconds that the oldest task of each owner has waited.
        """
        self._reported = self._clock()
        for state in ledger.STATES:
            self.identities.set(states.get(state, 0), {"state": state})
        for stage in ledger.STAGES:
            self.under_way.set(under_way.get(stage, 0), {"stage": stage})
        for stage, busy in self._busy.items():
            self.busy.set(busy.fraction(), {"stage": stage})
        for queue, (waiting, held, ages) in queues.items():
            self.tasks.set(waiting, {"queue": queue, "kind": "waiting"})
            self.tasks.set(held, {"queue": queue, "kind": "held"})
            known = self._owners.setdefault(queue, set())
            known.update(ages)
            for owner in known:  # a gauge keeps its last value: who no longer waits is 0
                self.ages.set(ages.get(owner, 0.0), {"queue": queue, "owner": owner})

    def label(self, identity_id: str | None) -> str:
        """The value of the label `identity`."""
        if identity_id is None:
            return SHARED
        if len(self._named) < IDENTITIES:
            self._named.add(identity_id)
        return identity_id if identity_id in self._named else OTHERS
