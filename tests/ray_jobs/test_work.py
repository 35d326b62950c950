"""The actor with the queues, as a plain object."""

from __future__ import annotations

from ray_jobs.queue import FairQueue, Task
from ray_jobs.work import CLIPS, END, TRAINING, Work


def work() -> Work:
    made = Work({CLIPS: FairQueue(max_attempts=3), TRAINING: FairQueue()})
    made.put(CLIPS, [Task("one", "a", 4.0, 0.0)])
    return made


def test_a_source_of_a_broken_pass_takes_nothing_from_the_next() -> None:
    made = work()
    made.begin_pass("first")
    taken = made.take_block("first", "ticket-1")
    assert isinstance(taken, Task)
    made.begin_pass("second")  # the first one broke; its source may still be asking
    assert made.take_block("first", "ticket-1") == END
    assert made.take_block("first", "ticket-2") == END
    again = made.take_block("second", "ticket-0")
    assert isinstance(again, Task)
    assert again.task_id == taken.task_id == "one", "what the broken pass held waits for whoever comes first"
    assert made.take_block("second", "ticket-0") == again, "a ticket that comes again gets the same"
    assert made.take_block("second", "ticket-1") is None


def test_a_block_that_breaks_every_pass_is_given_up() -> None:
    made = work()
    for name in ("first", "second", "third"):
        made.begin_pass(name)
        assert isinstance(made.take_block(name, "ticket-0"), Task)
    made.begin_pass("fourth")
    assert made.take_block("fourth", "ticket-0") is None
    (ended,) = made.view().ended[CLIPS]
    assert (ended.task_id, ended.state) == ("one", "failed")
    assert "the pass over its pools broke" in str(ended.error)


def test_only_a_slot_that_took_a_task_has_trained() -> None:
    made = work()
    assert made.take(TRAINING, "slot-1") is None
    assert not made.has_trained("slot-1")
    made.put(TRAINING, [Task("ada/sft", "a", 1.0, 0.0)])
    made.take(TRAINING, "slot-1")
    made.call(TRAINING, "done", "slot-1", {})
    assert made.has_trained("slot-1")
    assert not made.has_trained("slot-2")
