"""One replica's work: claimed jobs become rows of the engine's batch, and finished rows become clips on storage.

Three kinds of thread, so that none waits for another: the loop denoises, one encodes and writes, one renews leases.
The database is the truth: whatever this process believes, a record is written only with the fence of its claim.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from magicid import adapters
from magicid.backbones.mixed_lora import LoraWeights
from magicid.errors import AdapterError, MagicIDError, StorageError
from magicid.storage import exists, join
from serve.adapter_cache import AdapterCache, CacheFull
from serve.engine import BatchFull, Engine, Sample
from serve.jobs import JobStore
from serve.logs import describe
from serve.schema import CANCELLED, Job

_log = logging.getLogger("magicid.serve")
_SAMPLED = 99  # per cent: all steps are done, the clip is not stored yet


class Metrics(Protocol):
    """Where the worker's figures go; `serve.metrics.EngineMetrics` exports them."""

    def step(self, seconds: float, rows: int, identities: int, swaps: int) -> None:
        """One denoising step of the batch, before which `swaps` rows got another adapter."""

    def ended(self, outcome: str, wait_s: float, run_s: float) -> None:
        """One job left: `completed`, an error code, or `lost`."""

    def cache(self, cache: AdapterCache) -> None:
        """The adapter cache after a change."""


class ClipStore(Protocol):
    """Where finished videos go; `serve.clip_writer.ClipWriter` keeps them."""

    def write(self, job: Job, frames: np.ndarray) -> tuple[str, str]:
        """Store the clip of a job from frames uint8 (F, H, W, 3); returns its URI and SHA-256."""

    def remove(self, uri: str) -> None:
        """Remove a clip that nobody wants any more."""


def _running() -> Future[str]:
    """A future that a caller who leaves cannot cancel."""
    future: Future[str] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass
class _Claim:
    """A job this worker holds, until its future says how it ended."""

    job: Job
    lora: LoraWeights | None = None
    done: Future[str] = field(default_factory=_running)
    began: float = field(default_factory=time.monotonic)
    percent: int = 0


