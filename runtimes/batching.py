"""A bounded queue of inputs, and the threads that run them in common batches.

A caller that finds the threads idle is served at once; while they are busy, inputs gather, and the
next batch takes the one that has waited longest together with those nearest to it in length.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from edgelm.errors import ClosedError, DeadlineError, InputError, OverloadError
from edgelm.runtimes.calls import Call


@dataclass(frozen=True)
class Batch:
    """A batch that ran, for whoever measures.

    Attributes:
        rows: Inputs.
        tokens: Their tokens.
        padded: Tokens that were computed: rows times the longest.
        seconds: How long it took.
        waited_s: How long each of its inputs had waited.
    """

    rows: int
    tokens: int
    padded: int
    seconds: float
    waited_s: tuple[float, ...]


class _Ticket:
    """The inputs that one caller sent at once."""

    def __init__(self, count: int, call: Call) -> None:
        self.rows: list[Any] = [None] * count
        self.left = count
        self.queued = 0
        self.call = call
        self.done: Future[list[Any]] = Future()


class _Item(NamedTuple):
    """An input in the queue; sorted by length, then by age."""

    length: int
    number: int
    what: Any
    ticket: _Ticket
    position: int
    since: float


class Batcher:
    """A bounded queue of inputs, and the threads that run it in batches.

    Attributes:
        max_tokens: Limit of rows times longest row of a batch; 1 runs every input alone.
        max_queue: Inputs that may wait.
        observe: Called with every `Batch` that ran, in the thread that ran it.
    """

    def __init__(
        self,
        run_batch: Callable[[list[Any]], list[Any]],
        *,
        max_tokens: int,
        max_queue: int,
        workers: int = 1,
    ) -> None:
        """Start the threads.

        Args:
            run_batch: Gives the rows of some inputs; called by ``workers`` threads.
            max_tokens: See above.
            max_queue: See above.
            workers: Batches that run at once.

        Raises:
            InputError: A number is less than 1.
        """
        if min(max_tokens, max_queue, workers) < 1:
            raise InputError(
                "The tokens of a batch, the length of the queue and the workers must be at least 1. "
                f"Got {max_tokens}, {max_queue} and {workers}."
            )
        self.max_tokens, self.max_queue = max_tokens, max_queue
        self.observe: Callable[[Batch], None] = lambda batch: None
        self._run_batch = run_batch
        lock = threading.Lock()
        self._lock = lock
        self._arrived, self._room = threading.Condition(lock), threading.Condition(lock)
        self._queue: list[_Item] = []  # by length
        self._lengths: OrderedDict[int, int] = OrderedDict()  # by age: number to length
        self._number = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"edgelm-batch-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Inputs that wait."""
        return len(self._queue)

    def run(self, inputs: Sequence[Sized], call: Call | None = None) -> list[Any]:
        """Send inputs and wait for their rows.

        Args:
            inputs: Any number of inputs; the length of each is its tokens.
            call: What the caller wants; `Call()` if not given. With ``wait``, more inputs than the
                queue holds are sent as room appears.

        Returns:
            The row of each input, in order.

        Raises:
            OverloadError: The queue is full, and the caller does not wait. Nothing was begun.
            DeadlineError: Too late.
            concurrent.futures.CancelledError: The call was cancelled.
            ClosedError: No more inputs are taken.
        """
        if not inputs:
            return []
        call = call or Call()
        ticket = _Ticket(len(inputs), call)
        call.expect(ticket.done)
        try:
            self._send(ticket, inputs)
            return ticket.done.result(call.remaining_s())
        except FutureTimeout as error:
            call.remaining_s()  # says it in a sentence
            raise DeadlineError("There was no answer in time.") from error
        finally:
            self._withdraw(ticket)

    def close(self) -> None:
        """Take no more inputs, and return when those in the queue are answered."""
        with self._lock:
            self._closed = True
            self._arrived.notify_all()
            self._room.notify_all()
        for thread in self._threads:
            thread.join()

    def _send(self, ticket: _Ticket, inputs: Sequence[Sized]) -> None:
        call, sent = ticket.call, 0
        call.tokens += sum(len(one) for one in inputs)
        if call.wait:
            ticket.done.add_done_callback(self._wake)
        with self._lock:
            while sent < len(inputs) and not ticket.done.done():
                if self._closed:
                    raise ClosedError("This model was closed; it takes no more inputs.")
                room = self.max_queue - len(self._queue)
                if not call.wait and room < len(inputs):
                    raise OverloadError(
                        f"{len(self._queue)} inputs wait already, of at most {self.max_queue}: "
                        f"there is no room for {len(inputs)} more. Try again later."
                    )
                if room == 0:
                    self._room.wait(call.remaining_s())
                    continue
                now = time.monotonic()
                for one in inputs[sent : sent + room]:
                    self._number += 1
                    item = _Item(len(one), self._number, one, ticket, sent, now)
                    insort(self._queue, item)
                    self._lengths[item.number] = item.length
                    sent += 1
                    ticket.queued += 1
                self._arrived.notify_all()

    def _wake(self, _: object) -> None:
        with self._lock:
            self._room.notify_all()

    def _withdraw(self, ticket: _Ticket) -> None:
        """Take out of the queue what nobody waits for."""
        with self._lock:
            if ticket.queued:
                kept = [item for item in self._queue if item.ticket is not ticket]
                for item in self._queue:
                    if item.ticket is ticket:
                        del self._lengths[item.number]
                self._queue, ticket.queued = kept, 0
                self._room.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._arrived.wait()
                if not self._queue:
                    return
                batch = self._take()
                self._room.notify_all()
            self._answer(batch)
            del batch  # nothing is kept while it waits

    def _take(self) -> list[_Item]:
        """The input that has waited longest, and its neighbours in length as far as the budget goes."""
        queue = self._queue
        number, length = next(iter(self._lengths.items()))
        begin = bisect_left(queue, (length, number))
        end = begin + 1
        while True:
            longest, rows = queue[end - 1].length, end - begin + 1
            above = queue[end].length if end < len(queue) else None
            fits_above = above is not None and rows * above <= self.max_tokens
            fits_below = begin > 0 and rows * longest <= self.max_tokens
            if fits_below and (
                above is None
                or not fits_above
                or length - queue[begin - 1].length <= above - length
            ):
                begin -= 1
            elif fits_above:
                end += 1
            else:
                break
        batch = queue[begin:end]
        del queue[begin:end]
        for item in batch:
            item.ticket.queued -= 1
            del self._lengths[item.number]
        return batch

    def _answer(self, batch: list[_Item]) -> None:
        began = time.monotonic()
        try:
            rows = self._run_batch([item.what for item in batch])
        except Exception as error:
            if len(batch) > 1:  # one caller's input must not be another's error
                for item in batch:
                    self._answer([item])
                return
            with suppress(InvalidStateError):
                batch[0].ticket.done.set_exception(error)
            return
        seconds = time.monotonic() - began
        finished = []
        with self._lock:
            for ticket in {id(item.ticket): item.ticket for item in batch}.values():
                ticket.call.inference_s += seconds
            for item, row in zip(batch, rows, strict=True):
                ticket, call = item.ticket, item.ticket.call
                call.queue_s = max(call.queue_s, began - item.since)
                ticket.rows[item.position] = row
                ticket.left -= 1
                if not ticket.left:
                    finished.append(ticket)
        for ticket in finished:
            with suppress(InvalidStateError):  # it was cancelled meanwhile
                ticket.done.set_result(ticket.rows)
        lengths = [item.length for item in batch]
        waited = tuple(began - item.since for item in batch)
        padded = len(batch) * max(lengths)
        self.observe(Batch(len(batch), sum(lengths), padded, seconds, waited))
