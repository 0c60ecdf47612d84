"""A run of the accuracy suite, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgelm.reports.charts import bars
from edgelm.reports.html import table

_SLICES = ("by", "slice", "units", "measure", "value", "95 % interval")


def quality_verdicts(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each data set, and what a reader must know."""
    said = []
    for data in result["datasets"]:
        name, value = next(iter(data["measures"].items()))
        low, high = data["intervals"][name]
        alone = (
            f"{name} of {result['model']['name']} on {data['name']} is {value:.2f} "
            f"(95 % interval {low:.2f} to {high:.2f})."
        )
        said += [data.get("statement", alone), *data["notes"]]
    return said


def quality_section(result: Mapping[str, Any]) -> str:
    """The part of a page that shows one run, HTML."""
    return "".join(_dataset(result, data) for data in result["datasets"])


def _dataset(result: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    names = [result["model"]["name"]]
    other = data.get("against")
    if other is not None:
        names.append(result["against"]["name"])
    main = next(iter(data["measures"]))
    both = [data["measures"][main], *([other[main]] if other else [])]
    shown = [
        (name, value) for name, value in zip(names, both, strict=True) if value > 0
    ]
    rows = []
    for name, value in data["measures"].items():
        low, high = data["intervals"][name]
        cells = [name, f"{value:.2f}", f"{low:.2f} to {high:.2f}"]
        if other is not None:
            found = next(c for c in data["comparisons"] if c["measure"] == name)
            low, high = found["interval"]
            cells += [f"{other[name]:.2f}", f"{found['difference']:+.2f}"]
            cells += [f"{low:+.2f} to {high:+.2f}", f"{found['p']:.2g}"]
        rows.append(cells)
    columns = ["measure", names[0], "95 % interval"]
    if other is not None:
        columns += [names[1], "difference", "95 % interval", "p"]
    return (
        f"<h2>Quality: {escape(data['name'])}</h2>"
        f'<p class="note">{data["kind"]}, {data["rows"]} rows, {data["units"]} units; SHA-256 of the data '
        f"{data['digest'][:16]}. Intervals by the bootstrap, {result['resamples']} draws, seed {result['seed']}"
        f"{', both models on the same draws' if other else ''}.</p>"
        f"{bars(main, _unit(main), shown) if shown else ''}{table(columns, rows)}"
        f"{_slices(data['slices'], names)}{_changes(data, names)}"
    )


def _unit(measure: str) -> str:
    return "" if measure in ("perplexity", "mae") else "of 100"


def _slices(slices: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    if not slices:
        return ""
    rows = []
    for one in slices:
        cells = [one["by"], one["name"], str(one["units"]), one["measure"]]
        cells += [_two(one["value"]), _span(one["interval"])]
        if len(names) > 1:
            cells += [
                _two(one.get("against")),
                _span(one.get("difference", (None, None))),
            ]
        rows.append(cells)
    columns = list(_SLICES)
    if len(names) > 1:
        columns += [names[1], "interval of the difference"]
    return f"<h3>By length, label and domain</h3>{table(columns, rows)}"


def _changes(data: Mapping[str, Any], names: Sequence[str]) -> str:
    if not data.get("disagreements"):
        return ""
    rows = [
        [
            one["unit"][:300],
            f"{one['change']:.2f}",
            *(
                _answer(one.get(key), one["unit"])
                for key in ("model", "against", "gold")
            ),
        ]
        for one in data["disagreements"]
    ]
    return (
        "<h3>Where the answers changed most</h3>"
        f"{table(('text', 'change', *names, 'the data says'), rows, wrap=True)}"
    )


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _span(interval: Sequence[float | None]) -> str:
    low, high = interval
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _answer(answer: Any, unit: str) -> str:
    """An answer in few words."""
    if answer is None:
        return ""
    if isinstance(answer, float):
        return f"{answer:.3f}"
    if isinstance(answer, dict):
        return f"{answer['label']} ({answer['scores'][answer['label']]:.2f})"
    if isinstance(answer, list):
        return ", ".join(_part(part, unit) for part in answer[:10]) or "none"
    return str(answer)


def _part(part: Any, unit: str) -> str:
    """A span or the id of a document."""
    if isinstance(part, dict):
        part = (part["start"], part["end"], part["label"])
    if isinstance(part, str):
        return part
    start, end, label = part
    return f"{unit[start:end]} {label}"
