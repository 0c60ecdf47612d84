"""The queue: who gets what, in which batch, and what happens to the rest."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import ClosedError, DeadlineError, InputError, OverloadError
from edgelm.runtimes.batching import Batch, Batcher
from edgelm.runtimes.calls import Call

Inputs = Sequence[Any]


def echo(batch: list[Any]) -> list[np.ndarray]:
    """A row that tells its input: an input here is bytes, its length its tokens."""
    return [np.array([len(one), one[0]], np.float32) for one in batch]


def texts(lengths: Sequence[int], mark: int) -> list[bytes]:
    return [bytes([mark]) * length for length in lengths]


def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until something is so."""
    while not condition():
        os.sched_yield()


class Gate:
    """Runs batches only when told, and remembers them."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.batches: list[list[Any]] = []

    def __call__(self, batch: list[Any]) -> list[np.ndarray]:
        self.batches.append(batch)
        self.entered.set()
        self.open.wait()
        return echo(batch)


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=1, max_size=8
    ),
    budget=st.integers(1, 120),
    max_queue=st.integers(1, 20),
    workers=st.integers(1, 3),
)
def test_every_caller_gets_its_own_rows_in_order(
    calls: list[list[int]], budget: int, max_queue: int, workers: int
) -> None:
    """Whatever the others send, and however little fits the queue."""
    batches: list[Batch] = []
    deepest = []

    def run(batch: list[Any]) -> list[np.ndarray]:
        deepest.append(len(batcher))
        return echo(batch)

    batcher = Batcher(run, max_tokens=budget, max_queue=max_queue, workers=workers)
    batcher.observe = batches.append
    with ThreadPoolExecutor(len(calls)) as pool:
        sent = [texts(lengths, mark + 1) for mark, lengths in enumerate(calls)]
        found = list(pool.map(batcher.run, sent))
    batcher.close()
    for mark, (lengths, rows) in enumerate(zip(calls, found, strict=True)):
        assert [row.tolist() for row in rows] == [[n, mark + 1] for n in lengths]
    assert sum(batch.rows for batch in batches) == sum(map(len, calls))
    assert sum(batch.tokens for batch in batches) == sum(map(sum, calls))
    assert all(batch.rows == 1 or batch.padded <= budget for batch in batches)
    assert max(deepest) <= max_queue
    assert not len(batcher)


def queued(batcher: Batcher, gate: Gate, calls: Sequence[Inputs]) -> ThreadPoolExecutor:
    """Callers that wait behind a batch that runs, in order."""
    pool = ThreadPoolExecutor(8)
    pool.submit(batcher.run, [b"\0"])
    gate.entered.wait()
    waiting = 0
    for call in calls:
        pool.submit(batcher.run, call)
        waiting += len(call)
        until(lambda waiting=waiting: len(batcher) == waiting)  # type: ignore[misc]
    return pool


def test_a_batch_is_the_oldest_input_and_its_neighbours_in_length() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_tokens=40, max_queue=100)
    with queued(batcher, gate, [texts([10], 1), texts([9, 30, 11, 2, 12, 3], 2)]):
        gate.open.set()
    batcher.close()
    lengths = [[len(one) for one in batch] for batch in gate.batches]
    assert lengths == [[1], [9, 10, 11], [30], [2, 3, 12]]
    assert gate.batches[1][1][0] == 1


def test_nobody_starves_behind_a_stream_of_other_lengths() -> None:
    """The longest input was first; short ones keep coming and would fill every batch."""
    gate = Gate()
    batcher = Batcher(gate, max_tokens=10, max_queue=100)
    with queued(batcher, gate, [texts([90], 1), texts([2] * 50, 2)]):
        gate.open.set()
    batcher.close()
    assert [len(one) for one in gate.batches[1]] == [90]


def test_a_full_queue_refuses_who_does_not_wait_and_begins_nothing() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_tokens=4, max_queue=3)
    with queued(batcher, gate, [texts([1, 1], 1)]):
        with pytest.raises(OverloadError, match=r"2 inputs wait already, of at most 3"):
            batcher.run(texts([1, 1], 2), Call(wait=False))
        assert len(batcher) == 2
        gate.open.set()
    batcher.close()
    assert sum(map(len, gate.batches)) == 3


def test_a_caller_that_waits_for_room_can_be_cancelled_and_can_be_too_late() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_tokens=4, max_queue=2)
    call = Call()
    with queued(batcher, gate, [texts([1, 1], 1)]) as pool:
        more = pool.submit(batcher.run, texts([1, 1, 1], 2), call)
        late = pool.submit(batcher.run, texts([1], 3), Call(timeout_s=1e-3))
        with pytest.raises(DeadlineError, match=r"no answer within 0\.001 s"):
            late.result()
        call.cancel()
        with pytest.raises(CancelledError):
            more.result()
        gate.open.set()
    batcher.close()
    assert sum(map(len, gate.batches)) == 3


def test_what_nobody_waits_for_any_more_leaves_the_queue() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_tokens=4, max_queue=10)
    call = Call()
    with queued(batcher, gate, [texts([1, 1], 1)]) as pool:
        cancelled = pool.submit(batcher.run, texts([1, 2, 3], 2), call)
        until(lambda: len(batcher) == 5)
        call.cancel()
        with pytest.raises(CancelledError):
            cancelled.result()
        assert len(batcher) == 2
        with pytest.raises(DeadlineError):
            batcher.run(texts([1], 3), Call(timeout_s=1e-3))
        assert len(batcher) == 2
        with pytest.raises(CancelledError):  # a call cancelled before it began
            batcher.run(texts([1], 4), call)
        gate.open.set()
    batcher.close()
    assert sum(map(len, gate.batches)) == 3


def test_closing_answers_what_was_accepted_and_takes_no_more() -> None:
    gate = Gate()
    batcher = Batcher(gate, max_tokens=4, max_queue=10)
    pool = queued(batcher, gate, [])
    accepted = [pool.submit(batcher.run, texts([2, 2], 1))]
    until(lambda: len(batcher) == 2)
    closing = threading.Thread(target=batcher.close)
    closing.start()

    def refused() -> bool:
        try:
            batcher.run(texts([1], 9), Call(timeout_s=1e-3))
        except (ClosedError, DeadlineError) as error:
            return isinstance(error, ClosedError)
        return False

    until(refused)
    gate.open.set()
    closing.join()
    assert [len(one.result()) for one in accepted] == [2]
    with pytest.raises(ClosedError, match="takes no more inputs"):
        batcher.run(texts([1], 9))


def test_an_input_that_fails_fails_alone() -> None:
    gate = Gate()

    def run(batch: list[Any]) -> list[np.ndarray]:
        rows = gate(batch)
        if any(one[0] == 66 for one in batch):
            raise MemoryError("no room")
        return rows

    batcher = Batcher(run, max_tokens=100, max_queue=10)
    pool = queued(batcher, gate, [])
    good = pool.submit(batcher.run, texts([3, 3], 1))
    bad = pool.submit(batcher.run, texts([3], 66))
    until(lambda: len(batcher) == 3)
    gate.open.set()
    assert len(good.result()) == 2
    with pytest.raises(MemoryError):
        bad.result()
    assert len(batcher.run(texts([3], 1))) == 1  # and the thread lives
    batcher.close()


def test_no_inputs_no_rows_and_numbers_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"must be at least 1\. Got 0, 1 and 1"):
        Batcher(echo, max_tokens=0, max_queue=1)
    batcher = Batcher(echo, max_tokens=1, max_queue=1)
    assert batcher.run([]) == []
    batcher.close()
