"""Command that gives a bundle's encoder a head: fit-head."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgelm.cli.console import OUTPUT, emit, say, show_table
from edgelm.cli.run import PROVIDER, THREADS


@click.command("fit-head")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON lines: text, or text1 and text2, with score, label or labels; tokens and tags, or text and entities.",
)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The bundle to make.")
@click.option(
    "--name",
    help="Name of the new head, which is added to those that BUNDLE has; one pass answers for all of them.",
)
@click.option(
    "--kind",
    type=click.Choice(["auto", "ridge", "logistic", "linear"]),
    default="auto",
    show_default=True,
    help="auto: ridge for scores, logistic for labels and comparisons.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Read pairs as comparisons: a score above 0 says that text1 is better. The head scores single texts.",
)
@click.option(
    "--group", help="Field whose values are never split between folds, such as topic."
)
@click.option(
    "--folds",
    type=click.IntRange(2),
    default=5,
    show_default=True,
    help="Folds of the cross-validation.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the folds."
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
@PROVIDER
@THREADS
def fit_head(
    bundle: Path,
    data: Path,
    output: Path,
    name: str | None,
    kind: str,
    compare: bool,
    group: str | None,
    folds: int,
    seed: int,
    force: bool,
    as_json: bool,
    provider: str | None,
    threads: int | None,
) -> None:
    """Fit a head to what the encoder of BUNDLE gives: a bundle that scores, classifies or finds entities.

    Nothing but numpy and scipy is needed, so a device can do it. The penalty is chosen by cross-validation.

    \b
    edgelm fit-head bundle --data labelled.jsonl -o scorer
    edgelm fit-head ner-bundle --data definitions.jsonl --name definition -o both
    """
    from edgelm.atomic import check_free
    from edgelm.bundle import MANIFEST
    from edgelm.heads import fit_heads
    from edgelm.lines import open_binary, read_json_lines

    check_free(output, marker=MANIFEST, force=force)
    with open_binary(data) as stream:
        examples = list(read_json_lines(stream, str(data)))
    reports = fit_heads(
        bundle,
        examples,
        output,
        name=name,
        kind=kind,
        compare=compare,
        group=group,
        folds=folds,
        seed=seed,
        force=force,
        provider=provider,
        threads=threads,
    )
    if as_json:
        for key, report in reports.items():
            emit({"bundle": str(output), "head": key, **asdict(report)})
    for key, report in reports.items():
        rows = [
            (
                f"{penalty:g}",
                f"{loss:.5f}",
                "chosen" if penalty == report.penalty else "",
            )
            for penalty, loss in report.losses.items()
        ]
        show_table(f"{key}, {folds} folds", ["penalty", "held-out loss", ""], rows)
        for measure, value in report.measures.items():
            say(
                f"held out, {measure}: {value:.4f} (without a model: {report.baseline[measure]:.4f})"
            )
        say(
            f"{output}: {key}, {report.kind} head on {report.rows} rows of {report.features}"
        )


COMMANDS = {"fit-head": fit_head}
