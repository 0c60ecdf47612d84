"""Evaluations that the tuner saves against random search for the same front.

    python benchmarks/tuning.py --work tuning --model minilm -o tuning.json

A part of the space is evaluated completely once, by `edgelm tune`'s own evaluations (resumable: each goes to a
journal). On this table both searches are replayed with many seeds, so that luck counts for neither. What is
compared is how many evaluations in full random search needs on average for the hypervolume (quality, latency
and size within the limit) that the tuner reaches: once with quality above the dense model's counted as equal to it,
which is what the tuner looks for, and once as it was measured, where luck pays.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import click

from edgelm import schema
from edgelm.models import load_model
from edgelm.targets import load_target
from edgelm.tuning.journal import Journal
from edgelm.tuning.pareto import hypervolume
from edgelm.tuning.running import Job, processes
from edgelm.tuning.search import Found, Limits, drop, search
from edgelm.tuning.setup import Baseline, measure_baseline, read_baseline, write_texts
from edgelm.tuning.space import Configuration, Values, every, presets
from edgelm.tuning.trial import Problem, plain_job

# A part of the space of the target cpu, small enough to be evaluated completely.
SPACE: dict[str, Values] = {
    "neurons": (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0),
    "heads": (0.75, 1.0),
    "precision": ("int8", "fp32"),
    "floats": (0, 4, 8),
    "table_bits": (4, 8),
}
_PERMUTATIONS = 400


def evaluate_all(
    problem: Problem, journal: Journal, workers: int, extra: int
) -> dict[str, Mapping[str, Any]]:
    """The table: every configuration, in part and in full, by the journal's keys."""
    every_one = list(every(SPACE))
    # Those of one recipe follow each other, so that its checkpoint is made once.
    jobs: list[Job] = [(c, f) for c in every_one for f in ("partial", "full")]
    table, todo = {}, {}
    for job in jobs:
        key = plain_job(*job)
        if (known := journal.get(key)) is None:
            todo[json.dumps(key)] = job
        else:
            table[json.dumps(key)] = known
    due = len(table) + len(todo)
    with processes(workers) as run:
        for i, result in run(problem, list(todo.values())):
            if "graph_bytes" in result:
                size = (result["graph_bytes"] + extra) / 1e6
                result = {**result, "size_mb": size}
            key = plain_job(*list(todo.values())[i])
            journal.put(key, result)
            table[json.dumps(key)] = result
            click.echo(f"{len(table)} of {due}: {key} {result}", err=True)
    return table


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--model", default="minilm", show_default=True)
@click.option("--texts", default=128, show_default=True, help="To calibrate on.")
@click.option("--trials", default=24, show_default=True)
@click.option("--seeds", default=20, show_default=True)
@click.option("--max-drop", default=2.0, show_default=True, help="Percent.")
@click.option("--workers", default=2, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    work: Path,
    model: str,
    texts: int,
    trials: int,
    seeds: int,
    max_drop: float,
    workers: int,
    output: Path,
) -> None:
    """Evaluate the table, replay both searches on it, and compare."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    journal = Journal(work / "journal.jsonl", {"model": model, "texts": texts})
    judging = write_texts("built-in", 0, work)
    problem = Problem(model, None, "cpu", str(work), None, 0, texts)
    known = journal.get({"what": "baseline"})
    if known is None:
        loaded, target = load_model(model), load_target("cpu")
        found = measure_baseline(problem, SPACE, loaded, target, judging)
        known = schema.plain(found)
        journal.put({"what": "baseline"}, known)
    baseline = read_baseline(known)
    problem = replace(problem, groups=baseline.groups)
    table = evaluate_all(problem, journal, workers, baseline.extra_bytes)
    result = compare(baseline, table, Limits(max_drop), trials, seeds)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, value in result.items():
        if name != "runs":
            click.echo(f"{name}: {value}")


def compare(
    baseline: Baseline,
    table: Mapping[str, Mapping[str, Any]],
    limits: Limits,
    trials: int,
    seeds: int,
) -> dict[str, Any]:
    """Replay the tuner with several seeds, and random search."""

    def look_up(c: Configuration, fidelity: Any) -> Mapping[str, Any]:
        return table[json.dumps(plain_job(c, fidelity))]

    def point(c: Configuration) -> tuple[float, float, float]:
        full = look_up(c, "full")
        lost = drop(baseline.quality, full["quality"])
        return lost, baseline.costs.predict(c).latency, full["size_mb"]

    points = {c: point(c) for c in every(SPACE)}
    worst = [max(p[i] for p in points.values()) * 1.01 for i in (1, 2)]
    reference = (limits.drop, *worst)
    runs = []
    for seed in range(seeds):
        found: Found = search(
            SPACE,
            presets(SPACE),
            baseline.costs.predict,
            lambda jobs: [look_up(*job) for job in jobs],
            baseline.quality,
            limits,
            trials=trials,
            seed=seed,
        )
        both = [r for r in found.whole if r.predicted is not None]
        missed = [abs((r.predicted or 0) - (r.quality or 0)) for r in both]
        runs.append((found, mean(missed) if missed else None))
    result: dict[str, Any] = {
        "configurations": len(points),
        "most_above_dense": max(-p[0] for p in points.values()),
        "within_the_limit": sum(p[0] <= limits.drop for p in points.values()),
        "considered": median(len(found.rows) for found, _ in runs),
        "whole_evaluations": median(len(found.whole) for found, _ in runs),
        "missed_by": median(missed for _, missed in runs if missed is not None),
    }
    chosen = [[row.configuration for row in found.whole] for found, _ in runs]
    equal = {c: (max(p[0], 0.0), *p[1:]) for c, p in points.items()}
    result["better_counts_as_equal"] = _against_random(equal, reference, chosen)
    result["as_measured"] = _against_random(points, reference, chosen)
    return result


def _against_random(
    points: Mapping[Configuration, Sequence[float]],
    reference: Sequence[float],
    runs: Sequence[Sequence[Configuration]],
) -> dict[str, Any]:
    """How many evaluations random search needs for what each run reached."""
    curve = _random_curve(points, reference)
    whole = hypervolume(list(points.values()), reference)
    reached = [hypervolume([points[c] for c in run], reference) for run in runs]
    needed = [
        next((n for n, v in enumerate(curve, 1) if v >= volume), len(curve))
        for volume in reached
    ]
    saved = [n / len(run) for n, run in zip(needed, runs, strict=True)]
    return {
        "share_of_volume": median(volume / whole for volume in reached),
        "random_needs": median(needed),
        "times_fewer": median(saved),
        "times_fewer_range": [min(saved), max(saved)],
    }


def _random_curve(
    points: Mapping[Configuration, Sequence[float]], reference: Sequence[float]
) -> list[float]:
    """Mean hypervolume of random search after 1, 2, ... evaluations in full."""
    draw = random.Random(0)
    every_one = list(points.values())
    total = [0.0] * len(every_one)
    for _ in range(_PERMUTATIONS):
        draw.shuffle(every_one)
        useful: list[Sequence[float]] = []
        volume = 0.0
        for i, point in enumerate(every_one):
            grown = hypervolume([*useful, point], reference)
            if grown > volume:
                useful, volume = [*useful, point], grown
            total[i] += volume / _PERMUTATIONS
    return total


if __name__ == "__main__":
    main()
