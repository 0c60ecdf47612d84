"""What `edgelm run` reads: arguments, lines of a file, lines of stdin as they come."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import click

from edgelm.errors import InputError
from edgelm.lines import decode
from edgelm.lines import parse_json as parse_row

# Texts that are read before the first is answered.
_CHUNK = 256


def arguments(texts: tuple[str, ...], pairs: bool) -> Iterator[list[Any]]:
    """Texts, or pairs of neighbours, as one chunk."""
    if not pairs:
        yield list(texts)
    elif len(texts) % 2:
        raise click.UsageError(
            "This bundle scores pairs: give an even number of texts."
        )
    else:
        yield list(zip(texts[::2], texts[1::2], strict=True))


def lines(source: Path, form: str, pairs: bool) -> Iterator[list[Any]]:
    """Chunks of parsed lines; what came before a bad line is not lost."""
    name = "stdin" if str(source) == "-" else str(source)
    as_json = form == "jsonl" or (
        form == "auto" and source.suffix in (".jsonl", ".ndjson")
    )
    number = 0
    for chunk in _chunks(source):
        rows: list[Any] = []
        try:
            for line in chunk:
                number += 1
                where = f"{name}, line {number}"
                text = decode(line, where).rstrip("\r\n")
                parse = parse_json if as_json else parse_text
                rows.append(parse(text, pairs, where))
        except InputError:
            if rows:
                yield rows
            raise
        yield rows


def _chunks(source: Path) -> Iterator[Sequence[bytes]]:
    """Lines in chunks; from stdin as many as are there, without waiting for more."""
    if str(source) == "-":
        yield from _available(sys.stdin.buffer)
        return
    try:
        with source.open("rb") as stream:
            while chunk := list(islice(stream, _CHUNK)):
                yield chunk
    except OSError as error:
        raise InputError(f"Cannot read {source}: {error.strerror}.") from error


def _available(stream: IO[bytes]) -> Iterator[Sequence[bytes]]:
    """A thread reads; whoever asks gets what has been read, at most ``_CHUNK`` lines."""
    lines: queue.Queue[bytes | None] = queue.Queue(maxsize=4 * _CHUNK)
    # Python dies when it ends while a thread waits in sys.stdin; in a copy it may wait.
    with suppress(OSError):
        stream = open(os.dup(stream.fileno()), "rb")  # noqa: SIM115

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        chunk = [line]
        while len(chunk) < _CHUNK and not lines.empty():
            following = lines.get()
            if following is None:
                yield chunk
                return
            chunk.append(following)
        yield chunk


def parse_text(text: str, pairs: bool, where: str) -> Any:
    """A line of plain text as a text or a pair."""
    if not pairs:
        return text
    parts = text.split("\t")
    if len(parts) != 2:
        raise InputError(
            f"{where}: this bundle scores pairs; put one tab between the two texts."
        )
    return parts[0], parts[1]


def parse_json(text: str, pairs: bool, where: str) -> Any:
    """A JSON line as a text or a pair."""
    fields = ("text1", "text2") if pairs else ("text",)
    row = parse_row(text, where)
    values = [row.get(field) if isinstance(row, dict) else None for field in fields]
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: there is no string field {' and '.join(fields)}.")
    return tuple(values) if pairs else values[0]
