"""One self-contained HTML file, without any reference to a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

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
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; max-width: 34rem; height: auto; margin: .6rem 0; display: block; }
svg text { font: 13px system-ui, sans-serif;
  fill: var(--ink); } svg .title { font-weight: 600; } .bar { fill: var(--bar); }
.first { fill: var(--first); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1.5rem; }
.panels svg { max-width: 23rem; }
.line { fill: none; stroke: var(--bar); stroke-width: 1.5; }
.line.first { fill: none; stroke: var(--first); stroke-width: 2; } .axis { stroke: var(--line); }
svg .soft { fill: var(--soft); font-size: 11px; } svg polyline { fill: none; stroke-width: 2; }
.wrap th, .wrap td { white-space: normal; text-align: left; vertical-align: top;
  min-width: 5.5rem; overflow-wrap: anywhere; }
.wrap td:first-child { min-width: 14rem; }
pre { font-size: .8rem; border: 1px solid var(--line); padding: .6rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } h1, h2, h3, .verdict, .note { overflow-wrap: anywhere; }
@media (max-width: 30rem) { body { margin: 1rem auto; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .4rem; } }
code { font-size: .875em; overflow-wrap: anywhere; }
"""


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, wrap: bool = False
) -> str:
    """An HTML table that scrolls by itself where it is wider than the page.

    Args:
        columns: Headings.
        rows: Cells.
        wrap: Whether cells hold sentences, which are broken into lines.
    """
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    kind = ' class="wrap"' if wrap else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


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
