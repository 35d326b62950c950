"""The adapter cache under many threads, and what is refused as an adapter."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from magicid import adapters
from magicid.adapters import MANIFEST_NAME, WEIGHTS_NAME, AdapterManifest
from magicid.backbones.mixed_lora import LoraWeights
from magicid.errors import AdapterError
from magicid.storage import sha256_bytes
from serve.adapter_cache import AdapterCache, CacheFull, CacheStats, load_adapter
from tests.backbones.test_adapters import trained_lora
from tests.tiny_models import tiny_recipe, tiny_wan_folder

SIZE = 64  # bytes of every adapter that `make` gives, but "big"


def make(location: str) -> LoraWeights:
    numbers = 16 if location == "big" else 4
    return LoraWeights({location: (torch.zeros(numbers, 2), torch.zeros(2, numbers))}, 1.0)


def use(cache: AdapterCache, *locations: str) -> None:
    for location in locations:
        cache.acquire(location)
        cache.release(location)


def until_waiting(cache: AdapterCache, count: int) -> None:
    """Return when `count` threads wait for another's load: their coming is a hit, and nothing else tells of it."""
    deadline = time.monotonic() + 20
    while cache.stats.hits < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_sixteen_waiters_cause_one_load() -> None:
    loads: Counter[str] = Counter()
    go = threading.Event()

    def load(location: str) -> LoraWeights:
        loads[location] += 1
        assert go.wait(20)
        return make(location)

    cache = AdapterCache(load, 10 * SIZE)
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(cache.acquire, "a") for _ in range(16)]
        until_waiting(cache, 15)
        assert not any(future.done() for future in futures)
        go.set()
        found = [future.result(20) for future in futures]
    assert loads == {"a": 1}
    assert all(lora is found[0] for lora in found)
    assert cache.stats == CacheStats(hits=15, misses=1, evictions=0, bytes=SIZE)
    for _ in range(16):
        cache.release("a")
    with pytest.raises(ValueError, match="not in use"):
        cache.release("a")


def test_loads_of_different_adapters_do_not_wait_for_each_other() -> None:
    together = threading.Barrier(3)

    def load(location: str) -> LoraWeights:
        together.wait(20)  # passes when three loads run at once
        return make(location)

    cache = AdapterCache(load, 10 * SIZE)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(cache.acquire, ["a", "b", "c"]))
    assert cache.resident() == {"a", "b", "c"}


def test_the_least_recently_used_leaves_first() -> None:
    cache = AdapterCache(make, 3 * SIZE)
    use(cache, "a", "b", "c", "a", "d")
    assert cache.resident() == {"a", "c", "d"}
    assert cache.stats == CacheStats(hits=1, misses=4, evictions=1, bytes=3 * SIZE)
    use(cache, "b")
    assert cache.resident() == {"a", "d", "b"}


def test_what_is_in_use_stays_and_what_has_no_room_is_refused() -> None:
    cache = AdapterCache(make, 3 * SIZE)
    for location in ("a", "b", "a"):
        cache.acquire(location)
    use(cache, "c", "d")
    assert cache.resident() == {"a", "b", "d"}
    cache.acquire("d")
    with pytest.raises(CacheFull, match="in use"):
        cache.acquire("e")
    assert cache.resident() == {"a", "b", "d"}
    cache.release("a")  # acquired twice: still in use
    with pytest.raises(CacheFull):
        cache.acquire("e")
    cache.release("a")
    cache.acquire("e")
    assert cache.resident() == {"b", "d", "e"}
    assert cache.stats.bytes == 3 * SIZE


def test_one_that_is_larger_than_the_bound_is_served_alone() -> None:
    cache = AdapterCache(make, 3 * SIZE)
    use(cache, "a", "b")
    assert cache.acquire("big").nbytes == 4 * SIZE
    assert cache.resident() == {"big"}
    with pytest.raises(CacheFull):
        cache.acquire("a")
    cache.release("big")
    use(cache, "a")
    assert cache.resident() == {"a"}


def test_a_failed_load_is_raised_to_all_and_tried_again() -> None:
    tries: Counter[str] = Counter()
    go = threading.Event()

    def load(location: str) -> LoraWeights:
        tries[location] += 1
        assert go.wait(20)
        if tries == {"a": 1}:
            raise AdapterError("adapter a is broken", "publish it again")
        return make(location)

    cache = AdapterCache(load, SIZE)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.acquire, "a") for _ in range(8)]
        until_waiting(cache, 7)
        go.set()
        errors = [future.exception(20) for future in futures]
    assert all(isinstance(error, AdapterError) for error in errors)
    assert cache.resident() == set()
    assert tries == {"a": 1}
    assert cache.acquire("a").nbytes == SIZE
    assert tries == {"a": 2}
    cache.release("a")  # those that failed count as no users
    use(cache, "b")
    assert cache.resident() == {"b"}


