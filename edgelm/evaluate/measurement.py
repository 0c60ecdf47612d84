"""What the latency suite measures of a contender, and how two are compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgelm.errors import GateError
from edgelm.evaluate.steady import WarmUp, median_interval, percentile


@dataclass(frozen=True)
class Load:
    """A contender called by several threads at once.

    Attributes:
        threads: How many, each with one text at a time.
        texts_per_s: Throughput; median of the rounds.
        p50_ms: Median latency of a text.
        p95_ms: 95th percentile.
    """

    threads: int
    texts_per_s: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Cell:
    """A contender with inputs of one length, so many at a time.

    Attributes:
        length: Tokens of an input, special tokens included.
        batch: Inputs of a call.
        p50_ms: Median latency of a call.
        p95_ms: 95th percentile.
        texts_per_s: Throughput at the median.
        ratio: Median of the rounds' ratios of the first contender's latency to this one's.
        interval: Of the ratio.
    """

    length: int
    batch: int
    p50_ms: float
    p95_ms: float
    texts_per_s: float
    ratio: float = 1.0
    interval: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Measurement:
    """What was measured of one contender.

    Attributes:
        name: What was opened.
        runtime: What ran it.
        precision: What it computes in.
        p50_ms: Median latency of one text, tokenisation included, ms.
        p90_ms: 90th percentile.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        texts_per_s: Throughput over all texts at once; median of the rounds.
        cold_start_ms: Start of the process to the first answer, ms.
        memory_mib: Largest proportional set size seen, MiB.
        size_mb: Its files, MB (10^6 bytes).
        joules_per_text: Energy of the machine a text, in the throughput's turns; median of
            the rounds; None without a sensor.
        warm_up: How it became warm.
        latencies_ms: Every single latency, by round.
        throughputs: Throughput of each round.
        loads: By number of threads that call at once.
        cells: By length and batch size.
        identity: Which model it is, with digests (`edgelm.evaluate.identity`).
    """

    name: str
    runtime: str
    precision: str
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    texts_per_s: float
    cold_start_ms: float
    memory_mib: float
    size_mb: float
    joules_per_text: float | None
    warm_up: WarmUp
    latencies_ms: tuple[tuple[float, ...], ...]
    throughputs: tuple[float, ...]
    loads: tuple[Load, ...]
    cells: tuple[Cell, ...]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """The first contender against another one, round by round.

    Attributes:
        against: Name of the other.
        latency: Median of the rounds' ratios of median latency; below 1 is faster.
        latency_range: Smallest and largest of them.
        latency_interval: For the median (`median_interval`).
        throughput: Median of the rounds' ratios of throughput; above 1 is faster.
        throughput_range: Smallest and largest of them.
        throughput_interval: For the median.
        confidence: Of the intervals, 0..1.
    """

    against: str
    latency: float
    latency_range: tuple[float, float]
    latency_interval: tuple[float, float]
    throughput: float
    throughput_range: tuple[float, float]
    throughput_interval: tuple[float, float]
    confidence: float


def load_of(threads: int, turns: Sequence[tuple[float, list[float]]]) -> Load:
    """A load from the turns' throughputs and latencies."""
    every = [ms for _, latencies in turns for ms in latencies]
    rate = statistics.median(rate for rate, _ in turns)
    return Load(threads, rate, percentile(every, 0.5), percentile(every, 0.95))


def cell_of(
    key: tuple[int, int],
    turns: Sequence[Sequence[float]],
    first: Sequence[Sequence[float]],
) -> Cell:
    """A cell from the turns' latencies; ``first`` is the first contender's."""
    length, batch = key
    every = [ms for turn in turns for ms in turn]
    middle = percentile(every, 0.5)
    found = Cell(length, batch, middle, percentile(every, 0.95), batch / middle * 1e3)
    ratios = [
        statistics.median(a) / statistics.median(b)
        for a, b in zip(first, turns, strict=True)
    ]
    return replace(
        found, ratio=statistics.median(ratios), interval=median_interval(ratios)[:2]
    )


def ratio_of(first: Measurement, other: Measurement) -> Ratio:
    """Compare two contenders round by round."""
    pairs = zip(first.latencies_ms, other.latencies_ms, strict=True)
    latency = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    both = zip(first.throughputs, other.throughputs, strict=True)
    throughput = [a / b for a, b in both]
    low, high, confidence = median_interval(latency)
    return Ratio(
        other.name,
        statistics.median(latency),
        (min(latency), max(latency)),
        (low, high),
        statistics.median(throughput),
        (min(throughput), max(throughput)),
        median_interval(throughput)[:2],
        confidence,
    )


def check_speedup(name: str, ratio: Mapping[str, Any], least: float) -> None:
    """Raise `GateError` if one text is not answered so many times as fast as another does.

    Args:
        name: Of the first contender.
        ratio: A `Ratio`, as plain data.
        least: How many times as fast it must be, by the median of the rounds.
    """
    found = 1 / ratio["latency"]
    fast, slow = (1 / end for end in ratio["latency_interval"])
    if found < least:
        raise GateError(
            f"{name} answers one text {found:.2f} times as fast as {ratio['against']} ({slow:.2f} to {fast:.2f}); "
            f"at least {least:g} times are demanded."
        )
