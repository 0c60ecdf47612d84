"""The latency suite: how fast, how large, how much memory and energy; side by side.

Each contender runs in a process of its own, so that its memory is its own, and they
take turns (A B A B ...), so that a machine whose speed drifts slows all of them alike.
What is compared is the ratio within a round.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgelm import schema
from edgelm.calibration import text_digest
from edgelm.errors import EdgelmError, InputError
from edgelm.evaluate.identity import machine, size_bytes
from edgelm.evaluate.measurement import Measurement, cell_of, load_of, ratio_of
from edgelm.evaluate.process import Meter, Process
from edgelm.evaluate.steady import WarmUp, percentile
from edgelm.runtimes.sensors import DeviceState, device_state
from edgelm.targets.board import ROOT

KIND = "edgelm-bench"
SEED = 0
Progress = Callable[[str, int, int], None]

# Texts of a turn of the concurrency curve; calls of a turn of a length and batch size.
_CURVE_TEXTS, _GRID_CALLS = 48, 4


@dataclass(frozen=True)
class Workload:
    """What each contender is asked to do.

    Attributes:
        texts: Texts; where the task scores pairs, each text is paired with the next.
        rounds: Turns that each contender takes.
        single: Texts of a turn that run one by one.
        threads: Threads of each contender; all cores if None.
        concurrency: Numbers of threads that call a contender at once.
        lengths: Lengths of inputs, tokens, to be measured with every batch size.
        batch_sizes: Inputs of a call, for each of the lengths.
    """

    texts: tuple[str, ...]
    rounds: int = 5
    single: int = 40
    threads: int | None = None
    concurrency: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InputError: There is no text, or a number is less than it can be.
        """
        if not self.texts:
            raise InputError(
                "There are no texts to measure with. Give a file that holds some with --texts."
            )
        for name, least in (("concurrency", 1), ("lengths", 4), ("batch_sizes", 1)):
            if any(value < least for value in getattr(self, name)):
                raise InputError(
                    f"The {name.replace('_', ' ')} must be at least {least}. Got {getattr(self, name)}."
                )

    @property
    def turns(self) -> int:
        """Turns that each contender takes in all."""
        cells = len(self.concurrency) + len(self.lengths) * len(self.batch_sizes)
        return self.rounds * (1 + cells)


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
        Plain data: ``kind``, ``environment``, ``workload``, ``contenders``, ``ratios``.

    Raises:
        EdgelmError: A contender cannot be opened or does not take inputs of a length, or
            the power mode was changed meanwhile.
    """
    contenders: list[_Contender] = []
    before = device_state(root)
    total = workload.turns * len(references)
    try:
        for reference in references:
            progress(f"opening {reference}", 0, total)
            contenders.append(_Contender(reference, workload, root))
        grid = _grid(contenders, workload)
        jobs: list[Callable[[_Contender, int], None]] = [_Contender.turn]
        jobs += [partial(_load, n) for n in workload.concurrency]
        jobs += [partial(_cell, key, texts) for key, texts in grid.items()]
        shuffle, order, done = random.Random(SEED), list(contenders), 0
        for number in range(workload.rounds):
            for job in jobs:
                shuffle.shuffle(order)
                for contender in order:
                    job(contender, number)
                    done += 1
                    progress(contender.name, done, total)
        after = device_state(root)
        results = [contender.result(contenders[0]) for contender in contenders]
    finally:
        for contender in contenders:
            contender.process.close()
    if _mode(before) != _mode(after):
        raise EdgelmError(
            f"The power mode went from {_mode(before)} to {_mode(after)} while it was measured. "
            "Set one, for example with nvpmodel, and measure again."
        )
    return {
        "kind": KIND,
        "environment": environment(before, after, root),
        "workload": {
            "texts": len(workload.texts),
            "digest": text_digest(workload.texts),
            "mean_characters": round(statistics.mean(map(len, workload.texts)), 1),
            "rounds": workload.rounds,
            "threads": workload.threads,
            "seed": SEED,
        },
        "contenders": [schema.plain(result) for result in results],
        "ratios": [schema.plain(ratio_of(results[0], other)) for other in results[1:]],
    }


def environment(
    before: DeviceState, after: DeviceState, root: Path = ROOT
) -> dict[str, Any]:
    """The machine, its state and the versions that numbers belong to.

    Args:
        before: The device before the first turn.
        after: The device after the last, before anything cools down.
        root: Where its file system begins.
    """
    states = {"before": schema.plain(before), "after": schema.plain(after)}
    return {**machine(root), "device": states}


def _mode(state: DeviceState) -> str:
    if state.power_mode_id is None:
        return "unknown"
    return f"{state.power_mode or 'unnamed'} ({state.power_mode_id})"


def _grid(
    contenders: Sequence[_Contender], workload: Workload
) -> dict[tuple[int, int], list[str]]:
    """Texts of each length and batch size, made once, by the first contender's tokens."""
    grid = {}
    for length in workload.lengths:
        for contender in contenders:
            longest = contender.process.about["max_length"]
            if length > longest:
                raise InputError(
                    f"Inputs of {length} tokens are longer than the {longest} that {contender.name} takes. "
                    "Give shorter --lengths."
                )
        for batch in workload.batch_sizes:
            made = contenders[0].process.ask(
                texts=workload.texts, tokens=length, count=batch * _GRID_CALLS
            )
            grid[length, batch] = made["texts"]
    return grid


