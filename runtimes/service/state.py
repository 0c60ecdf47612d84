"""What all routes share: the models, the limits, and what is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from edgelm.errors import InputError, OverloadError
from edgelm.runtimes.calls import Call, in_thread
from edgelm.runtimes.service.metrics import Metrics
from edgelm.runtimes.service.models import Models, Served
from edgelm.runtimes.service.replies import Refusal
from edgelm.runtimes.sharing import close

T = TypeVar("T")

# Threads that tokenise and wait; more requests than these wait for one of them.
_THREADS = 128


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_queue: Inputs that may wait or run, over all requests; one more is refused with 429.
        max_client_batch: Inputs of one request.
        max_request_bytes: Length of a request's body.
        max_batch_tokens: Rows times longest row of a batch; None is what suits the runtime.
        timeout_s: Seconds that a request may take to arrive, and then to be answered.
        auto_truncate: Cut texts that are too long, where a request does not say.
    """

    max_queue: int = 1024
    max_client_batch: int = 256
    max_request_bytes: int = 2_000_000
    max_batch_tokens: int | None = None
    timeout_s: float = 30.0
    auto_truncate: bool = True

    def __post_init__(self) -> None:
        if self.max_client_batch > self.max_queue:
            raise InputError(
                f"A request of {self.max_client_batch} inputs would never fit a queue of {self.max_queue}. "
                "Raise --max-queue or lower --max-client-batch."
            )


class State:
    """The server's state.

    Attributes:
        models: What is served.
        limits: What is taken.
        metrics: What is counted.
        inputs: Inputs that are under way.
        closing: Whether it is shutting down.
    """

    def __init__(self, models: Models, limits: Limits) -> None:
        """Count what the models do from now on."""
        self.models, self.limits = models, limits
        self.metrics = Metrics()
        self.inputs = 0
        self.closing = False
        self.started = time.time()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="edgelm-request")
        for served in models.all:
            batcher = served.engine.batcher
            batcher.observe = self.metrics.observer(served.name, batcher)

    async def run(
        self,
        served: Served,
        function: Callable[..., T],
        *args: Any,
        inputs: int,
        cut: bool | None = None,
        **options: Any,
    ) -> tuple[T, Call]:
        """Have a model answer.

        Args:
            served: The model.
            function: What to call in a thread.
            *args: Its arguments.
            **options: Its named arguments.
            inputs: How many inputs that is.
            cut: Whether to cut what is too long; the server's default if not given.

        Returns:
            What the function gave, and what it cost.

        Raises:
            OverloadError: Too much is under way.
            Refusal: Too many inputs, or none.
            EdgelmError: What the function raised.
        """
        limits = self.limits
        if not inputs:
            raise Refusal("`inputs` cannot be empty", 400)
        if inputs > limits.max_client_batch:
            raise Refusal(
                f"batch size {inputs} > maximum allowed batch size {limits.max_client_batch}"
            )
        if self.inputs + inputs > limits.max_queue:
            raise OverloadError(
                f"{self.inputs} inputs are under way, of at most {limits.max_queue}. Try again later."
            )
        call = Call(limits.timeout_s, cut=limits.auto_truncate if cut is None else cut)
        self.inputs += inputs
        began = time.monotonic()
        try:
            work = partial(function, *args, **options)
            result = await in_thread(call, work, executor=self._pool)
        finally:
            self.inputs -= inputs
        served.seconds.append(time.monotonic() - began)
        self.metrics.tokens.labels(served.name).inc(call.tokens)
        return result, call

    def close(self) -> None:
        """Answer what was accepted, and end the threads."""
        self._pool.shutdown(wait=True)
        for served in self.models.all:
            close(served.model)


def finite(values: np.ndarray[Any, Any], what: str = "score") -> Any:
    """An array as lists, for JSON.

    Raises:
        Refusal: Something is not finite.
    """
    if not np.isfinite(values).all():
        raise Refusal(f"{what} is NaN or infinite", 424)
    return values.tolist()


def characters(texts: Sequence[Any]) -> int:
    """Characters of texts, or of pairs of them."""
    return sum(len(t) if isinstance(t, str) else characters(t) for t in texts)
