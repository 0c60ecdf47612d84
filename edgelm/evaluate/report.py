"""One self-contained HTML file: verdicts, plots with tables under them, provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgelm.evaluate.charts import bars, number

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9dbe0;
  --page: #fcfcfd; --bar: #a3acb8; --first: #0b7a5c; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #a0a4ab;
  --line: #3a3d44; --page: #111113; --bar: #5c6470; --first: #3ecf9e; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.note { color: var(--soft); } .verdict { font-size: 1.1rem; margin: .4rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; max-width: 40rem; height: auto; margin: .6rem 0; display: block; }
svg text { font: 13px system-ui, sans-serif;
  fill: var(--ink); } svg .title { font-weight: 600; } .bar { fill: var(--bar); }
.first { fill: var(--first); } code { font-size: .875em; overflow-wrap: anywhere; }
"""

# Column of a contender -> title, unit, which way is better.
_PLOTS = (
    ("p50_ms", "Latency of one text, median", "ms", "lower"),
    ("texts_per_s", "Throughput", "texts/s", "higher"),
    ("memory_mib", "Peak memory, proportional", "MiB", "lower"),
    ("size_mb", "Size on disk", "MB", "lower"),
)
COLUMNS = (
    ("name", ""),
    ("runtime", "runtime"),
    ("precision", "precision"),
    ("p50_ms", "p50 ms"),
    ("p95_ms", "p95 ms"),
    ("p99_ms", "p99 ms"),
    ("texts_per_s", "texts/s"),
    ("cold_start_ms", "cold start ms"),
    ("memory_mib", "memory MiB"),
    ("size_mb", "size MB"),
)


def latency_page(result: Mapping[str, Any]) -> str:
    """The page of one benchmark.

    Args:
        result: What `benchmark` returned.

    Returns:
        HTML without any reference to a network.
    """
    contenders = result["contenders"]
    plots = "".join(
        bars(title, unit, [(c["name"], c[key]) for c in contenders], better=better)
        for key, title, unit, better in _PLOTS
    )
    work, environment = result["workload"], result["environment"]
    threads = work["threads"] or "all"
    about = (
        f"{work['texts']} texts of {work['mean_characters']:.0f} characters on average; {work['rounds']} rounds, the "
        f"contenders in turn, each in its own process; {threads} threads. Latency is of one text at a time, "
        "tokenisation included; throughput of all texts in one call."
    )
    facts = [
        ("CPU", f"{environment['cpu']}, {environment['cores']} cores"),
        ("System", environment["system"]),
        ("Versions", ", ".join(f"{k} {v}" for k, v in environment["versions"].items())),
        ("Measured", environment["measured_at"]),
    ]
    return page(
        f"{contenders[0]['name']}: latency",
        "".join(f'<p class="verdict">{escape(v)}</p>' for v in verdicts(result))
        + f'<p class="note">{escape(about)}</p>'
        + f"<h2>Side by side</h2>{plots}"
        + table([title for _, title in COLUMNS], contender_rows(result))
        + f"<h2>Environment</h2>{fact_list(facts)}",
    )


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """One sentence for each comparison."""
    first = result["contenders"][0]["name"]
    sentences = []
    for ratio, other in zip(result["ratios"], result["contenders"][1:], strict=True):
        low, high = ratio["throughput_range"]
        slow, fast = ratio["latency_range"]
        smaller = other["size_mb"] / result["contenders"][0]["size_mb"]
        sentences.append(
            f"{first} against {ratio['against']}: {ratio['throughput']:.2f} times the throughput "
            f"({low:.2f} to {high:.2f} by round), {ratio['latency']:.2f} times the latency "
            f"({slow:.2f} to {fast:.2f}), {smaller:.1f} times smaller."
        )
    return sentences


def contender_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of contenders."""
    return [
        [
            number(c[key]) if isinstance(c[key], float) else str(c[key])
            for key, _ in COLUMNS
        ]
        for c in result["contenders"]
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def fact_list(facts: Sequence[tuple[str, str]]) -> str:
    """Names and values, one a line."""
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts)
    return f"<dl>{rows}</dl>"


def page(title: str, body: str) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
