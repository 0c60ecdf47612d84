"""Reports of the suites: NAME.json and NAME.html, together or not at all."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.cli.console import finite


def report_stem(report: Path, *, force: bool) -> Path:
    """The report's name without its ending; refused before the work if it is taken.

    Raises:
        OutputExistsError: One of its files is there already, and ``force`` is not set.
    """
    from edgelm.atomic import check_free

    stem = report.with_suffix("") if report.suffix in (".html", ".json") else report
    for ending in (".json", ".html"):
        check_free(with_ending(stem, ending), marker=None, force=force)
    return stem


def with_ending(stem: Path, ending: str) -> Path:
    """A file of the report; a name may hold dots of its own."""
    return stem.with_name(stem.name + ending)


def write_report(
    stem: Path, result: Mapping[str, Any], page: str, *, force: bool
) -> None:
    """Write both files."""
    from edgelm.atomic import new_file

    text = json.dumps(finite(result), indent=2, ensure_ascii=False) + "\n"
    for ending, content in ((".json", text), (".html", page)):
        with new_file(with_ending(stem, ending), force=force) as path:
            path.write_text(content, encoding="utf-8")


def command_line() -> str:
    """The command as it was typed, for a reader who wants the numbers again."""
    return shlex.join(["edgelm", *sys.argv[1:]])
