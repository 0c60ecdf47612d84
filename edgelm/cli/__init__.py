"""The command line: thin commands that parse, call the library once, and print.

What machines read goes to stdout as JSON lines; what people read goes to stderr.
Exit codes: 0 ok, 1 refused (one sentence says why), 2 usage, 3 a gate failed, 130 interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import click

from edgelm.errors import EdgelmError

# Command -> module that defines it. Loaded when called, so that `edgelm run` on a
# device never waits for what `edgelm compress` needs.
COMMANDS = {
    "bench": "bench",
    "build": "build",
    "codes": "codes",
    "compress": "compress",
    "demo": "demo",
    "doctor": "look",
    "eval": "evaluate",
    "export": "export",
    "fit-head": "fit",
    "index": "index",
    "info": "look",
    "keygen": "sign",
    "lint": "look",
    "ner-index": "ner_index",
    "report": "report",
    "run": "run",
    "serve": "serve",
    "sign": "sign",
    "targets": "look",
    "tune": "tune",
    "verify": "verify",
    "verify-signature": "sign",
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgelm.cli.{COMMANDS[cmd_name]}")
        command: click.Command = module.COMMANDS[cmd_name]
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgelmError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as stopped:
            click.echo(" ".join(["Interrupted.", *stopped.args]), err=True)
            ctx.exit(130)
        except BrokenPipeError:
            raise  # the reader of a pipe has had enough; click ends quietly
        except OSError as error:  # a full disk, a folder that may not be read
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"Error: {where}{error.strerror or error}.", err=True)
            _drop_unwritten()
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgelm", prog_name="edgelm")
def cli() -> None:
    """Make a text model small and fast without training it, and run it on the device.

    \b
    edgelm compress minilm -o small --sparsity 2:4
    edgelm export small --target cpu -o bundle
    edgelm verify bundle
    edgelm run bundle "A man is playing a flute."
    edgelm bench bundle --against minilm
    """


def main() -> None:
    """Entry point of the command `edgelm`."""
    # A stream that was closed (`>&-`) leaves a number to the next file that is opened.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # JSON is UTF-8, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    cli(prog_name="edgelm")


def _drop_unwritten() -> None:
    """Have nothing left to write when Python ends, if stdout is what cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
