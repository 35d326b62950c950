"""Adapters in memory: loaded once for many, bounded in bytes, never taken away from a video that uses them."""

from __future__ import annotations

import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import safetensors
import safetensors.torch
from torch import nn

from magicid import adapters
from magicid.backbones.mixed_lora import LoraWeights
from magicid.errors import AdapterError
from magicid.storage import join, read_bytes, sha256_bytes


class CacheFull(AdapterError):
    """All room is taken by adapters in use; it passes when a video ends."""


@dataclass(frozen=True)
class CacheStats:
    """Counts since the start, and what is held now.

    Attributes:
        hits: acquisitions that needed no load of their own (those that waited for another's load included).
        misses: loads begun.
        bytes: of the adapters held.
    """

    hits: int
    misses: int
    evictions: int
    bytes: int


@dataclass
class _Entry:
    loaded: Future[LoraWeights] = field(default_factory=Future)
    users: int = 0
    nbytes: int = 0  # 0 while loading


class AdapterCache:
    """Least recently used adapters leave first; those in use stay. Safe for several threads.

    Args:
        load: makes an adapter from its location; called without a lock held, once for all who wait.
        max_bytes: bound on the adapters held. A single one may be larger.
    """

    def __init__(self, load: Callable[[str], LoraWeights], max_bytes: int) -> None:
        self._load, self._max_bytes = load, max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._hits = self._misses = self._evictions = 0

    def acquire(self, location: str) -> LoraWeights:
        """The adapter at a location, which stays in memory until `release`. Blocks while it is loaded.

        Raises:
            CacheFull: with those in use it would exceed `max_bytes`.
            Exception: what `load` raised; all who wait get it, and the next call tries again.
        """
        with self._lock:
            entry = self._entries.get(location)
            mine = entry is None
            if entry is None:
                entry = self._entries[location] = _Entry()
                self._misses += 1
            else:
                self._hits += 1
            entry.users += 1
            self._entries.move_to_end(location)
        if mine:
            self._fill(location, entry)
        return entry.loaded.result()

    def _fill(self, location: str, entry: _Entry) -> None:
        try:
            lora = self._load(location)
            with self._lock:
                self._make_room(location, lora.nbytes)
                entry.nbytes = lora.nbytes
        except BaseException as error:
            with self._lock:
                del self._entries[location]
            entry.loaded.set_exception(error)
        else:
            entry.loaded.set_result(lora)

    def _make_room(self, location: str, nbytes: int) -> None:
        """Evict what is not in use until `nbytes` more fit."""
        held = {name: entry for name, entry in self._entries.items() if entry.nbytes}
        in_use = sum(entry.nbytes for entry in held.values() if entry.users)
        if in_use and in_use + nbytes > self._max_bytes:
            raise CacheFull(
                f"adapter {location} needs {nbytes} bytes, and {in_use} of {self._max_bytes} are in use",
                "wait until a video ends, or raise cache_bytes",
            )
        total = sum(entry.nbytes for entry in held.values())
        for name, entry in held.items():
            if total + nbytes <= self._max_bytes:
                break
            if not entry.users:
                del self._entries[name]
                self._evictions += 1
                total -= entry.nbytes

    def release(self, location: str) -> None:
        """Give back what one `acquire` gave. Raises ValueError when nobody holds it."""
        with self._lock:
            entry = self._entries.get(location)
            if entry is None or not entry.users:
                raise ValueError(f"adapter {location} is not in use")
            entry.users -= 1

    def resident(self) -> set[str]:
        """Locations of the adapters in memory."""
        with self._lock:
            return {location for location, entry in self._entries.items() if entry.nbytes}

    @property
    def stats(self) -> CacheStats:
        """Counts and bytes now."""
        with self._lock:
            held = sum(entry.nbytes for entry in self._entries.values())
            return CacheStats(self._hits, self._misses, self._evictions, held)


def load_adapter(location: str, base_sha256: str, transformer: nn.Module) -> LoraWeights:
    """Read a published adapter, `.../<identity>/<version>`, for a transformer; only what its manifest vouches for.

    Raises:
        AdapterError: a file is missing, truncated, corrupt or not safetensors, it was made for another base model, it
            is another identity's or version's, or its tensors do not fit the transformer.
    """
    manifest = adapters.verify(location, base_sha256)
    folder, version = posixpath.split(location.rstrip("/"))
    if [posixpath.basename(folder), version] != [manifest.get("identity_id"), manifest.get("version")]:
        raise AdapterError(f"adapter {location} holds another identity's or version's files", "publish it again")
    data = read_bytes(join(location, adapters.WEIGHTS_NAME))
    if sha256_bytes(data) != manifest["sha256"] or not manifest["sha256"].startswith(version):
        raise AdapterError(f"adapter {location} is not the version that its folder names", "publish it again")
    return LoraWeights.from_published(safetensors.torch.load(data), manifest["alpha"], transformer)
