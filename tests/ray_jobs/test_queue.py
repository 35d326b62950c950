"""The weighted-fair queue: order, shares, quotas, ageing, holders, attempts."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest

from ray_jobs.queue import FairQueue, Task, due_time


def task(name: str, owner: str = "a", cost: float = 10, due: float = 0.0) -> Task:
    return Task(task_id=name, owner=owner, cost=cost, due=due)


def queue(*tasks: Task, **settings: object) -> FairQueue:
    made = FairQueue(**settings)  # type: ignore[arg-type]
    for each in tasks:
        made.put(each)
    return made


def drain(made: FairQueue) -> list[str]:
    order = []
    while (taken := made.take("slot")) is not None:
        order.append(taken.task_id)
        made.done("slot", {})
    return order


def jain(values: list[float]) -> float:
    """Jain's index: 1 where all are equal, 1 / n where one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def test_a_small_owner_is_not_kept_waiting_by_a_large_one() -> None:
    assert drain(queue(task("a1"), task("a2"), task("a3"), task("b1", owner="b"))) == ["a1", "b1", "a2", "a3"]


def test_weights_give_shares() -> None:
    tasks = [task(f"a{i}") for i in range(4)] + [task(f"b{i}", owner="b") for i in range(2)]
    # b has half of a's weight: after one task each, b is at 20 units and a at 10, so a is served again
    assert drain(queue(*tasks, weights={"b": 0.5})) == ["a0", "b0", "a1", "a2", "b1", "a3"]


def test_service_is_fair_in_every_window_whatever_the_loads() -> None:
    """Weights 1:1:2; a has 400 cheap tasks, b 60 dear ones, c 300: while all wait, Jain's index stays >= 0.95."""
    random.seed(4)
    tasks = [task(f"a{i}", "a", random.uniform(5, 15)) for i in range(400)]
    tasks += [task(f"b{i}", "b", random.uniform(25, 35)) for i in range(60)]
    tasks += [task(f"c{i}", "c", random.uniform(15, 25)) for i in range(300)]
    made, served = queue(*tasks, weights={"c": 2.0}), []
    waiting = Counter(each.owner for each in tasks)
    costs = {each.task_id: each.cost for each in tasks}
    while all(waiting.values()):
        taken = made.take("slot")
        assert taken is not None
        made.done("slot", {})
        waiting[taken.owner] -= 1
        served.append(taken)
    window = 40
    for first in range(len(served) - window):
        part = served[first : first + window]
        shares = [sum(costs[t.task_id] for t in part if t.owner == o) / w for o, w in (("a", 1), ("b", 1), ("c", 2))]
        assert jain(shares) >= 0.95, (first, shares)


def test_what_comes_up_is_what_is_taken_next() -> None:
    tasks = [
        task(f"{o}{n}", o, cost=1 + n % 3, due=-n % 4)
        for o, load in (("a", 9), ("b", 4), ("c", 7))
        for n in range(load)
    ]
    made = queue(*tasks, weights={"b": 2.0})
    for number in (3, len(tasks)):
        made.take(f"slot-{number}")
        upcoming = [each.task_id for each in made.upcoming(number)]
        assert upcoming == drain(copy.deepcopy(made))[: len(upcoming)]
    assert made.upcoming(2) == made.upcoming(9)[:2]


def test_who_comes_back_after_a_pause_is_neither_ahead_nor_behind() -> None:
    made = queue(*(task(f"a{i}") for i in range(8)), task("b0", owner="b"))
    assert [made.take("slot").task_id for _ in range(6) if made.done("slot", {}) is None]  # type: ignore[union-attr]
    for number in range(1, 4):
        made.put(task(f"b{number}", owner="b"))
    made.done("slot", {})
    assert drain(made) == ["b1", "a5", "b2", "a6", "b3", "a7"]


def test_priority_wins_for_a_while_and_ageing_in_the_end() -> None:
    def due(arrived: float, priority: int = 0, deadline: float | None = None) -> float:
        return due_time(arrived, priority, deadline, ageing_s=100, deadline_lead_s=1000)

    low, high, late = task("low", due=due(0)), task("high", due=due(150, 2)), task("late", due=due(250, 2))
    assert drain(queue(low, high, late)) == ["high", "low", "late"]
    # a deadline in 900 s is due 100 s ago; one far away changes nothing
    assert drain(queue(low, task("soon", due=due(50, deadline=900)), task("far", due=due(50, deadline=9e9)))) == [
        "soon", "low", "far",
    ]  # fmt: skip


