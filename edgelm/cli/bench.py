"""The command bench."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import click

from edgelm.cli.console import emit, finite, progress_bar, say, show_table

TEXTS = click.Path(path_type=Path)


@click.command()
@click.argument("bundle")
@click.option(
    "--against",
    multiple=True,
    metavar="MODEL",
    help="A bundle, or a model in PyTorch, to compare with; repeatable.",
)
@click.option(
    "--texts",
    type=TEXTS,
    help="Texts to run: .txt or .jsonl; else the built-in sample.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Turns of each contender.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads of each contender; else all cores.",
)
@click.option(
    "--max-p95-ms",
    type=float,
    help="Exit 3 if the bundle's 95th percentile is above this.",
)
@click.option(
    "--profile",
    "profiled",
    is_flag=True,
    help="Show where BUNDLE's time goes, and this machine's matrix products alone.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    help="Write REPORT.html and REPORT.json; else edgelm-bench-TIME.",
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
    from edgelm.atomic import new_file
    from edgelm.calibration import read_texts
    from edgelm.errors import GateError
    from edgelm.evaluate.latency import Workload, benchmark
    from edgelm.evaluate.profile import check_profiled, profile
    from edgelm.reports.latency import COLUMNS, contender_rows, latency_page, verdicts
    from edgelm.reports.profile import GROUPS, group_rows, sentences

    if profiled:
        check_profiled(bundle)
    stem = report or Path(f"edgelm-bench-{datetime.now():%Y%m%d-%H%M%S}")
    stem = stem.with_suffix("") if stem.suffix in (".html", ".json") else stem
    chosen = (
        samples.calibration()[::3]
        if texts is None
        else [t for t in read_texts(texts) if t.strip()]
    )
    workload = Workload(tuple(chosen), rounds=rounds, threads=threads)
    with progress_bar("opening") as update:
        result = benchmark([bundle, *against], workload, update)
        if profiled:
            update(f"profile of {bundle}", 0, None)
            result["profile"] = profile(bundle, chosen, threads=threads)
    with new_file(stem.with_suffix(".json"), force=force) as path:
        path.write_text(json.dumps(finite(result), indent=2) + "\n", encoding="utf-8")
    with new_file(stem.with_suffix(".html"), force=force) as path:
        path.write_text(latency_page(result), encoding="utf-8")
    if as_json:
        emit(result)
    show_table("Side by side", [title for _, title in COLUMNS], contender_rows(result))
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


COMMANDS = {"bench": bench}
