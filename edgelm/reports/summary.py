"""One page of what was recorded: verdicts first, then quality, speed, errors, sizes, and where all of it is from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgelm.errors import InputError
from edgelm.metrics import LOWER_IS_BETTER
from edgelm.provenance import describe
from edgelm.reports.charts import bars, number, scatter
from edgelm.reports.compression import layers_section, size_sentence
from edgelm.reports.html import fact_list, page, table
from edgelm.reports.latency import latency_section, machine_facts, verdicts
from edgelm.reports.quality import quality_section, quality_verdicts

EVAL, BENCH, CHECKPOINT = "edgelm-eval", "edgelm-bench", "edgelm-checkpoint"
Result = Mapping[str, Any]


def kind_of(result: Any, name: str) -> str:
    """What a recorded result is.

    Raises:
        InputError: It is none that edgelm records.
    """
    found = isinstance(result, Mapping) and (result.get("kind") or result.get("format"))
    if found not in (EVAL, BENCH, CHECKPOINT):
        raise InputError(
            f"{name} is no result of edgelm. Give the JSON that edgelm eval --report or edgelm bench --report wrote, "
            "or the edgelm.json of a checkpoint."
        )
    return str(found)


def summary_page(results: Sequence[Result]) -> str:
    """The page of any number of results.

    Args:
        results: What ``edgelm eval`` and ``edgelm bench`` recorded, and what checkpoints'
            ``edgelm.json`` hold.

    Returns:
        HTML without any reference to a network.
    """
    by_kind = {
        kind: [r for r in results if kind_of(r, "The result") == kind]
        for kind in (EVAL, BENCH, CHECKPOINT)
    }
    evals, benches, checkpoints = by_kind.values()
    said = [s for r in evals for s in quality_verdicts(r)]
    said += [s for r in benches for s in verdicts(r)]
    said += [size_sentence(r["report"]) for r in checkpoints]
    models = _models(results)
    return page(
        f"{_title(results)}: {', '.join(_WORDS[k] for k, found in by_kind.items() if found)}",
        "".join(f'<p class="verdict">{escape(v)}</p>' for v in said)
        + _trade(evals, benches)
        + "".join(map(quality_section, evals))
        + "".join(map(latency_section, benches))
        + "".join(map(layers_section, checkpoints))
        + _sizes(models)
        + _origins(results, models)
        + _again(results),
    )


_WORDS = {EVAL: "quality", BENCH: "latency", CHECKPOINT: "compression"}


def _title(results: Sequence[Result]) -> str:
    first = results[0]
    if kind_of(first, "The result") == BENCH:
        return str(first["contenders"][0]["name"])
    return str(first["model"]["name"])


def _models(results: Sequence[Result]) -> list[Result]:
    """Every model that a number is of, once."""
    found: list[Result] = []
    for result in results:
        if result.get("kind") == EVAL:
            found += [result["model"], *filter(None, [result["against"]])]
        elif result.get("kind") == BENCH:
            found += [c["identity"] for c in result["contenders"]]
    return list({(m["name"], m.get("digest")): m for m in found}.values())


def front(points: Sequence[tuple[str, float, float]], rising: bool) -> list[str]:
    """Names of the points that no other beats in both: less of the first, and more of the second.

    Args:
        points: Name, first and second value.
        rising: Whether more of the second is better, or less.
    """
    sign = 1 if rising else -1
    return [
        name
        for name, x, y in points
        if not any(
            a <= x and sign * b >= sign * y and (a, b) != (x, y) for _, a, b in points
        )
    ]


def _trade(evals: Sequence[Result], benches: Sequence[Result]) -> str:
    """Quality against latency: a plot and a table for each data set, of models measured in both."""
    speeds = {}
    for bench in benches:
        for c in bench["contenders"]:
            for key in (c["name"], c["identity"].get("digest")):
                speeds[key] = (c["p50_ms"], c["size_mb"])
    values: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
    for result in evals:
        for data in result["datasets"]:
            main = next(iter(data["measures"]))
            both = ((result["model"], data["measures"]), (result["against"], data.get("against")))  # fmt: skip
            for model, measured in both:
                if model is None or measured is None:
                    continue
                speed = speeds.get(model.get("digest"), speeds.get(model["name"]))
                if speed is not None:
                    known = values.setdefault((data["name"], main), {})
                    known[model["name"]] = (speed[0], measured[main], speed[1])
    parts = []
    for (name, main), points in values.items():
        if len(points) < 2:
            continue
        rising = main not in LOWER_IS_BETTER
        best = front([(n, p[0], p[1]) for n, p in points.items()], rising)
        label = f"{main}{'' if rising else ' (lower is better)'}"
        plot = scatter(
            f"{label} against latency, {name}",
            "p50 of one text, ms (less is better)",
            label,
            [(n, *p) for n, p in points.items()],
            front=best,
            alone=False,
        )
        rows = [
            [n, f"{y:.2f}", number(x), number(size), "yes" if n in best else "no"]
            for n, (x, y, size) in points.items()
        ]
        columns = ("model", main, "p50 ms", "size MB", "not beaten in both")
        parts.append(
            f'{plot}<p class="note">The area of a point is the size on disk.</p>{table(columns, rows)}'
        )
    return f"<h2>Quality against latency</h2>{''.join(parts)}" if parts else ""


def _sizes(models: Sequence[Result]) -> str:
    """What lies on the disk, file by file."""
    parts = []
    for model in models:
        files = sorted(model.get("files", {}).items(), key=lambda f: -f[1])
        if files:
            rows = [(name, size / 1e6) for name, size in files]
            cells = [[name, f"{size / 1e6:.2f}"] for name, size in files]
            parts.append(
                f"<h3>{escape(model['name'])}</h3>{bars('Files', 'MB', rows)}{table(('file', 'MB'), cells)}"
            )
    return f"<h2>What lies on the disk</h2>{''.join(parts)}" if parts else ""


def _origins(results: Sequence[Result], models: Sequence[Result]) -> str:
    """Recipe and provenance of every model, data set and machine."""
    parts = ["<h2>Where the numbers come from</h2>"]
    for model in models:
        source = model.get("source") or {}
        what = (model.get("kind"), model.get("task"), model.get("precision"))
        origin = f"{source.get('name', 'not told')}, SHA-256 of its weights {source.get('digest', 'not told')}"
        facts = [
            ("Kind", " ".join(filter(None, what))),
            ("SHA-256", model.get("digest") or "not told"),
            *(
                describe(chain)
                if (chain := model.get("lineage"))
                else [("Made from", origin)]
            ),
        ]
        if index := model.get("index"):
            facts.append(
                ("Index", f"{index['documents']} documents, {index['bits']} bits")
            )
        steps = model.get("recipe", {}).get("steps") or model.get("steps")
        parts.append(
            f"<h3>{escape(model['name'])}</h3>{fact_list(facts)}{_recipe(steps)}"
        )
    for result in results:
        if result.get("format") == CHECKPOINT:
            model, cost = result["model"], result["cost"]
            text = f"{cost['texts']} texts, {cost['tokens']} tokens, SHA-256 {result['calibration_digest']}"
            facts = [
                ("Made from", f"{model['name']}, SHA-256 {model['source_digest']}"),
                ("Calibrated on", text),
                ("Made by", result["created_by"]),
            ]  # fmt: skip
            parts.append(
                f"<h3>The compression</h3>{fact_list(facts)}{_recipe(result['recipe'])}"
            )
    machines = {}
    for result in results:
        told = result.get("machine") or result.get("environment")
        if told:
            facts = machine_facts(told)
            machines[result["kind"]] = (
                f"<h3>Machine of the {_WORDS[result['kind']]}</h3>{fact_list(facts)}"
            )
    return "".join([*parts, *machines.values()])


def _recipe(steps: Any) -> str:
    if not steps:
        return '<p class="note">Not compressed.</p>'
    return f'<pre class="scroll">{escape(json.dumps(steps, indent=1))}</pre>'


def _again(results: Sequence[Result]) -> str:
    """The commands that gave the numbers."""
    commands = [r["command"] for r in results if r.get("command")]
    if not commands:
        return ""
    data = {
        d["name"]: d["digest"]
        for r in results
        if "datasets" in r
        for d in r["datasets"]
    }
    facts = [(name, f"SHA-256 {digest or 'not told'}") for name, digest in data.items()]
    seeds = sorted({str(r["seed"]) for r in results if "seed" in r})
    facts += [("Seed of the bootstrap", ", ".join(seeds))] if seeds else []
    shown = "\n".join(commands)
    return f'<h2>To get them again</h2><pre class="scroll">{escape(shown)}</pre>{fact_list(facts)}'
