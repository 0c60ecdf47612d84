"""The latency suite: how fast, how large, how much memory; side by side.

Each contender runs in a process of its own, so that its memory is its own, and they
take turns (A B A B ...), so that a machine whose speed drifts slows all of them alike.
What is compared is the ratio within a round.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import edgelm
from edgelm.bundle import is_bundle, open_bundle
from edgelm.errors import EdgelmError, InputError
from edgelm.runtimes.sensors import DeviceState, device_state
from edgelm.runtimes.workers import cpu_name
from edgelm.targets.board import ROOT

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Workload:
    """What each contender is asked to do.

    Attributes:
        texts: Texts; where the task scores pairs, each text is paired with the next.
        rounds: Turns that each contender takes.
        single: Texts of a turn that run one by one.
        threads: Threads of each contender; all cores if None.
    """

    texts: tuple[str, ...]
    rounds: int = 5
    single: int = 40
    threads: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What was measured of one contender.

    Attributes:
        name: What was opened.
        runtime: What ran it.
        precision: What it computes in.
        p50_ms: Median latency of one text, tokenisation included, ms.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        texts_per_s: Throughput over all texts at once; median of the rounds.
        cold_start_ms: Start of the process to the first answer, ms.
        memory_mib: Largest proportional set size seen, MiB.
        size_mb: Its files, MB (10^6 bytes).
        latencies_ms: Every single latency, by round.
        throughputs: Throughput of each round.
    """

    name: str
    runtime: str
    precision: str
    p50_ms: float
    p95_ms: float
    p99_ms: float
    texts_per_s: float
    cold_start_ms: float
    memory_mib: float
    size_mb: float
    latencies_ms: tuple[tuple[float, ...], ...]
    throughputs: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """The first contender against another one, round by round.

    Attributes:
        against: Name of the other.
        latency: Median of the rounds' ratios of median latency; below 1 is faster.
        latency_range: Smallest and largest of them.
        throughput: Median of the rounds' ratios of throughput; above 1 is faster.
        throughput_range: Smallest and largest of them.
    """

    against: str
    latency: float
    latency_range: tuple[float, float]
    throughput: float
    throughput_range: tuple[float, float]


def benchmark(
    references: Sequence[str],
    workload: Workload,
    progress: Progress = lambda what, done, total: None,
    root: Path = ROOT,
) -> dict[str, Any]:
    """Measure contenders side by side.

    Args:
        references: Bundles or models; the first is compared with each of the others.
        workload: What to run.
        progress: Called with what was done, turns done and turns in all.
        root: Where the file system begins of which the device's state is read.

    Returns:
        Plain data: ``environment``, ``workload``, ``contenders``, ``ratios``.

    Raises:
        InputError: There is no text to run on.
        EdgelmError: A contender cannot be opened, or the power mode was changed meanwhile.
    """
    if not workload.texts:
        raise InputError(
            "There are no texts to measure with. Give a file that holds some with --texts."
        )
    contenders: list[_Contender] = []
    before = device_state(root)
    try:
        for reference in references:
            contenders.append(_Contender(reference, workload))
            progress(f"opened {reference}", 0, workload.rounds * len(references))
        done = 0
        order = list(contenders)
        shuffle = random.Random(0)
        for number in range(workload.rounds):
            shuffle.shuffle(order)
            for contender in order:
                contender.turn(number)
                done += 1
                progress(contender.name, done, workload.rounds * len(references))
        after = device_state(root)
        results = [contender.result() for contender in contenders]
    finally:
        for contender in contenders:
            contender.close()
    if _mode(before) != _mode(after):
        raise EdgelmError(
            f"The power mode went from {_mode(before)} to {_mode(after)} while it was measured. "
            "Set one, for example with nvpmodel, and measure again."
        )
    return {
        "environment": environment(before, after),
        "workload": {
            "texts": len(workload.texts),
            "mean_characters": round(statistics.mean(map(len, workload.texts)), 1),
            "rounds": workload.rounds,
            "threads": workload.threads,
        },
        "contenders": results,
        "ratios": [_ratio(results[0], other) for other in results[1:]],
    }