def test_the_bounds_hold_under_many_threads() -> None:
    loading: Counter[str] = Counter()
    problems: list[str] = []

    def load(location: str) -> LoraWeights:
        loading[location] += 1
        if loading[location] > 1:
            problems.append(f"{location} is loaded twice at once")
        lora = make(location)
        loading[location] -= 1
        return lora

    cache = AdapterCache(load, 4 * SIZE)

    def work(seed: int) -> int:
        draw, refused = random.Random(seed), 0
        for _ in range(300):
            location = draw.choice("abcdefgh")
            try:
                lora = cache.acquire(location)
            except CacheFull:
                refused += 1
                continue
            if list(lora.tensors) != [location]:
                problems.append("another adapter")
            if location not in cache.resident():
                problems.append(f"{location} was evicted in use")
            if cache.stats.bytes > 4 * SIZE:
                problems.append("too many bytes")
            cache.release(location)
        return refused

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert problems == []
    assert cache.stats.evictions > 10
    assert not any(entry.users for entry in cache._entries.values())
    use(cache, *"abcd")
    assert cache.resident() == set("abcd")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, torch.nn.Module]:
    """A run with two versions of ada and one of bruno, the base's hash, and the transformer."""
    root = tmp_path_factory.mktemp("published")
    recipe = tiny_recipe("wan-480p", tiny_wan_folder(root / "wan"))
    for identity, seed in (("ada", 1), ("ada", 2), ("bruno", 3)):
        backbone, state = trained_lora(recipe, seed=seed)
        manifest = AdapterManifest(backbone.base_sha256, "", recipe.lora.rank, recipe.lora.alpha)
        weights = adapters.to_bytes(state, recipe.lora.rank, recipe.lora.alpha)
        adapters.publish(str(root / "run"), identity, weights, manifest)
    return root / "run", backbone.base_sha256, backbone.transformer.eval()


def folders_of(run: Path, identity: str) -> list[Path]:
    return sorted(path.parent for path in (run / "adapters" / identity).rglob(MANIFEST_NAME))


def test_a_published_adapter_is_read_whole(published: tuple[Path, str, torch.nn.Module]) -> None:
    run, base, transformer = published
    folder = folders_of(run, "bruno")[0]
    lora = load_adapter(str(folder), base, transformer)
    state = adapters.load(str(folder / WEIGHTS_NAME))
    assert lora.scale == 8 / 4
    assert len(lora.tensors) == 16
    for name, (a, b) in lora.tensors.items():
        assert torch.equal(a, state[f"transformer.{name}.lora_A.weight"])
        assert torch.equal(b, state[f"transformer.{name}.lora_B.weight"])


@pytest.mark.parametrize(
    "damage", ["absent", "corrupt", "truncated", "pickle", "another base", "another version", "another identity"]
)
def test_what_is_not_the_adapter_is_refused(
    published: tuple[Path, str, torch.nn.Module], tmp_path: Path, damage: str
) -> None:
    run, base, transformer = published
    shutil.copytree(run, tmp_path / "run")
    (first, second), (foreign,) = (folders_of(tmp_path / "run", identity) for identity in ("ada", "bruno"))
    weights, manifest_file = first / WEIGHTS_NAME, first / MANIFEST_NAME
    data, manifest = weights.read_bytes(), json.loads(manifest_file.read_text())
    match = {
        "absent": "not whole",
        "corrupt": "truncated or corrupt",
        "truncated": "truncated or corrupt",
        "pickle": "not a safetensors file",
        "another base": "was made for base model",
    }.get(damage, "another identity's or version's")
    if damage == "absent":
        weights.unlink()
    elif damage == "corrupt":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "pickle":
        harmful = pickle.dumps({"transformer.x.lora_A.weight": [0.0]})
        weights.write_bytes(harmful)
        manifest_file.write_text(json.dumps({**manifest, "sha256": sha256_bytes(harmful)}))
    elif damage == "another base":
        manifest_file.write_text(json.dumps({**manifest, "base_sha256": "0" * 64}))
    else:
        source = second if damage == "another version" else foreign
        for name in (WEIGHTS_NAME, MANIFEST_NAME):
            shutil.copy(source / name, first / name)
    with pytest.raises(AdapterError, match=match):
        load_adapter(str(first), base, transformer)


def test_weights_swapped_with_their_hash_are_refused(
    published: tuple[Path, str, torch.nn.Module], tmp_path: Path
) -> None:
    run, base, transformer = published
    shutil.copytree(run, tmp_path / "run")
    first, second = folders_of(tmp_path / "run", "ada")
    shutil.copy(second / WEIGHTS_NAME, first / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        load_adapter(str(first), base, transformer)
    manifest = json.loads((first / MANIFEST_NAME).read_text())
    swapped = {**manifest, "sha256": sha256_bytes((second / WEIGHTS_NAME).read_bytes())}
    (first / MANIFEST_NAME).write_text(json.dumps(swapped))
    with pytest.raises(AdapterError, match="not the version that its folder names"):
        load_adapter(str(first), base, transformer)
