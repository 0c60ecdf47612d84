"""The command report."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.cli.console import OUTPUT, say


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=OUTPUT, required=True, help="The page to write.")
@click.option("--force", is_flag=True, help="Replace a page that is there already.")
def report(results: tuple[Path, ...], output: Path, force: bool) -> None:
    """Make one page of RESULTS: JSON of edgelm eval and edgelm bench, edgelm.json of checkpoints.

    \b
    edgelm report eval.json bench.json checkpoint/edgelm.json -o report.html
    """
    from edgelm.atomic import new_file
    from edgelm.evaluate.recorded import read_result
    from edgelm.reports.summary import kind_of, summary_page

    read = []
    for path in results:
        found = read_result(path)
        kind_of(found, str(path))
        read.append(found)
    with new_file(output, force=force) as path:
        path.write_text(summary_page(read), encoding="utf-8")
    say(f"Report: {output}")


COMMANDS = {"report": report}
