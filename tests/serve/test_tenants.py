"""Tenants: keys that cannot be read back, grants, and a rate that holds over all processes."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve.database import Database, tenants
from serve.tenants import Tenant, TenantError, TenantStore, may_use


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database: Database, clock: Clock) -> TenantStore:
    return TenantStore(database, clock)


def signed_in(store: TenantStore, key: str) -> Tenant:
    tenant = store.authenticate(key)
    assert tenant is not None
    return tenant


def test_a_key_opens_its_own_tenant_and_nothing_else_does(store: TenantStore) -> None:
    ada = store.add("ada", weight=2.5, max_open=3, requests_per_minute=60, grants=["carla", "dora", "carla"])
    bob = store.add("bob", admin=True)
    expected = Tenant("ada", False, 2.5, 3, 60, frozenset({"carla", "dora"}))
    assert store.authenticate(ada) == expected
    assert store.authenticate(bob) == Tenant("bob", True, 1.0, 100, 600, frozenset())
    assert store.list() == [expected, store.authenticate(bob)]
    for wrong in (
        "",
        ada[:-1],
        ada + "x",
        ada.swapcase(),
        ada[:12],
        f" {ada}",
        f"{ada}\0",
        "ada",
        "ключ" * 12,
        "\ud800",
    ):
        assert store.authenticate(wrong) is None


def test_two_keys_that_begin_alike_open_two_tenants(store: TenantStore) -> None:
    for name in ("ada", "bob"):
        assert (
            store.add(name, key=f"the-same-beginning-of-a-long-key-{name}")
            == f"the-same-beginning-of-a-long-key-{name}"
        )
    for name in ("ada", "bob"):
        assert signed_in(store, f"the-same-beginning-of-a-long-key-{name}").name == name


def test_a_stored_key_cannot_be_read_back(store: TenantStore, database: Database) -> None:
    key = store.add("ada")
    again = f"{key[:12]}{'x' * 40}"
    store.add("bob", key=again)
    with database.reading() as connection:
        rows = connection.execute(sa.select(tenants)).mappings().all()
    for row in rows:
        assert not any(key[12:] in str(value) or again[12:] in str(value) for value in row.values())
    assert len({row["key_salt"] for row in rows}) == 2


def test_a_tenant_that_cannot_be_is_refused(store: TenantStore) -> None:
    key = store.add("ada")
    with pytest.raises(TenantError, match="'ada' already"):
        store.add("ada")
    assert signed_in(store, key).name == "ada"
    for key in ("short", "ä" * 40, "\n" * 40):
        with pytest.raises(TenantError, match="'bob'") as caught:
            store.add("bob", key=key)
        assert key not in str(caught.value)
    for limits in ({"weight": 0}, {"weight": float("nan")}, {"max_open": 0}, {"requests_per_minute": 0}):
        with pytest.raises(TenantError, match="above 0"):
            store.add("bob", **limits)  # type: ignore[arg-type]
    for name in ("", "a\nb", "a\0b"):
        with pytest.raises(TenantError, match="name"):
            store.add(name)
    for change in (store.remove, lambda name: store.grant(name, "x"), lambda name: store.revoke(name, "x")):
        with pytest.raises(TenantError, match="no tenant 'nobody'"):
            change("nobody")
    assert [tenant.name for tenant in store.list()] == ["ada"]


def test_grants_are_given_and_taken_back(store: TenantStore) -> None:
    key = store.add("ada")
    assert not may_use(signed_in(store, key), "carla", "team-c")
    store.grant("ada", "carla")
    store.grant("ada", "carla")
    assert may_use(signed_in(store, key), "carla", "team-c")
    assert not may_use(signed_in(store, key), "dora", "team-c")
    store.revoke("ada", "carla")
    store.revoke("ada", "carla")
    assert signed_in(store, key).grants == frozenset()


def test_owners_and_admins_need_no_grant(store: TenantStore) -> None:
    ada, root = signed_in(store, store.add("ada")), signed_in(store, store.add("root", admin=True))
    assert may_use(ada, "x", "ada")
    assert may_use(root, "x", "ada")
    assert not may_use(ada, "x", "bob")
    assert not may_use(ada, "x", None)


def test_a_removed_tenant_is_gone_with_its_grants(store: TenantStore) -> None:
    key = store.add("ada", grants=["carla"])
    ada = signed_in(store, key)
    store.remove("ada")
    assert store.authenticate(key) is None
    assert store.take(ada) == 0.0  # a request that was let in before
    assert signed_in(store, store.add("ada")).grants == frozenset()


def test_other_processes_hear_of_a_change_within_a_second(
    store: TenantStore, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    other, key = TenantStore(database), store.add("ada")
    assert signed_in(other, key).grants == frozenset()
    store.grant("ada", "carla")
    assert signed_in(store, key).grants == {"carla"}, "at once where it was made"
    assert signed_in(other, key).grants == frozenset()
    now[0] += 1.01
    assert signed_in(other, key).grants == {"carla"}
    store.remove("ada")
    assert store.authenticate(key) is None
    now[0] += 1.01
    assert other.authenticate(key) is None


def test_a_seconds_worth_is_paid_at_once_and_no_more_than_the_rate(
    store: TenantStore, database: Database, clock: Clock
) -> None:
    ada = signed_in(store, store.add("ada", requests_per_minute=600))
    other = TenantStore(database, clock)
    assert [store.take(ada), other.take(ada)] == [0.0, 0.0]
    with database.reading() as connection:
        assert connection.execute(sa.select(tenants.c.tokens)).scalar_one() == 600 - 2 * 10
    allowed = 2 + sum(each.take(ada) == 0.0 for _ in range(400) for each in (store, other))
    assert allowed == 600


def test_the_rate_is_a_bucket_that_fills_with_time(store: TenantStore, clock: Clock) -> None:
    ada = signed_in(store, store.add("ada", requests_per_minute=30))
    bob = signed_in(store, store.add("bob", requests_per_minute=30))
    assert [store.take(ada) for _ in range(30)] == [0.0] * 30
    assert store.take(ada) == pytest.approx(2.0)
    clock.now += 0.5
    assert store.take(ada) == pytest.approx(1.5)
    assert store.take(bob) == 0.0
    clock.now += 1.5
    assert store.take(ada) == 0.0
    assert store.take(ada) == pytest.approx(2.0)
    clock.now -= 50  # another machine's clock
    assert store.take(ada) == pytest.approx(2.0)
    clock.now += 1_000_000
    assert [store.take(ada) for _ in range(30)] == [0.0] * 30
    assert store.take(ada) > 0


def _take(url: str, key: str, start: multiprocessing.synchronize.Barrier, result: Path) -> None:
    store = TenantStore(Database(url), lambda: 1000.0)
    ada = signed_in(store, key)
    start.wait(60)
    with ThreadPoolExecutor(4) as pool:
        result.write_text(str(sum(wait == 0.0 for wait in pool.map(lambda _: store.take(ada), range(40)))))


def test_the_rate_holds_over_threads_and_processes(store: TenantStore, database_url: str, tmp_path: Path) -> None:
    key = store.add("ada", requests_per_minute=50)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    results = [tmp_path / str(place) for place in range(2)]
    processes = [context.Process(target=_take, args=(database_url, key, start, result)) for result in results]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sum(int(result.read_text()) for result in results) == 50
