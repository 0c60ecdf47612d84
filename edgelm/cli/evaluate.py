"""The command eval."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from edgelm.cli.console import emit, progress_bar, say, show_table
from edgelm.cli.reporting import command_line, report_stem, write_report


@click.command("eval")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    help="Labelled data: JSON lines, CoNLL, a text, a folder in BEIR's layout, or built-in.",
)
@click.option(
    "--split",
    default="test",
    show_default=True,
    help="With a folder in BEIR's layout: which qrels/SPLIT.tsv to use.",
)
@click.option(
    "--index",
    type=click.Path(),
    help="Search this index, with queries that MODEL encodes, instead of encoding the documents.",
)
@click.option(
    "--against",
    metavar="MODEL",
    help="A bundle, model or server to compare with, on the same texts.",
)
@click.option(
    "--max-drop",
    metavar="PERCENT",
    help="With --against: exit 3 if the measure is worse by more than this, for example 1%.",
)
@click.option(
    "--resamples",
    type=click.IntRange(100),
    default=1000,
    show_default=True,
    help="Bootstrap draws, for the intervals.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--changes",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="With --against: how many of the texts whose answers changed most to list.",
)
@click.option(
    "--context",
    type=click.IntRange(2),
    help="Language models: longest window in tokens.  [default: what the model takes, at most 1024]",
)
@click.option(
    "--stride",
    type=click.IntRange(1),
    help="Language models: tokens by which a window moves.  [default: half of the context]",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads of a model.  [default: all cores]",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Answer on a Ray cluster, 256 inputs a task: host:port, auto, or local.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Write REPORT.html and REPORT.json.",
)
@click.option("--force", is_flag=True, help="Replace a report that is there already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON lines on stdout."
)
def evaluate(
    model: str,
    data: str,
    split: str,
    index: str | None,
    against: str | None,
    max_drop: str | None,
    resamples: int,
    seed: int,
    changes: int,
    context: int | None,
    stride: int | None,
    threads: int | None,
    address: str | None,
    report: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure the quality of MODEL on labelled data.

    MODEL is a bundle, a checkpoint, a built-in name, a folder, a hub id, or the address of a
    server, such as http://127.0.0.1:8080 or http://127.0.0.1:8080/v1.

    \b
    edgelm eval bundle --data pairs.jsonl --against minilm --max-drop 1%
    """
    from contextlib import ExitStack

    from edgelm.evaluate import accuracy
    from edgelm.evaluate.examine import examine
    from edgelm.evaluate.subjects import Settings, open_subject, with_index

    if address is not None and index is not None:
        raise click.UsageError("An index is searched on one machine: leave --ray away.")
    if max_drop is not None and against is None:
        raise click.UsageError(
            "--max-drop compares with another model: name it with --against."
        )
    allowed = _percent(max_drop) if max_drop is not None else None
    settings = Settings(threads, context, stride)
    stem = report_stem(report, force=force) if report is not None else None
    with progress_bar("opening") as update, ExitStack() as stack:
        opener = open_subject
        if address is not None:
            from edgelm.evaluate.cluster import spread
            from edgelm.runtimes.index.cluster import join

            opener = partial(spread, stack.enter_context(join(address)))
        subject = (
            opener(model, settings, update)
            if index is None
            else with_index(model, index, settings, update)
        )
        sets = accuracy.find_datasets(data, subject, split)
        other = None
        if against is not None:
            other = opener(against, settings, update)
        result = examine(
            subject, sets, other, resamples=resamples, seed=seed, changes=changes
        )
    result["command"] = command_line()
    if stem is not None:
        from edgelm.reports.summary import summary_page

        write_report(stem, result, summary_page([result]), force=force)
    if as_json:
        for found in result["datasets"]:
            emit(_line(result, found))
    _show(result, against)
    if stem is not None:
        say(f"Report: {stem}.html, {stem}.json")
    if allowed is not None:
        for found in result["datasets"]:
            first = found["comparisons"][0]
            accuracy.check_drop(
                first["against"],
                first["value"],
                allowed,
                f"{first['measure']} on {found['name']}",
            )


def _line(result: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's result, with all that it is a number of."""
    rest = {k: v for k, v in found.items() if k not in ("name", "measures", "against")}
    return {
        "model": result["model"]["name"],
        "data": found["name"],
        **found["measures"],
        "against": found.get("against"),
        **rest,
        "identity": result["model"],
        "identity_against": result["against"],
        **{key: result[key] for key in ("seed", "resamples", "machine")},
    }


def _show(result: Mapping[str, Any], against: str | None) -> None:
    rows = []
    for found in result["datasets"]:
        for name, value in found["measures"].items():
            low, high = found["intervals"][name]
            other = [f"{found['against'][name]:.2f}"] if against else []
            where = f"{found['name']} ({found['rows']} rows)"
            rows.append((where, name, f"{value:.2f}", f"{low:.2f} to {high:.2f}", *other))  # fmt: skip
    columns = ["data", "measure", result["model"]["name"], "95 % interval"]
    show_table("Quality", [*columns, *([against] if against else [])], rows)
    for found in result["datasets"]:
        for sentence in (*found["notes"], *filter(None, [found.get("statement")])):
            say(sentence)


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if not match:
        raise click.UsageError(f"--max-drop takes a percentage such as 1%. Got {text}.")
    return float(match[1])


COMMANDS = {"eval": evaluate}
