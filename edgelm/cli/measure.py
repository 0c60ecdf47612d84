"""Commands that measure: bench, eval."""

from __future__ import annotations

import json
import re
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


@click.command("eval")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    help="Labelled data: a JSON lines file, a folder in BEIR's layout, or built-in.",
)
@click.option("--against", metavar="MODEL", help="A bundle or model to compare with.")
@click.option(
    "--max-drop",
    metavar="PERCENT",
    help="With --against: exit 3 if the measure is lower by more than this, for example 1%.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON lines on stdout."
)
def evaluate(
    model: str, data: str, against: str | None, max_drop: str | None, as_json: bool
) -> None:
    """Measure the quality of MODEL (a bundle, checkpoint or model) on labelled data.

    \b
    edgelm eval bundle --data pairs.jsonl --against minilm --max-drop 1%
    """
    from edgelm.evaluate import accuracy
    from edgelm.evaluate.contender import open_any

    if max_drop is not None and against is None:
        raise click.UsageError(
            "--max-drop compares with another model: name it with --against."
        )
    allowed = _percent(max_drop) if max_drop is not None else None
    opened = open_any(model)
    sets = accuracy.find_datasets(data, opened)
    other = open_any(against) if against is not None else None
    rows: list[tuple[str, ...]] = []
    falls: list[tuple[float, float, str]] = []
    for dataset in sets:
        measured = accuracy.evaluate(opened, dataset)
        reference = accuracy.evaluate(other, dataset) if other is not None else {}
        if as_json:
            emit(
                {
                    "model": model,
                    "data": dataset.name,
                    "rows": len(dataset.rows),
                    **measured,
                    "against": reference or None,
                }
            )
        for name, value in measured.items():
            before = [f"{reference[name]:.2f}"] if reference else []
            rows.append(
                (
                    f"{dataset.name} ({len(dataset.rows)} rows)",
                    name,
                    f"{value:.2f}",
                    *before,
                )
            )
        if reference:
            main = next(iter(measured))
            falls.append((reference[main], measured[main], f"{main} on {dataset.name}"))
    columns = ["data", "measure", model, *([against] if against else [])]
    show_table("Quality", columns, rows)
    if allowed is not None:
        for before_value, after, name in falls:
            accuracy.check_drop(before_value, after, allowed, name)


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", text)
    if not match:
        raise click.UsageError(f"--max-drop takes a percentage such as 1%. Got {text}.")
    return float(match[1])


COMMANDS = {"bench": bench, "eval": evaluate}
