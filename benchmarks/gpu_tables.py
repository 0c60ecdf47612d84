"""The Markdown of `benchmarks/gpu.py`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def tables(result: Row) -> str:
    """The result as Markdown."""
    machine = result["about"]
    lines = [f"Device: {machine['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    part = result["compress"]
    if "reason" in part:
        lines += ["", f"compress: {part['reason']}"]
    else:
        took = part["seconds"]
        head = (
            "compress 2:4",
            "seconds, CPU",
            f"seconds, {result['device']}",
            "equal mask",
        )
        cells = (
            part["model"],
            took["cpu"],
            took["device"],
            f"{part['equal_mask']:.6f}",
        )
        more = (f"{part['db']:.1f}", f"{part['least_cosine']:.6f}")
        lines += table((*head, "dB between outputs", "least cosine"), [(*cells, *more)])
    lines += graph_table(result["graphs"]) + layer_table(result["layers"])
    return "\n".join(lines)


def graph_table(rows: list[Row]) -> list[str]:
    """Parity, speed and placement, a row for each precision."""
    shapes = list(dict.fromkeys(key for row in rows for key in row["ms"]))
    cells = []
    for row in rows:
        if "db" not in row:
            cells.append((row["precision"], row["reason"], *["-"] * (3 + len(shapes))))
            continue
        ms = [row["ms"][key] for key in shapes]
        told = [
            m["reason"]
            if "reason" in m
            else f"{m['p50']:.2f}"
            + (
                f" ({m['times_as_fast_as_fp32']:.2f}x)"
                if m["times_as_fast_as_fp32"]
                else ""
            )
            for m in ms
        ]
        placed = row.get("operators")
        strays = row.get("operators_reason", "")
        if placed is not None:
            strays = sum(placed.get("CPUExecutionProvider", {}).values())
        mean, least = (f"{row[k]:.6f}" for k in ("mean_cosine", "least_cosine"))
        cells.append((row["precision"], f"{row['db']:.1f}", mean, least, strays, *told))
    head = ("graph", "dB", "mean cosine", "least cosine", "operators on the CPU")
    return table((*head, *(f"ms, {key}" for key in shapes)), cells)


def layer_table(rows: list[Row]) -> list[str]:
    """Dense and 2:4, a row for each weight, format and number of tokens."""
    kinds = ("dense", "2:4", "2:4, searched")
    cells = []
    for row in rows:
        ms, db = row.get("ms", {}), row.get("db", {})
        told = [f"{ms[k]:.4f}" if k in ms else "-" for k in kinds]
        least = min((ms[k] for k in kinds[1:] if k in ms), default=None)
        gain = f"{ms['dense'] / least:.2f}x" if least else "-"
        parity = ", ".join(f"{db[k]:.1f}" for k in kinds if k in db)
        shape = f"{row['out']}x{row['in']}"
        cells.append(
            (
                shape,
                row["format"],
                row["tokens"],
                *told,
                gain,
                parity,
                row.get("reason", ""),
            )
        )
    head = ("layer", "format", "tokens", "ms, dense", "ms, 2:4", "ms, 2:4 searched")
    return table((*head, "2:4 against dense", "dB to float64", "why not"), cells)


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    """A Markdown table; what would break a row is taken out of its cells."""
    lines = ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = (" ".join(str(cell).replace("|", "/").split()) for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return lines
