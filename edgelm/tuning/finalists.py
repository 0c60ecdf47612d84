"""The last round: what may win is built, confirmed on other rows, and measured in turns with the best preset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edgelm.evaluate.latency import Workload, benchmark
from edgelm.export import export
from edgelm.runtimes import load
from edgelm.targets import load_target
from edgelm.tuning.costs import runs_here
from edgelm.tuning.journal import Journal
from edgelm.tuning.search import Found, Limits, Row, drop
from edgelm.tuning.setup import Baseline
from edgelm.tuning.space import Configuration
from edgelm.tuning.trial import Problem, float_graph, judges_of, kept, ranges_of

_FINALISTS = 3
# Latencies nearer than this are alike here; then quality decides.
_ALIKE = 0.03
# Texts of a turn.
_TEXTS = 96


def build_finalists(
    problem: Problem,
    limits: Limits,
    baseline: Baseline,
    found: Found,
    start: Sequence[Configuration],
    journal: Journal,
    texts: Sequence[str],
) -> list[dict[str, Any]]:
    """Build what may win, and the best preset beside it.

    Args:
        problem: What is tuned.
        limits: What is asked for.
        baseline: The dense model.
        found: What the search found.
        start: The presets.
        journal: Where measured latencies are kept.
        texts: Texts to measure with.

    Returns:
        Of each: its configuration, bundle, quality, ``drop`` and ``size_mb``, ``predicted`` latency, and
        whether it is the best preset; where the target is this machine ``confirmed`` quality and what was
        measured.
    """
    ready = sorted(_within(limits, baseline, found.front), key=_latency)
    chosen = ready[:_FINALISTS]
    tried = [r for r in found.whole if r.configuration in start]
    best_preset = min(_within(limits, baseline, tried), key=_latency, default=None)
    if best_preset is not None and best_preset not in chosen:
        chosen.append(best_preset)
    here = runs_here(load_target(problem.target))
    confirm = judges_of(problem)[1]
    made = []
    for number, row in enumerate(chosen):
        about = _build(problem, row, Path(problem.work) / f"finalist-{number}")
        about["drop"] = drop(baseline.quality, row.quality or 0)
        about["preset"] = row is best_preset
        if here:
            value = confirm(load(about["bundle"], threads=1))
            about["confirmed"] = value
            about["confirmed_drop"] = drop(baseline.confirmed, value)
        made.append(about)
    if here and made:
        _measure(made, journal, texts)
    return made


def _build(problem: Problem, row: Row, path: Path) -> dict[str, Any]:
    c = row.configuration
    loaded, source = float_graph(problem, c)
    bundle = export(
        loaded,
        problem.target,
        path,
        precision=c.precision,
        table_bits=c.table_bits,
        calibration=ranges_of(problem),
        keep=kept(problem, c),
        float_graph=source,
        force=True,
    )
    return {
        "configuration": c,
        "name": c.name,
        "bundle": str(bundle.path),
        "quality": row.quality,
        "size_mb": bundle.size_bytes / 1e6,
        "predicted": row.costs.latency,
    }


def _measure(
    made: Sequence[dict[str, Any]], journal: Journal, texts: Sequence[str]
) -> None:
    """Latencies in turns, once a run; ratios are of the same turn, against the first."""
    key = {"what": "latency", "of": [about["name"] for about in made]}
    timed = journal.get(key)
    if timed is None:
        some = tuple(texts[:: max(len(texts) // _TEXTS, 1)])
        bundles = [about["bundle"] for about in made]
        timed = benchmark(bundles, Workload(some))["contenders"]
        journal.put(key, timed)
    first = [median(turn) for turn in timed[0]["latencies_ms"]]
    for about, times in zip(made, timed, strict=True):
        turns = [median(turn) for turn in times["latencies_ms"]]
        ratios = [a / b for a, b in zip(turns, first, strict=True)]
        about["latency_ratio"] = median(ratios)
        about |= {k: times[k] for k in ("p50_ms", "p95_ms", "texts_per_s")}


def _within(limits: Limits, baseline: Baseline, rows: Sequence[Row]) -> list[Row]:
    """The rows that keep to the limits, latency aside."""
    return [
        row
        for row in rows
        if drop(baseline.quality, row.quality or 0) <= limits.drop
        and (row.size_mb or 0) <= (limits.size_mb or math.inf)
    ]


def _latency(row: Row) -> float:
    return row.costs.latency


def choose(
    finalists: Sequence[dict[str, Any]], limits: Limits
) -> dict[str, Any] | None:
    """The fastest that keeps to the limits; of those alike in speed the one of best quality.

    One whose drop on the confirming rows is above the limit, too, comes after all the others.
    """
    fit = [
        f
        for f in finalists
        if f.get("p95_ms", 0) <= (limits.p95_ms or math.inf)
        and f["size_mb"] <= (limits.size_mb or math.inf)
    ]
    confirmed = [f for f in fit if f.get("confirmed_drop", 0.0) <= limits.drop]
    fit = confirmed or fit
    least = min(map(speed, fit), default=0.0)
    alike = [f for f in fit if speed(f) <= least * (1 + _ALIKE)]
    return max(alike, key=lambda f: f["quality"], default=None)


def speed(about: Mapping[str, Any]) -> float:
    """A finalist's latency, by what is measured or else predicted."""
    return float(about.get("latency_ratio", about["predicted"]))


