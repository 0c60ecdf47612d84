"""Plots as inline SVG: they open offline and follow the page's light or dark colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_ROW, _LABEL, _WIDTH, _VALUE = 28, 160, 520, 62


def bars(
    title: str, unit: str, rows: Sequence[tuple[str, float]], *, better: str
) -> str:
    """Horizontal bars, one a row.

    Args:
        title: What is shown.
        unit: Of the values.
        rows: Label and value; the first row is highlighted.
        better: ``lower`` or ``higher``.

    Returns:
        An ``<svg>`` element with a text alternative.
    """
    longest = max((value for _, value in rows), default=0.0) or 1.0
    room = _WIDTH - _LABEL - _VALUE
    parts = []
    for i, (label, value) in enumerate(rows):
        y = 34 + i * _ROW
        width = max(1.0, room * value / longest)
        kind = "bar first" if i == 0 else "bar"
        parts.append(
            f'<text class="label" x="{_LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(shorten(label))}</text>'
            f'<rect class="{kind}" x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_ROW - 10}" rx="2"/>'
            f'<text class="value" x="{_LABEL + width + 6:.1f}" y="{y + 15}">{number(value)}</text>'
        )
    height = 40 + len(rows) * _ROW
    heading = f"{title}, {unit} ({better} is better)"
    summary = "; ".join(f"{label}: {number(value)} {unit}" for label, value in rows)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(heading)}. {escape(summary)}">'
        f'<text class="title" x="0" y="16">{escape(heading)}</text>{"".join(parts)}</svg>'
    )


def number(value: float) -> str:
    """A value with three significant digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shorten(text: str, limit: int = 24) -> str:
    """The end of a long label: of a path it is the part that tells."""
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]
