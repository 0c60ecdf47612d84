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


def lines(title: str, series: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Values over the blocks of a model, from zero.

    Args:
        title: What is shown.
        series: Name and a value a block; the first is highlighted.

    Returns:
        An ``<svg>`` element with a text alternative.
    """
    width, height, left, right, top, bottom = 300, 150, 38, 10, 30, 22
    highest = max((v for _, values in series for v in values), default=0.0) or 1.0
    count = max(len(values) for _, values in series)
    step = (width - left - right) / max(count - 1, 1)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / highest

    parts = [
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text class="soft" x="{left - 5}" y="{y(v) + 4:.1f}" text-anchor="end">{label}</text>'
        for v, label in ((0.0, "0"), (highest, number(highest)))
    ]
    for i, (name, values) in reversed(list(enumerate(series))):
        points = " ".join(
            f"{left + k * step:.1f},{y(v):.1f}" for k, v in enumerate(values)
        )
        kind = "line first" if i == 0 else "line"
        parts.append(
            f'<polyline class="{kind}" points="{points}"><title>{escape(name)}</title></polyline>'
        )
        if count == 1:
            dot = "bar first" if i == 0 else "bar"
            parts.append(
                f'<circle class="{dot}" cx="{left}" cy="{y(values[0]):.1f}" r="3"/>'
            )
    parts += [
        f'<text class="soft" x="{left}" y="{height - 6}">block 1</text>',
        f'<text class="soft" x="{width - right}" y="{height - 6}" text-anchor="end">{count}</text>',
    ]
    summary = "; ".join(
        f"{name}: {', '.join(number(v) for v in values)}" for name, values in series
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}. {escape(summary)}">'
        f'<text class="title" x="0" y="16">{escape(title)}</text>{"".join(parts)}</svg>'
    )


def number(value: float) -> str:
    """A value with three significant digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shorten(text: str, limit: int = 24) -> str:
    """The end of a long label: of a path it is the part that tells."""
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]
