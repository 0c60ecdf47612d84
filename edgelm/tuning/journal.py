"""Every result on the disk as soon as it is there: one JSON line each, fsynced.

A run is replayed, not restored: what is tried next follows from the seed and the results so far, so the same
command asks for the same evaluations and finds those that are in the journal done. A line that a kill cut short
is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.errors import InputError


class Journal:
    """What is known of a run, by key; in memory and, given a path, on the disk."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        """Open a journal, or begin one.

        Args:
            path: Its file; None to keep nothing.
            settings: All that the results depend on.

        Raises:
            InputError: It is of a run with other settings, is damaged, or cannot be written.
        """
        self._path = path
        self._known: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)
        before = self.get({"what": "settings"})
        now = json.loads(json.dumps(settings))
        if before is None:
            self.put({"what": "settings"}, now)
        elif before != now:
            changed = ", ".join(k for k in now if now[k] != before.get(k)) or "edgelm"
            raise InputError(
                f"{path} is of a run with other settings ({changed}). "
                "Give these again, choose another output, or begin anew with --force."
            )

    def __len__(self) -> int:
        """How many results there are."""
        return len(self._known)

    def get(self, key: Mapping[str, Any]) -> Any:
        """A result; None where there is none."""
        return self._known.get(_text(key))

    def put(self, key: Mapping[str, Any], value: Any) -> None:
        """Keep a result. It is on the disk when this returns.

        Raises:
            InputError: It cannot be written.
        """
        self._known[_text(key)] = value
        if self._path is None:
            return
        line = json.dumps({"key": key, "value": value}) + "\n"
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise InputError(
                f"Cannot write to {self._path}: {error.strerror}. "
                "What is there is kept; the same command goes on."
            ) from error

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with path.open("r+b") as stream:
                stream.truncate(len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                self._known[_text(entry["key"])] = entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path}, line {number}: this is no line of a journal. "
                    "Remove it and the lines behind it, or begin anew with --force."
                ) from error


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
