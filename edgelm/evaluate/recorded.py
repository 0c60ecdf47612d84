"""A benchmark against one that was recorded before: only where it says something."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.errors import InputError
from edgelm.evaluate.latency import KIND
from edgelm.evaluate.steady import percentile


def read_result(path: Path) -> Any:
    """Read a file of JSON.

    Raises:
        InputError: It cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}).") from error


def read_recorded(path: Path) -> dict[str, Any]:
    """Read the JSON of a benchmark.

    Raises:
        InputError: It is none, or one of an edgelm that did not record what a comparison needs.
    """
    found = read_result(path)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise InputError(
            f"{path} is no benchmark that can be compared with. Record one with: edgelm bench BUNDLE --report NAME"
        )
    return found


def conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for two benchmarks to be compared."""
    environment, work = result["environment"], result["workload"]
    clock = environment["cpu_clock"]
    device = environment["device"]["after"]
    gpu = device.get("gpu_clock") or {}
    return {
        "CPU": environment["cpu"],
        "cores": environment["cores"],
        "architecture": environment["machine"],
        "power mode": device.get("power_mode_id"),
        "governor": clock.get("governor"),
        "limit of the CPU's clock, MHz": clock.get("most"),
        "limit of the GPU's clock, MHz": gpu.get("most"),
        "threads": work["threads"],
        "texts": work["digest"],
    }


def check_comparable(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Refuse to compare benchmarks of different machines, power modes or work.

    Raises:
        InputError: They differ; the message says in what.
    """
    here, there = conditions(now), conditions(then)
    differences = [
        f"{name}: {_shown(here[name])} now, {_shown(there[name])} recorded"
        for name in here
        if here[name] != there[name]
    ]
    if differences:
        raise InputError(
            f"The recorded benchmark cannot be compared with: {'; '.join(differences)}. "
            "Measure both on one machine in one state, best side by side with --against."
        )


def compare_recorded(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """The first contender against that of a recorded benchmark.

    The runs did not take turns, so what the machine did in between is in the ratios; the
    range is that of all pairs of rounds, their middle 95 %.

    Returns:
        ``against``, ``measured_at``, ``latency`` and ``throughput`` (ratios of medians),
        with ``latency_range`` and ``throughput_range``.

    Raises:
        InputError: As `check_comparable`.
    """
    check_comparable(now, then)
    first, other = now["contenders"][0], then["contenders"][0]
    found: dict[str, Any] = {
        "against": other["name"],
        "measured_at": then["environment"]["measured_at"],
    }
    for name, values in (
        ("latency", [[statistics.median(t) for t in c["latencies_ms"]] for c in (first, other)]),
        ("throughput", [c["throughputs"] for c in (first, other)]),
    ):  # fmt: skip
        pairs = [a / b for a in values[0] for b in values[1]]
        found[name] = statistics.median(values[0]) / statistics.median(values[1])
        found[f"{name}_range"] = [percentile(pairs, 0.025), percentile(pairs, 0.975)]
    return found


def _shown(value: object) -> object:
    return "unknown" if value is None else str(value)[:40]