class _Contender:
    """A process that runs one bundle or model, and what was measured of it."""

    def __init__(self, reference: str, workload: Workload, root: Path) -> None:
        self.name, self._workload, self._root = reference, workload, root
        self._latencies: list[list[float]] = []
        self._throughputs: list[float] = []
        self._joules: list[float] = []
        self._loads: dict[int, list[tuple[float, list[float]]]] = {}
        self.cells: dict[tuple[int, int], list[list[float]]] = {}
        self._memory = 0.0
        self._single = list(workload.texts)
        random.Random(SEED).shuffle(self._single)
        self.process = Process(reference, workload.threads, workload.texts[0])
        try:
            self.process.ask(texts=workload.texts)  # every shape once
            warm = self.process.ask(texts=self._single, warm=True)["warm_up"]
        except BaseException:
            self.process.close()
            raise
        self._warm_up = WarmUp(**warm)

    def turn(self, number: int) -> None:
        """One by one, then all at once."""
        reply = self.process.ask(texts=self._some(self._workload.single, number), single=True)  # fmt: skip
        self._latencies.append(reply["latencies_ms"])
        with Meter(self.process.pid, self._root) as meter:
            reply = self.process.ask(texts=self._workload.texts)
        count = len(self._workload.texts)
        self._throughputs.append(count / reply["seconds"])
        self._memory = max(self._memory, meter.memory_mib, reply["memory_mib"])
        if meter.joules is not None:
            self._joules.append(meter.joules / count)

    def load(self, threads: int) -> None:
        """Several threads at once, each with one text at a time."""
        texts = self._some(_CURVE_TEXTS, len(self._loads.get(threads, ())))
        reply = self.process.ask(texts=texts, threads=threads)
        each = (len(texts) / reply["seconds"], reply["latencies_ms"])
        self._loads.setdefault(threads, []).append(each)

    def cell(self, key: tuple[int, int], texts: Sequence[str]) -> None:
        """Inputs of a length, so many at a time."""
        turns = self.cells.setdefault(key, [])
        if not turns:
            self.process.ask(texts=texts, batch=key[1])  # a new shape
        turns.append(self.process.ask(texts=texts, batch=key[1])["latencies_ms"])

    def result(self, first: _Contender) -> Measurement:
        """What was measured; ``first`` is what the cells' ratios are of."""
        every = [ms for turn in self._latencies for ms in turn]
        about = self.process.about
        return Measurement(
            name=self.name,
            runtime=about["runtime"],
            precision=about["precision"],
            p50_ms=percentile(every, 0.5),
            p90_ms=percentile(every, 0.9),
            p95_ms=percentile(every, 0.95),
            p99_ms=percentile(every, 0.99),
            texts_per_s=statistics.median(self._throughputs),
            cold_start_ms=self.process.cold_start_ms,
            memory_mib=self._memory,
            size_mb=size_bytes(self.name, about["identity"]["files"]) / 1e6,
            joules_per_text=statistics.median(self._joules) if self._joules else None,
            warm_up=self._warm_up,
            latencies_ms=tuple(tuple(turn) for turn in self._latencies),
            throughputs=tuple(self._throughputs),
            loads=tuple(load_of(n, turns) for n, turns in self._loads.items()),
            cells=tuple(
                cell_of(key, turns, first.cells[key])
                for key, turns in self.cells.items()
            ),
            identity=about["identity"],
        )

    def _some(self, count: int, number: int) -> list[str]:
        """The next texts of a shuffled ring."""
        ring = self._single
        return [ring[(number * count + i) % len(ring)] for i in range(count)]


def _load(threads: int, contender: _Contender, number: int) -> None:
    contender.load(threads)


def _cell(
    key: tuple[int, int], texts: Sequence[str], contender: _Contender, number: int
) -> None:
    contender.cell(key, texts)
