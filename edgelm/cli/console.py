"""How commands print: JSON lines on stdout, everything for people on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

# A pipe or a log has no width of its own; tables must not break there.
_WIDTH = None if sys.stderr.isatty() else 160
console = Console(stderr=True, highlight=False, soft_wrap=True, width=_WIDTH)


class Real(click.FloatRange):
    """A number that is not NaN, against which no limit would ever be missed."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As `click.FloatRange`, without NaN."""
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


TASKS = click.Choice(["embedding", "ner", "scoring", "lm"])
OUTPUT = click.Path(path_type=Path)


def emit(row: Mapping[str, Any]) -> None:
    """Write one JSON line to stdout, at once."""
    sys.stdout.write(json.dumps(finite(row), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def finite(value: Any) -> Any:
    """Plain data for JSON, which has no infinity and no NaN: these become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def say(text: str) -> None:
    """Print a line for people."""
    console.print(text, markup=False)


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
) -> None:
    """Print a table for people; columns of numbers are aligned to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column, cells in zip_longest(columns, zip(*rows, strict=True), fillvalue=()):
        numbers = bool(cells) and all(str(cell)[:1].isdigit() for cell in cells)
        justify: Literal["left", "right"] = "right" if numbers else "left"
        table.add_column(str(column), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console.print(table)


@contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """A progress bar; yields ``update(description, done, total)``."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)

        def update(description: str, done: int, total: int | None) -> None:
            bar.update(task, description=description, completed=done, total=total)

        yield update