class Worker:
    """Claims jobs and makes their videos. `start` it, call `take` for each video wanted, `stop` it.

    Args:
        name: unique among all workers of the database.
        clips: where finished videos go.
        lease_s: a claim lapses when it is not renewed for this long.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        cache: AdapterCache,
        jobs: JobStore,
        clips: ClipStore,
        metrics: Metrics,
        *,
        lease_s: float,
    ) -> None:
        self.name, self.engine, self.cache, self.jobs = name, engine, cache, jobs
        self.clips, self.metrics, self.lease_s = clips, metrics, lease_s
        self._claims: dict[str, _Claim] = {}
        self._lock = threading.Lock()
        self._beating = threading.Lock()
        self._arrived: queue.Queue[_Claim | None] = queue.Queue()
        self._stopping, self._freed = threading.Event(), threading.Event()
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._loop, self._renew)]
        self.failure: Exception | None = None

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the step in progress; what is unfinished goes back to the queue."""
        self._stopping.set()
        self._arrived.put(None)
        for thread in self._threads:
            thread.join()
        self._finisher.shutdown()
        self._release_all()

    def take(self) -> Future[str] | None:
        """Claim the next job and bring its adapter; None when nothing waits, or as many are held as the batch takes.

        Blocks while an adapter is loaded. The future ends with `completed`, an error code, or `lost` when the record
        went to somebody else or back to the queue.
        """
        with self._lock:  # callers who left have left their claims here
            full = len(self._claims) >= self.engine.max_batch
        if full or self._stopping.is_set():
            return None
        claimed = self.jobs.claim(self.name, resident=self.cache.resident())
        if not claimed:
            return None
        claim = _Claim(claimed[0])
        self._hold(claim)
        try:
            self._bring(claim)
        except StorageError as error:
            self._leave(claim, error)
        except CacheFull:  # no room became free before this worker stopped
            self._give_back(claim, broken=self.failure is not None)
        except MagicIDError as error:
            self._fail(claim, "adapter_unusable", error)
        except Exception as error:  # such as a device without memory: perhaps better elsewhere, but not for ever
            _log.exception("the adapter of job %s was not loaded", claim.job.id, extra=_told(claim, error))
            self._give_back(claim, broken=True)
        else:
            self._arrived.put(claim)
            if self._stopping.is_set():  # by now nobody takes it in
                self._release_all(broken=self.failure is not None)
        return claim.done

    def _hold(self, claim: _Claim) -> None:
        with self._lock:
            old = self._claims.get(claim.job.id)
        if old is not None:  # its lease lapsed here, and it came back
            self._end(old, "lost")
        with self._lock:
            self._claims[claim.job.id] = claim

    def _bring(self, claim: _Claim) -> None:
        """Give the claim its adapter, unless it has ended meanwhile: then nobody else would release it."""
        lora = self._adapter(claim)
        with self._lock:
            held = self._claims.get(claim.job.id) is claim
            claim.lora = lora if held else None
        if lora is not None and not held:
            self._let_go(claim)

    def _let_go(self, claim: _Claim) -> None:
        """The claim's adapter may be evicted, as far as this claim is concerned."""
        self.cache.release(str(claim.job.target.location))
        self._freed.set()

    def _adapter(self, claim: _Claim) -> LoraWeights | None:
        """The claim's adapter, kept in memory until the claim ends. Waits while all room is in use."""
        location = claim.job.target.location
        if location is None:
            return None
        if not exists(join(location, adapters.MANIFEST_NAME)):  # one in memory may have been deleted since
            raise AdapterError("the adapter is there no more", "choose another version")
        while True:
            self._freed.clear()
            try:
                lora = self.cache.acquire(location)
            except CacheFull:
                if self._stopping.is_set() or claim.done.done():
                    raise
                self._freed.wait(self.lease_s)
            else:
                self.metrics.cache(self.cache)
                return lora

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while not self._stopping.is_set():
                self._admit_arrived()
                if not self.engine.progress():
                    continue
                began, swaps = time.perf_counter(), self.engine.swaps
                rows, identities = self._batch()
                samples = self.engine.step()
                self.metrics.step(time.perf_counter() - began, rows, identities, self.engine.swaps - swaps)
                self._sampled(samples)
                self._try_beat()
        except Exception as error:  # out of memory, a broken device: this process is of no more use
            _log.exception("the engine failed; its jobs go back to the queue")
            self.failure = error
            self._stopping.set()
            self._release_all(broken=True)

    def _admit_arrived(self) -> None:
        """Take in what has arrived; with an empty batch, wait for it."""
        block = not self.engine.progress()
        while True:
            try:
                claim = self._arrived.get(block=block)
            except queue.Empty:
                return
            if claim is None or self._claims.get(claim.job.id) is not claim:  # stopping, or ended before it came here
                return
            block = False
            try:
                self.engine.admit(claim.job.id, claim.job.request, claim.lora)
            except BatchFull:
                self._give_back(claim)
            except MagicIDError as error:
                self._fail(claim, "generation_failed", error)
            with self._lock:
                if self._claims.get(claim.job.id) is not claim:  # it ended while its prompt was encoded
                    self.engine.drop(claim.job.id)

    def _batch(self) -> tuple[int, int]:
        """Rows in the batch, and how many identities they are of."""
        with self._lock:
            active = [self._claims[key].job.target.location for key in self.engine.progress() if key in self._claims]
        return len(active), len(set(active))

    def _sampled(self, samples: list[Sample]) -> None:
        """Hand what left the batch to the finisher; the loop goes on with the next step."""
        ready: list[tuple[_Claim, Tensor]] = []
        for sample in samples:
            with self._lock:
                claim = self._claims.get(sample.key)
            if claim is None:
                continue
            claim.percent = _SAMPLED  # the clip is not written yet
            if sample.latents is None:
                self._fail(claim, "generation_failed", sample.error or RuntimeError("no latents and no reason"))
            else:
                ready.append((claim, sample.latents))
        if ready:
            self._finisher.submit(self._finish, ready)

    def _finish(self, ready: list[tuple[_Claim, Tensor]]) -> None:
        """Decode, encode, sign, store, and only then tell the record; one that went to another keeps the other's."""
        try:
            clips = self.engine.decode_all([(latents, claim.job.request) for claim, latents in ready])
        except Exception as error:
            if len(ready) == 1:
                self._fail(ready[0][0], "generation_failed", error)
            else:  # one that cannot be decoded takes no other along
                for each in ready:
                    self._finish([each])
            return
        for (claim, _), frames in zip(ready, clips):
            try:
                uri, digest = self.clips.write(claim.job, frames)
                kept = self.jobs.complete(claim.job.id, claim.job.fence, video_uri=uri, video_sha256=digest)
                if not kept:  # deleted or cancelled meanwhile, or another worker's by now
                    self.clips.remove(uri)
                self._end(claim, "completed" if kept else "lost")
            except (StorageError, SQLAlchemyError) as error:
                self._leave(claim, error)
            except Exception as error:
                self._fail(claim, "generation_failed", error)

    # ---- leases --------------------------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Renew leases also while the loop is busy with a long step or a decode."""
        while not self._stopping.wait(self.lease_s / 4):
            self._try_beat()

    def _try_beat(self) -> None:
        try:
            self._beat()
        except (StorageError, SQLAlchemyError) as error:  # the database may come back before the leases lapse
            _log.warning("leases could not be renewed: %s", type(error).__name__, extra={"error": describe(error)})

    def _beat(self) -> None:
        """Tell progress, renew leases, and drop what was cancelled or went to another worker."""
        with self._beating:
            progress = self.engine.progress()
            with self._lock:
                held = dict(self._claims)
            for key, claim in held.items():
                claim.percent = max(claim.percent, min(_SAMPLED, progress.get(key, 0)))
            if not held:
                return
            told = {key: (claim.job.fence, claim.percent) for key, claim in held.items()}
            for key in self.jobs.heartbeat(self.name, told):
                ours = self.jobs.fail(key, held[key].job.fence, CANCELLED, "cancelled on request")
                self._end(held[key], CANCELLED if ours else "lost")

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _fail(self, claim: _Claim, code: str, error: Exception) -> None:
        _log.warning("job %s failed: %s", claim.job.id, code, extra=_told(claim, error) | {"code": code})
        try:  # the client is told the code's meaning: what went wrong names folders
            self.jobs.fail(claim.job.id, claim.job.fence, code, "")
        except (StorageError, SQLAlchemyError) as away:  # the lease lapses, and the job is tried again
            _log.warning("that could not be recorded", extra=_told(claim, away))
        self._end(claim, code)

    def _leave(self, claim: _Claim, error: Exception) -> None:
        """Storage or database are away: the lease lapses, and the job is tried again, so often as attempts allow."""
        _log.warning("job %s is left until storage is back", claim.job.id, extra=_told(claim, error))
        self._end(claim, "storage_failed")

    def _give_back(self, claim: _Claim, *, broken: bool = False) -> None:
        try:
            self.jobs.release(claim.job.id, claim.job.fence, broken=broken)
        except (StorageError, SQLAlchemyError) as away:  # its lease lapses
            _log.warning("job %s could not be given back", claim.job.id, extra=_told(claim, away))
        self._end(claim, "lost")

    def _end(self, claim: _Claim, outcome: str) -> None:
        with self._lock:
            if self._claims.get(claim.job.id) is not claim:
                return
            del self._claims[claim.job.id]
            self.engine.drop(claim.job.id)
            has_lora = claim.lora is not None
        if has_lora:
            self._let_go(claim)
        waited = max(0.0, (claim.job.started_at or claim.job.created_at) - claim.job.created_at)
        self.metrics.ended(outcome, waited, time.monotonic() - claim.began)
        claim.done.set_result(outcome)

    def _release_all(self, *, broken: bool = False) -> None:
        with self._lock:
            held = list(self._claims.values())
        for claim in held:
            self._give_back(claim, broken=broken)


def _told(claim: _Claim, error: Exception) -> dict[str, object]:
    """What a log line about a claim carries."""
    return {"job": claim.job.id, "request_id": claim.job.request_id, "error": describe(error)}