def verdict(
    limits: Limits,
    baseline: Baseline,
    found: Found,
    finalists: Sequence[dict[str, Any]],
    best: dict[str, Any] | None,
) -> str:
    """What came out, in a sentence."""
    if best is None:
        return _nothing(limits, baseline, found, finalists)
    said = f"{best['name']}: {_against(best['drop'])} the dense model, {best['size_mb']:.1f} MB"
    measured = "p50_ms" in best
    if measured:
        said += f", p50 {best['p50_ms']:.2f} ms, p95 {best['p95_ms']:.2f} ms"
    if best.get("confirmed_drop", 0.0) > limits.drop:
        said += f"; by the confirming rows {_against(best['confirmed_drop'])}, more than asked for"
    preset = next((f for f in finalists if f["preset"]), None)
    if preset is best:
        return said + "; it is the best preset itself."
    if preset is not None:
        what = "latency" if measured else "predicted cost"
        said += (
            f"; {speed(best) / speed(preset):.2f} times the {what} of the best preset, {preset['name']} "
            f"({_against(preset['drop'])} dense, {preset['size_mb']:.1f} MB)"
        )
    return said + "."


def _against(lost: float) -> str:
    return f"{abs(lost):.2f} % {'below' if lost >= 0 else 'above'}"


def asked_for(limits: Limits) -> str:
    """The limits in words."""
    asked = [f"a drop of at most {limits.drop:g} %"]
    asked += [] if limits.p95_ms is None else [f"a p95 of {limits.p95_ms:g} ms"]
    asked += [] if limits.size_mb is None else [f"{limits.size_mb:g} MB"]
    return " and ".join(asked)


def _nothing(
    limits: Limits,
    baseline: Baseline,
    found: Found,
    finalists: Sequence[dict[str, Any]],
) -> str:
    said = f"Of {len(found.rows)} configurations none keeps to {asked_for(limits)}."
    if finalists:
        near = min(finalists, key=lambda f: f.get("p95_ms", f["size_mb"]))
        p95 = f"p95 {near['p95_ms']:.2f} ms, " if "p95_ms" in near else ""
        return f"{said} Closest: {near['name']}, a drop of {near['drop']:.2f} %, {p95}{near['size_mb']:.1f} MB."
    if not found.whole:
        return said
    row = max(found.whole, key=lambda r: r.quality or 0)
    lost, size = drop(baseline.quality, row.quality or 0), row.size_mb
    return f"{said} Closest: {row.configuration.name}, a drop of {lost:.2f} %, {size:.1f} MB."
