"""The page of a tuning run: the verdict, quality over latency and size, predicted against actual, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from edgelm.reports.charts import scatter
from edgelm.reports.html import fact_list, page, table

FINALISTS = (
    "configuration",
    "",
    "drop %",
    "drop confirmed %",
    "size MB",
    "latency predicted",
    "p50 ms",
    "p95 ms",
    "times the first's latency",
)
_CANDIDATES = (
    "configuration",
    "partial",
    "predicted",
    "± error",
    "actual",
    "drop %",
    "latency predicted",
    "size MB",
    "",
)


def tuning_page(result: Mapping[str, Any]) -> str:
    """The page of a run.

    Args:
        result: What `edgelm.tuning.tune.tune` returned.

    Returns:
        HTML without any reference to a network.
    """
    request, machine = result["request"], result["environment"]
    facts = [
        ("Model", request["model"]),
        ("Target", result["target"]),
        ("Limits", result["limits"]),
        ("Quality", f"{result['measure']}; dense {result['dense']:.2f}"),
        ("Seed", str(request["seed"])),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
        ("Measured", machine["measured_at"]),
    ]
    return page(
        f"{request['model']} for {request['target']}: tuning",
        f'<p class="verdict">{escape(result["verdict"])}</p>'
        + "".join(f'<p class="note">{escape(s)}</p>' for s in sentences(result)[1:])
        + f"<h2>Quality against latency and size</h2>{_plots(result)}"
        + f"<h2>Finalists</h2>{table(FINALISTS, finalist_rows(result))}"
        + f"<h2>Predicted against actual</h2>{_errors(result)}{table(_CANDIDATES, _candidate_rows(result))}"
        + f"<h2>Environment</h2>{fact_list(facts)}",
    )


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The verdict, and what to know to read it."""
    tune, confirm = result["judged_on"]
    data = result["request"].get("data")
    source = (
        f"labelled rows of {data}"
        if data
        else "rows made of held-out texts, without labels"
    )
    whole, considered = result["whole"], result["considered"]
    said = [
        result["verdict"],
        f"Quality is the {result['measure']}: {tune} {source} chose the result; {confirm} others confirm it.",
        f"{considered} configurations were considered, {whole} of them evaluated in full.",
    ]
    if not result["measured"]:
        said.append(
            "The target is not this machine: nothing was measured for it. Latency is the bytes of weights that a text "
            "needs read, as a share of the dense float32 model's."
        )
    return said


def finalist_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of finalists."""
    return [
        [
            f["name"],
            ", ".join(
                word
                for word, is_so in (
                    ("chosen", f["chosen"]),
                    ("best preset", f["preset"]),
                )
                if is_so
            ),
            f"{f['drop']:.2f}",
            _number(f, "confirmed_drop"),
            f"{f['size_mb']:.1f}",
            f"{f['predicted']:.2f}",
            _number(f, "p50_ms"),
            _number(f, "p95_ms"),
            _number(f, "latency_ratio"),
        ]
        for f in result["finalists"]
    ]


def _candidate_rows(result: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["name"],
            _number(row, "partial"),
            _number(row, "predicted"),
            _number(row, "error"),
            _number(row, "quality"),
            _number(row, "drop"),
            f"{row['costs']['latency']:.2f}",
            f"{row.get('size_mb', row['costs']['size_mb']):.1f}",
            row["stopped"] or ("on the front" if row["front"] else ""),
        ]
        for row in result["rows"]
    ]


def _errors(result: Mapping[str, Any]) -> str:
    learnt = result["predictor"]
    if not learnt:
        return '<p class="note">Too few results to predict any.</p>'
    errors = ", ".join(
        f"{kind} {error:.2f}" for kind, error in learnt["errors"].items()
    )
    both = [r for r in result["rows"] if "predicted" in r and "quality" in r]
    missed = [abs(r["predicted"] - r["quality"]) for r in both]
    mean = (
        f" Predictions were off by {sum(missed) / len(missed):.2f} on average."
        if missed
        else ""
    )
    text = f"Cross-validated error of quality in the end: {errors}. {learnt['kind']} was used.{mean}"
    return f'<p class="note">{escape(text)}</p>'


def _plots(result: Mapping[str, Any]) -> str:
    """Quality over latency and over size, of what was evaluated in full."""
    whole = [row for row in result["rows"] if "quality" in row]
    if not whole:
        return ""
    unit = (
        "ms for one text, predicted"
        if result["measured"]
        else "weight bytes read, dense float32 = 1"
    )
    named = {f["name"] for f in result["finalists"]}
    front = [row["name"] for row in whole if row["front"]]
    plots = []
    for what, axis in (("latency", unit), ("size", "MB")):
        points = [
            (
                row["name"],
                row["costs"]["latency"] if what == "latency" else row["size_mb"],
                row["quality"],
                row["size_mb"],
            )
            for row in whole
        ]
        title = f"Quality against {what}"
        plots.append(scatter(title, axis, "quality", points, front=front, named=named))
    return "".join(plots)


def _number(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if row.get(key) is not None else ""
