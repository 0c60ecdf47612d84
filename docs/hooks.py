"""What mkdocs and its plug-ins do not do by themselves.

A link from a page to a file outside of docs/ is right where the page is read in the repository; on the site it leads to
a copy of the file. The examples in a command's help, which click leaves as they are, stay lines of code.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from edgelm.cli import cli

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
_EXAMPLES = re.compile(r"\x08\n((?:.+\n)*.+)\n?")


def on_startup(**_: Any) -> None:
    """Make code blocks of the examples in the commands' help, before the page of commands is made of it."""
    _fence_examples(cli)


def _fence_examples(command: click.Command) -> None:
    if command.help:
        text = inspect.cleandoc(command.help)
        command.help = _EXAMPLES.sub(r"```sh\n\1\n```\n", text)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            _fence_examples(found)


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of docs/ that a page links to; one that is not there stays a broken link."""
    for page in list(files.documentation_pages()):
        for path, _ in _LINK.findall(page.content_string):
            copy = _copy(path)
            if (ROOT / path).is_file() and files.get_file_from_path(copy) is None:
                content = (ROOT / path).read_bytes()
                files.append(File.generated(config, copy, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links lead to the copies."""
    return _LINK.sub(lambda found: f"]({_copy(found.group(1))})", markdown)


def _copy(path: str) -> str:
    # A name that neither mkdocs nor a browser takes for more than text.
    return f"repository/{path}.txt"