def environment(before: DeviceState, after: DeviceState) -> dict[str, Any]:
    """The machine, its state and the versions that numbers belong to.

    Args:
        before: The device before the first turn.
        after: The device after the last, before anything cools down.
    """
    from importlib import metadata

    from edgelm import schema

    versions = {"edgelm": edgelm.__version__, "python": platform.python_version()}
    for name in (
        "onnxruntime",
        "onnxruntime-gpu",
        "tokenizers",
        "torch",
        "transformers",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "versions": versions,
        "device": {"before": schema.plain(before), "after": schema.plain(after)},
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _mode(state: DeviceState) -> str:
    if state.power_mode_id is None:
        return "unknown"
    return f"{state.power_mode or 'unnamed'} ({state.power_mode_id})"


def size_bytes(reference: str) -> int:
    """Bytes that a bundle, as it was named, or the weights and tokenizer of a model, take."""
    if is_bundle(reference):
        bundle = open_bundle(reference)
        return bundle.archive.stat().st_size if bundle.archive else bundle.size_bytes
    from edgelm.models import locate

    folder = locate(reference)
    kept = [
        *folder.glob("*.safetensors"),
        *folder.glob("tokenizer.json"),
        *folder.glob("config.json"),
    ]
    return sum(file.stat().st_size for file in kept)


class _Contender:
    """A process that runs one bundle or model."""

    def __init__(self, reference: str, workload: Workload) -> None:
        self.name = reference
        self._workload = workload
        self._latencies: list[list[float]] = []
        self._throughputs: list[float] = []
        self._memory = 0.0
        command = [sys.executable, "-m", "edgelm.evaluate.contender", reference]
        if workload.threads is not None:
            command.append(str(workload.threads))
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self._about = self._ask({"texts": list(workload.texts[:1])})
        except BaseException:
            self.close()
            raise
        self._cold_start = (time.perf_counter() - began) * 1e3
        self._ask({"texts": list(workload.texts)})  # warm-up: every shape once
        self._single = list(workload.texts)
        random.Random(0).shuffle(self._single)

    def turn(self, number: int) -> None:
        """One by one, then all at once."""
        count = self._workload.single
        some = [
            self._single[(number * count + i) % len(self._single)] for i in range(count)
        ]
        self._latencies.append(
            self._ask({"texts": some, "single": True})["latencies_ms"]
        )
        reply = self._ask({"texts": list(self._workload.texts)})
        self._throughputs.append(len(self._workload.texts) / reply["seconds"])
        self._memory = max(self._memory, reply["memory_mib"])

    def result(self) -> dict[str, Any]:
        """What was measured, as plain data."""
        from edgelm import schema

        every = sorted(ms for turn in self._latencies for ms in turn)

        def percentile(q: float) -> float:
            return every[min(len(every) - 1, int(q * len(every)))]

        measurement = Measurement(
            name=self.name,
            runtime=self._about["runtime"],
            precision=self._about["precision"],
            p50_ms=percentile(0.5),
            p95_ms=percentile(0.95),
            p99_ms=percentile(0.99),
            texts_per_s=statistics.median(self._throughputs),
            cold_start_ms=self._cold_start,
            memory_mib=self._memory,
            size_mb=size_bytes(self.name) / 1e6,
            latencies_ms=tuple(tuple(turn) for turn in self._latencies),
            throughputs=tuple(self._throughputs),
        )
        return dict(schema.plain(measurement))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EdgelmError(
                f"The process that measures {self.name} ended (exit {self._process.wait()})."
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EdgelmError(reply["error"])
        return reply


def _ratio(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    from edgelm import schema

    pairs = zip(first["latencies_ms"], other["latencies_ms"], strict=True)
    latency = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    throughput = [
        a / b for a, b in zip(first["throughputs"], other["throughputs"], strict=True)
    ]
    ratio = Ratio(
        other["name"],
        statistics.median(latency),
        (min(latency), max(latency)),
        statistics.median(throughput),
        (min(throughput), max(throughput)),
    )
    return dict(schema.plain(ratio))
