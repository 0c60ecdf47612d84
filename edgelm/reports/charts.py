"""Plots as inline SVG: they open offline and follow the page's light or dark colours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

_ROW, _LABEL, _WIDTH, _VALUE = 28, 160, 440, 62


def bars(
    title: str, unit: str, rows: Sequence[tuple[str, float]], *, better: str = ""
) -> str:
    """Horizontal bars, one a row.

    Args:
        title: What is shown.
        unit: Of the values.
        rows: Label and value; the first row is highlighted.
        better: ``lower`` or ``higher``; nothing where neither is.

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
    heading = f"{title}, {unit}" + (f" ({better} is better)" if better else "")
    summary = "; ".join(f"{label}: {number(value)} {unit}" for label, value in rows)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(heading)}. {escape(summary)}">'
        f'<text class="title" x="0" y="16">{escape(heading)}</text>{"".join(parts)}</svg>'
    )


def lines(
    title: str,
    series: Sequence[tuple[str, Sequence[float]]],
    ends: tuple[str, str] | None = None,
) -> str:
    """Values over the blocks of a model, or over other steps, from zero.

    Args:
        title: What is shown.
        series: Name and a value a step; the first is highlighted.
        ends: Names of the first and last step; blocks if not given.

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
    begin, end = ends or ("block 1", str(count))
    parts += [
        f'<text class="soft" x="{left}" y="{height - 6}">{escape(begin)}</text>',
        f'<text class="soft" x="{width - right}" y="{height - 6}" text-anchor="end">{escape(end)}</text>',
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


# A file of its own does not see the page's colours.
_ALONE = (
    "svg{--ink:#1c2024;--soft:#60646c;--line:#d9dbe0}"
    "@media(prefers-color-scheme:dark){svg{--ink:#edeef0;--soft:#a0a4ab;--line:#3a3d44}}"
    "text{font:12px system-ui,sans-serif;fill:var(--ink)}.title{font-weight:600}"
    ".soft{fill:var(--soft)}.axis{stroke:var(--line)}polyline{fill:none;stroke-width:2}"
)
# Told apart by people who do not see red or green, too (Okabe and Ito).
_COLOURS = ("#0b7a5c", "#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9")


def curves(
    title: str,
    ticks: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    level: tuple[str, float],
) -> str:
    """Several curves over the same steps, as an SVG file of its own, from zero.

    Args:
        title: What is shown.
        ticks: Names of the steps.
        series: At most six names, each with a value a step.
        level: Name and value of what all are compared with: a dashed line.

    Returns:
        The file's text, with a text alternative.
    """
    height, left, top, bottom = 320, 40, 34, 28
    right = 46 + 7 * max(len(name) for name, _ in series)
    width = 440 + right
    highest = max(level[1], *(v for _, values in series for v in values)) or 1.0
    step = (width - left - right) / max(len(ticks) - 1, 1)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / highest

    parts = [
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>',
        f'<line class="axis" stroke-dasharray="4 3" x1="{left}" x2="{width - right}" '
        f'y1="{y(level[1]):.1f}" y2="{y(level[1]):.1f}"/>',
        f'<text class="soft" x="{left - 6}" y="{y(0) + 4:.1f}" text-anchor="end">0</text>',
        f'<text class="soft" x="{left - 6}" y="{y(level[1]) + 4:.1f}" text-anchor="end">{number(level[1])}</text>',
        f'<text class="soft" x="{left + 4}" y="{y(level[1]) - 5:.1f}">{escape(level[0])}</text>',
    ]
    parts += [
        f'<text class="soft" x="{left + i * step:.1f}" y="{height - 8}" text-anchor="middle">{escape(tick)}</text>'
        for i, tick in enumerate(ticks)
    ]
    for i, (name, values) in enumerate(series):
        colour, line = _COLOURS[i], top + 14 + 18 * i
        points = " ".join(
            f"{left + k * step:.1f},{y(v):.1f}" for k, v in enumerate(values)
        )
        parts.append(
            f'<polyline points="{points}" stroke="{colour}"/>'
            f'<rect x="{width - right + 14}" y="{line - 8}" width="12" height="4" fill="{colour}"/>'
            f'<text x="{width - right + 32}" y="{line - 2}">{escape(name)}</text>'
        )
    summary = "; ".join(
        f"{name}: {', '.join(number(v) for v in values)}" for name, values in series
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}. {escape(summary)}"><style>{_ALONE}</style>'
        f'<text class="title" x="0" y="16">{escape(title)}</text>{"".join(parts)}</svg>\n'
    )


def scatter(
    title: str,
    x_name: str,
    y_name: str,
    points: Sequence[tuple[str, float, float, float]],
    *,
    front: Sequence[str],
    alone: bool = True,
    named: Collection[str] | None = None,
) -> str:
    """Points with names; those of the front are joined.

    Args:
        title: What is shown.
        x_name: What the first axis measures; less is better.
        y_name: What the second measures; more is better.
        points: Name, x, y, and what the area of the point stands for.
        front: Names of the points that no other beats in both.
        alone: As an SVG file of its own; else as a part of a page, small enough for a phone.
        named: Names to write beside their points; all if None.

    Returns:
        The file's text or an ``<svg>`` element, with a text alternative.
    """
    labels = [p[0] for p in points if named is None or p[0] in named]
    if alone:
        right = max(150, 24 + 7 * max(map(len, labels), default=0))
        width, height, left, top, bottom = 570 + right, 420, 56, 44, 44
    else:
        width, height, left, right, top, bottom = 440, 280, 48, 24, 56, 44
    xs, ys = [p[1] for p in points], [p[2] for p in points]
    largest = max(p[3] for p in points) or 1.0
    low, high = min(ys), max(ys)
    room = (high - low) * 0.1 or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - right) * x / (max(xs) or 1.0)
        up = (y - low + room) / (high - low + 2 * room)
        return across, height - bottom - (height - top - bottom) * up

    edge = width - right
    parts = [
        f'<line class="axis" x1="{left}" x2="{edge}" y1="{height - bottom}" y2="{height - bottom}"/>',
        f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{height - bottom}"/>',
        f'<text class="soft" x="{left}" y="{top - 8}">{escape(y_name)}</text>',
        f'<text class="soft" x="{edge}" y="{height - 8}" text-anchor="end">{escape(x_name)}</text>',
        f'<text class="soft" x="{left}" y="{height - bottom + 16}" text-anchor="middle">0</text>',
        f'<text class="soft" x="{edge}" y="{height - bottom + 16}" text-anchor="middle">{number(max(xs))}</text>',
        *(
            f'<text class="soft" x="{left - 6}" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{y:.2f}</text>'
            for y in (low, high)
        ),
    ]
    best = sorted((p for p in points if p[0] in front), key=lambda p: p[1])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p[1], p[2]) for p in best))
    # A page has colours of its own, for light and dark.
    strokes = f'stroke="{_COLOURS[0]}"' if alone else 'class="line first"'
    parts.append(f'<polyline points="{line}" {strokes}/>')
    taken: list[tuple[float, float]] = []
    for name, x, y, size in sorted(points, key=lambda p: p[2], reverse=True):
        across, down = at(x, y)
        radius = 3 + 9 * (size / largest) ** 0.5
        best_one = name in front
        fill = f'fill="{_COLOURS[0 if best_one else 1]}"'
        if not alone:
            fill = f'class="bar{" first" if best_one else ""}"'
        parts.append(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{radius:.1f}" {fill} fill-opacity="0.55">'
            f"<title>{escape(name)}</title></circle>"
        )
        if named is not None and name not in named:
            continue
        label = down + 4
        while any(abs(label - b) < 13 and abs(across - a) < 170 for a, b in taken):
            label += 13
        taken.append((across, label))
        shown = name if alone else shorten(name)
        # A name that would leave the picture stands before its point.
        fits = across + radius + 4 + 7 * len(shown) < width
        place, anchor = (
            (across + radius + 4, "start") if fits else (across - radius - 4, "end")
        )
        parts.append(
            f'<text x="{place:.1f}" y="{label:.1f}" text-anchor="{anchor}">{escape(shown)}</text>'
        )
    summary = "; ".join(f"{n}: {number(x)}, {number(y)}" for n, x, y, _ in points)
    head = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}. {escape(summary)}"'
    body = (
        f'<text class="title" x="0" y="16">{escape(title)}</text>{"".join(parts)}</svg>'
    )
    if not alone:
        return f"<svg {head}>{body}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}><style>{_ALONE}</style>{body}\n'
