"""The command bench."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import click

from edgelm.cli.console import Real, emit, progress_bar, say, show_table
from edgelm.cli.reporting import command_line, report_stem, write_report

TEXTS = click.Path(path_type=Path)


@click.command()
@click.argument("bundle")
@click.option(
    "--against",
    multiple=True,
    metavar="MODEL",
    help="A bundle, or a model that runs in PyTorch, to compare with; repeatable.",
)
@click.option(
    "--texts",
    type=TEXTS,
    help="Texts to run: .txt or .jsonl.  [default: the built-in sample]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="Turns of each contender; six is the smallest number that gives a 95 % interval.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads of each contender.  [default: all cores]",
)
@click.option(
    "--max-p95-ms",
    type=Real(min=0, min_open=True),
    help="Exit 3 if the bundle's 95th percentile is above this.",
)
@click.option(
    "--min-speedup",
    metavar="FACTOR",
    help="With --against: exit 3 if BUNDLE does not answer one text this many times as fast, for example 1.5x.",
)
@click.option(
    "--concurrency",
    default="1,2,4,8",
    show_default=True,
    help="Numbers of threads that call the model at once, for the throughput curve; none: no curve.",
)
@click.option(
    "--lengths", help="Also measure inputs of these lengths, in tokens: 16,64,256."
)
@click.option(
    "--batch-sizes",
    default="1",
    show_default=True,
    help="With --lengths: inputs per call: 1,8,32.",
)
@click.option(
    "--compare-with",
    "recorded",
    type=click.Path(path_type=Path),
    help="JSON of an earlier benchmark to compare with; refused unless it was this machine in the same state.",
)
@click.option(
    "--profile",
    "profiled",
    is_flag=True,
    help="Show where BUNDLE's time goes, and how fast this machine runs the same matrix products alone.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Write REPORT.html and REPORT.json.  [default: edgelm-bench-TIME]",
)
@click.option("--force", is_flag=True, help="Replace a report that is there already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
def bench(
    bundle: str,
    against: tuple[str, ...],
    texts: Path | None,
    rounds: int,
    threads: int | None,
    max_p95_ms: float | None,
    min_speedup: str | None,
    concurrency: str,
    lengths: str | None,
    batch_sizes: str,
    recorded: Path | None,
    profiled: bool,
    report: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure latency, throughput, memory and size of BUNDLE, side by side.

    \b
    edgelm bench bundle --against minilm
    """
    from edgelm import samples
    from edgelm.calibration import read_texts
    from edgelm.errors import GateError
    from edgelm.evaluate.latency import Workload, benchmark
    from edgelm.evaluate.measurement import check_speedup
    from edgelm.evaluate.profile import check_profiled, profile
    from edgelm.evaluate.recorded import compare_recorded, read_recorded
    from edgelm.reports.latency import (
        contender_columns,
        contender_rows,
        extra_tables,
        verdicts,
    )
    from edgelm.reports.profile import GROUPS, group_rows, sentences
    from edgelm.reports.summary import summary_page

    if min_speedup is not None and not against:
        raise click.UsageError(
            "--min-speedup compares with another model: name it with --against."
        )
    demanded = _factor(min_speedup) if min_speedup is not None else None
    if profiled:
        check_profiled(bundle)
    earlier = read_recorded(recorded) if recorded is not None else None
    stem = report_stem(
        report or Path(f"edgelm-bench-{datetime.now():%Y%m%d-%H%M%S}"), force=force
    )
    chosen = (
        samples.calibration()[::3]
        if texts is None
        else [t for t in read_texts(texts) if t.strip()]
    )
    workload = Workload(
        tuple(chosen),
        rounds=rounds,
        threads=threads,
        concurrency=() if concurrency == "none" else _numbers(concurrency),
        lengths=() if lengths is None else _numbers(lengths),
        batch_sizes=_numbers(batch_sizes),
    )
    with progress_bar("opening") as update:
        result = benchmark([bundle, *against], workload, update)
        if profiled:
            update(f"profile of {bundle}", 0, None)
            result["profile"] = profile(bundle, chosen, threads=threads)
    result["command"] = command_line()
    if earlier is not None:
        result["recorded"] = compare_recorded(result, earlier)
    write_report(stem, result, summary_page([result]), force=force)
    if as_json:
        emit(result)
    show_table(
        "Side by side",
        [t for _, t in contender_columns(result)],
        contender_rows(result),
    )
    for title, columns, rows in extra_tables(result):
        show_table(title, columns, rows)
    for sentence in verdicts(result):
        say(sentence)
    if profiled:
        show_table("Where the time goes", GROUPS, group_rows(result["profile"]))
        for sentence in sentences(result["profile"]):
            say(sentence)
    say(f"Report: {stem}.html, {stem}.json")
    p95 = result["contenders"][0]["p95_ms"]
    if max_p95_ms is not None and p95 > max_p95_ms:
        raise GateError(
            f"The 95th percentile of {bundle} is {p95:.2f} ms; at most {max_p95_ms:g} ms are allowed."
        )
    if demanded is not None:
        for ratio in result["ratios"]:
            check_speedup(bundle, ratio, demanded)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.UsageError(f"Whole numbers with commas are due. Got {text}.")
    return tuple(int(part) for part in parts)


def _factor(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*x?\s*", text)
    if not match or not float(match[1]):
        raise click.UsageError(
            f"--min-speedup takes a factor such as 1.5x. Got {text}."
        )
    return float(match[1])


COMMANDS = {"bench": bench}