def test_priority_orders_within_an_owner_only() -> None:
    assert drain(queue(task("low"), task("high", due=-5), task("other", owner="b", due=9))) == ["high", "other", "low"]


def test_a_quota_holds_while_tasks_are_held() -> None:
    made = queue(task("a1"), task("a2"), task("b1", owner="b"), quotas={"a": 1})
    assert made.take("one").task_id == "a1"  # type: ignore[union-attr]
    assert made.take("two").task_id == "b1"  # type: ignore[union-attr]
    assert made.take("three") is None
    made.done("one", {})
    assert made.take("three").task_id == "a2"  # type: ignore[union-attr]


def test_no_more_is_held_than_allowed() -> None:
    made = queue(task("x"), task("y"), max_held=1)
    assert made.take("one") is not None
    assert made.take("two") is None
    made.finish("x")
    assert made.take("two").task_id == "y"  # type: ignore[union-attr]


def test_a_holder_that_comes_back_gets_its_task_until_attempts_are_used_up() -> None:
    made = queue(task("poison"), task("good"), max_attempts=2)
    assert [made.take("slot").task_id for _ in range(2)] == ["poison", "poison"]  # type: ignore[union-attr]
    assert made.take("slot").task_id == "good"  # type: ignore[union-attr]
    (ended,) = made.ended()
    assert (ended.task_id, ended.state, ended.attempts) == ("poison", "failed", 2)
    assert ended.error == "its process died (try 2 of 2)"


def test_a_lost_holder_gives_its_task_back_and_the_last_reason_is_kept() -> None:
    made = queue(task("x"), max_attempts=2)
    made.take("one")
    made.release("one", "out of memory")
    assert made.take("two").task_id == "x"  # type: ignore[union-attr]
    made.release("two", "worker died")
    (ended,) = made.ended()
    assert (ended.state, ended.attempts, ended.error) == ("failed", 2, "worker died (try 2 of 2)")
    assert made.take("three") is None


def test_a_lost_machine_costs_no_try() -> None:
    made = queue(task("x"), max_attempts=1)
    for holder in ("one", "two", "three"):
        assert made.take(holder).task_id == "x"  # type: ignore[union-attr]
        made.release(holder, "node lost", counted=False)
    assert made.ended() == []
    assert len(made) == 1


def test_a_cancelled_task_is_nobodys() -> None:
    made = queue(task("x"), task("y"))
    assert made.take("one").task_id == "x"  # type: ignore[union-attr]
    assert made.progress("one", "x", {"step": 1})
    made.cancel("x")
    made.cancel("y")
    assert not made.progress("one", "x", {"step": 2})
    made.done("one", {})
    assert made.ended() == []
    assert made.take("one") is None


def test_waiting_is_counted_by_owner_on_the_given_clock() -> None:
    now = [100.0]
    made = FairQueue(clock=lambda: now[0])
    made.put(task("x"))
    now[0] = 130.0
    made.put(task("y"))
    made.put(task("z", owner="b"))
    assert made.ages() == {"a": 30.0, "b": 0.0}
    made.take("one")
    now[0] = 150.0
    made.done("one", {"loss": 1.0})
    (ended,) = made.ended()
    assert (ended.seconds, ended.result) == (pytest.approx(20.0), {"loss": 1.0})
    assert made.ended() == []


def test_a_late_word_on_a_task_does_not_touch_the_next_one() -> None:
    made = queue(task("one"), task("two"))
    made.take("slot")
    made.call_for("one", "slot", "done", {})
    made.take("slot")
    made.call_for("one", "slot", "fail", "late")  # another worker of the slot, about the task before
    assert made.held()["slot"].task.task_id == "two"
    made.call_for("two", "slot", "fail", "its own")
    assert [(ended.task_id, ended.state, ended.error) for ended in made.ended()] == [
        ("one", "done", None),
        ("two", "failed", "its own"),
    ]
