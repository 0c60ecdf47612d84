"""What a caller of a shared model wants, and how asyncio calls one."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgelm.errors import DeadlineError

T = TypeVar("T")


@dataclass
class Call:
    """What a caller wants of a shared model, and what its inputs cost.

    Attributes:
        timeout_s: Seconds from now after which it no longer wants an answer.
        wait: Wait for room in a full queue; else a full queue is an `OverloadError`.
        cut: Cut a text that is longer than the model takes; else it is an `InputError`.
        tokens: Tokens of its inputs so far.
        tokenize_s: Seconds in the tokenizer.
        queue_s: The longest time that one of its inputs waited.
        inference_s: Seconds of the batches that its inputs were in, of each the whole.
    """

    timeout_s: float | None = None
    wait: bool = True
    cut: bool = True
    tokens: int = 0
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0
    _deadline: float | None = field(init=False, default=None)
    _cancelled: bool = field(init=False, default=False)
    _pending: Future[Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.timeout_s is not None:
            self._deadline = time.monotonic() + self.timeout_s

    def remaining_s(self) -> float | None:
        """Seconds that are left; None without a deadline.

        Raises:
            DeadlineError: None are left.
        """
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineError(f"There was no answer within {self.timeout_s:g} s.")
        return left

    def cancel(self) -> None:
        """Give up, from any thread: what waits leaves the queue, and the caller gets a `CancelledError`."""
        self._cancelled = True
        if self._pending is not None:
            self._pending.cancel()

    def expect(self, future: Future[Any]) -> None:
        """Name what `cancel` cancels."""
        self._pending = future
        if self._cancelled:
            future.cancel()


_CURRENT: contextvars.ContextVar[Call | None] = contextvars.ContextVar(
    "edgelm_call", default=None
)


def current() -> Call | None:
    """The call that this thread works for."""
    return _CURRENT.get()


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Whatever a shared model does in this ``with`` statement, in this thread, belongs to a call."""
    token = _CURRENT.set(call)
    try:
        yield call
    finally:
        _CURRENT.reset(token)


async def in_thread(
    call: Call,
    function: Callable[..., T],
    *args: Any,
    executor: Executor | None = None,
) -> T:
    """Call a shared model from asyncio; the event loop stays free.

    Args:
        call: What is wanted. If the task that awaits is cancelled, so is the call.
        function: For example ``model.encode``.
        args: Its arguments.
        executor: Whose threads wait for answers; the loop's own if not given.
    """
    import asyncio

    def run() -> T:
        with calling(call):
            call.remaining_s()
            return function(*args)

    future = asyncio.get_running_loop().run_in_executor(executor, run)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        call.cancel()
        future.cancel()  # if no thread has begun it yet
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise
