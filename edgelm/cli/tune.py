"""The command tune."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from edgelm.cli.console import (
    OUTPUT,
    TASKS,
    Real,
    emit,
    progress_bar,
    say,
    show_table,
)

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", default="minilm")
@click.option(
    "--target", required=True, help="Device to tune for; `edgelm targets` lists them."
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    required=True,
    help="Folder to make: bundle, recipe, report.",
)
@click.option(
    "--max-drop",
    default="1%",
    show_default=True,
    metavar="PERCENT",
    help="How far the quality may fall below the dense model's, in percent of it.",
)
@click.option(
    "--max-p95-ms",
    type=Real(min=0, min_open=True),
    help="Limit for the 95th percentile of one text's latency; measured, so only for a TARGET that is this machine.",
)
@click.option(
    "--max-size-mb",
    type=Real(min=0, min_open=True),
    help="Limit for the size of the bundle, in MB (10^6 bytes).",
)
@click.option(
    "--data",
    type=FILE,
    help="Labelled data to choose by, JSON lines as for `edgelm eval`; never a test split.  [default: no labels]",
)
@click.option(
    "--texts",
    default="built-in",
    show_default=True,
    metavar="FILE",
    help="Texts to calibrate on and, without --data, to judge by: .txt or .jsonl, also .gz and .zst.",
)
@click.option(
    "--max-texts",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Calibrate on at most this many texts; a partial evaluation uses an eighth of them.",
)
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=48,
    show_default=True,
    help="Configurations to consider.",
)
@click.option(
    "--minutes",
    type=Real(min=0, min_open=True),
    help="Stop after about this many minutes.  [default: when all trials are done]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of every random choice.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Evaluations that run at once on this machine, one core each.  [default: all cores]",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Evaluate on a Ray cluster: host:port, auto, or local. Model, data and output must be on shared storage.",
)
@click.option(
    "--ray-cpus",
    type=Real(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="CPUs that one evaluation reserves on the cluster; 0.5 puts two on a CPU.",
)
@click.option("--task", type=TASKS, help="What the model is for; else inferred.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace a result, or an unfinished run with other settings.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
def tune(
    model: str,
    target: str,
    output: Path,
    max_drop: str,
    max_p95_ms: float | None,
    max_size_mb: float | None,
    data: Path | None,
    texts: str,
    max_texts: int,
    trials: int,
    minutes: float | None,
    seed: int,
    workers: int | None,
    ray: str | None,
    ray_cpus: float,
    task: Any,
    force: bool,
    as_json: bool,
) -> None:
    """Find the fastest bundle of MODEL for a device that keeps to your limits.

    Killed at any time, the same command goes on where it stopped.

    \b
    edgelm tune minilm --target cpu --max-drop 1% --minutes 20 -o tuned
    """
    from edgelm.errors import require
    from edgelm.reports.tuning import FINALISTS, finalist_rows, sentences
    from edgelm.runtimes.engine import cores
    from edgelm.tuning.running import cluster, processes
    from edgelm.tuning.search import Limits
    from edgelm.tuning.tune import Request
    from edgelm.tuning.tune import tune as search

    for module in ("optuna", "sklearn"):
        require(module, "tune")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", max_drop)
    if not match:
        raise click.UsageError(
            f"--max-drop takes a percentage such as 1%. Got {max_drop}."
        )
    request = Request(
        model,
        target,
        Limits(float(match[1]), max_p95_ms, max_size_mb),
        task=task,
        data=None if data is None else str(data),
        texts=texts,
        max_texts=max_texts,
        trials=trials,
        minutes=minutes,
        seed=seed,
    )
    count = workers or cores()
    with progress_bar(f"tuning {model}") as update:
        try:
            result = search(
                request,
                output,
                lambda: processes(count) if ray is None else cluster(ray, ray_cpus),
                force=force,
                progress=update,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "The same command goes on where this one stopped."
            ) from None
    if as_json:
        emit(result)
    show_table("Finalists", FINALISTS, finalist_rows(result))
    for sentence in sentences(result):
        say(sentence)
    say(f"Bundle: {output / 'bundle'}; report: {output / 'report.html'}")


COMMANDS = {"tune": tune}
