"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from edgelm.runtimes.batching import Batch, Batcher

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5,
    10,
    30,
)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server.

    Attributes:
        requests: By method, route and status.
        seconds: From the first byte of a request to its answer, by route.
        tokens: Tokens of inputs, by model.
        cut: Inputs that were cut, by model.
    """

    def __init__(self) -> None:
        """Begin at zero."""
        registry = CollectorRegistry()
        self._registry = registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "edgelm_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "edgelm_request_seconds",
            "Time to answer a request.",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        model = ["model"]
        self.tokens = Counter(
            "edgelm_tokens", "Tokens of inputs.", model, registry=registry
        )
        self.cut = Counter(
            "edgelm_truncated_inputs", "Inputs cut.", model, registry=registry
        )
        self._queue = Gauge(
            "edgelm_queue_inputs", "Inputs that wait.", model, registry=registry
        )
        self._waited = Histogram(
            "edgelm_queue_seconds",
            "Time that an input waited for its batch.",
            model,
            registry=registry,
            buckets=_SECONDS,
        )
        self._inference = Histogram(
            "edgelm_inference_seconds",
            "Time of a batch.",
            model,
            registry=registry,
            buckets=_SECONDS,
        )
        self._rows = Histogram(
            "edgelm_batch_inputs",
            "Inputs of a batch.",
            model,
            registry=registry,
            buckets=_ROWS,
        )
        self._computed = Counter(
            "edgelm_computed_tokens",
            "Tokens computed, padding included.",
            model,
            registry=registry,
        )

    def observer(self, name: str, batcher: Batcher) -> Callable[[Batch], None]:
        """What counts the batches of a model."""
        self._queue.labels(name).set_function(lambda: len(batcher))
        inference, rows = self._inference.labels(name), self._rows.labels(name)
        waited, computed = self._waited.labels(name), self._computed.labels(name)

        def observe(batch: Batch) -> None:
            inference.observe(batch.seconds)
            rows.observe(batch.rows)
            computed.inc(batch.padded)
            for seconds in batch.waited_s:
                waited.observe(seconds)

        return observe

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)
