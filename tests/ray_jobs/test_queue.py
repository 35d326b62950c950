"""The weighted-fair queue: order, leases, attempts."""

from __future__ import annotations

from ray_jobs.queue import FairQueue, Task


def task(name: str, owner: str = "a", steps: int = 10, priority: int = 0) -> Task:
    return Task(task_id=name, owner=owner, stage="sft", steps=steps, priority=priority)


def drain(queue: FairQueue) -> list[str]:
    order = []
    while (taken := queue.take("slot")) is not None:
        order.append(taken.task_id)
        queue.done("slot", {})
    return order


def test_a_small_owner_is_not_kept_waiting_by_a_large_one() -> None:
    queue = FairQueue([task("a1"), task("a2"), task("a3"), task("b1", owner="b")])
    assert drain(queue) == ["a1", "b1", "a2", "a3"]


def test_weights_give_shares() -> None:
    tasks = [task(f"a{i}") for i in range(4)] + [task(f"b{i}", owner="b") for i in range(2)]
    # b has half of a's weight: after one task each, b has used 20 units and a 10, so a is served again
    assert drain(FairQueue(tasks, weights={"b": 0.5})) == ["a0", "b0", "a1", "a2", "b1", "a3"]


def test_priority_orders_within_an_owner_only() -> None:
    queue = FairQueue([task("low"), task("high", priority=5), task("other", owner="b", priority=-1)])
    assert drain(queue) == ["high", "other", "low"]


def test_a_slot_that_comes_back_gets_its_task_until_attempts_are_used_up() -> None:
    queue = FairQueue([task("poison"), task("good")], max_attempts=2)
    assert [queue.take("slot").task_id for _ in range(2)] == ["poison", "poison"]
    assert queue.take("slot").task_id == "good"
    outcome = queue.outcomes()["poison"]
    assert (outcome.state, outcome.attempts) == ("failed", 2)
    assert "died 2 times" in str(outcome.error)


def test_what_waits_can_be_failed_together() -> None:
    queue = FairQueue([task("x"), task("y")])
    queue.take("slot")
    queue.fail_waiting("no such model")
    states = {name: (outcome.state, outcome.error) for name, outcome in queue.outcomes().items()}
    assert states == {"x": ("running", None), "y": ("failed", "no such model")}


def test_a_lost_slot_gives_its_task_back() -> None:
    queue = FairQueue([task("x")], max_attempts=2)
    queue.take("one")
    queue.release("one", "slot lost")
    assert queue.take("two").task_id == "x"
    queue.release("two", "slot lost")
    assert queue.outcomes()["x"].state == "failed"
    assert queue.take("three") is None
