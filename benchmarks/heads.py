"""A head fitted by `edgelm fit-head` on held-out data, against the commonest class or the mean.

    edgelm fit-head bundle --data train.jsonl -o scorer
    python benchmarks/heads.py scorer test.jsonl

The file has the fields that the head was fitted to; `--by FIELD` also gives each of its values. A file that is not
split yet is split by a field, such as a topic, so that the head is judged on topics that it has not seen:

    edgelm export minilm --target cpu -o bundle
    python benchmarks/heads.py bundle pairs.jsonl --compare --hold-out topic

This fits a head to BUNDLE, an encoder. Of the field's values in alphabetical order every fourth is held out, from the
first on; what follows a value's first underscore (`tv-is-better-than-books_tv`: which side an argument takes) is left
away before, so that both sides are held out or neither.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

import edgelm
from edgelm.heads import fit

Rows = list[dict[str, Any]]


def measure(model: edgelm.Scorer, rows: Rows, compare: bool) -> dict[str, float]:
    """Measures of a head on rows, and those of a constant."""
    pairs = "text1" in rows[0]
    inputs = [(r["text1"], r["text2"]) if pairs else r["text"] for r in rows]
    if compare:
        due = np.sign([row["score"] for row in rows])
        right = np.sign(model.compare(inputs)) == due
        constant = max(np.mean(due > 0), np.mean(due < 0))
        return {"accuracy": right.mean(), "commonest": constant}
    if isinstance(rows[0].get("label"), (str, int)):
        found = [best[0].label for best in model.classify(inputs, top_k=1)]
        due = [str(row["label"]) for row in rows]
        _, counts = np.unique(due, return_counts=True)
        right = np.equal(found, due)
        return {"accuracy": right.mean(), "commonest": counts.max() / len(due)}
    gold = np.array([row.get("score", row.get("label")) for row in rows])
    scores = model.score(inputs)
    return {
        "spearman": float(spearmanr(scores, gold).statistic),
        "root mean square error": float(np.sqrt(np.mean((scores - gold) ** 2))),
        "error of the mean": float(gold.std()),
    }


def hold_out(rows: Rows, field: str) -> tuple[Rows, Rows]:
    """Rows to fit and rows to judge, their field without what follows the first underscore."""
    rows = [{**row, field: str(row[field]).partition("_")[0]} for row in rows]
    held = set(sorted({row[field] for row in rows})[::4])
    return (
        [row for row in rows if row[field] not in held],
        [row for row in rows if row[field] in held],
    )


def fit_to_rest(bundle: Path, rest: Rows, field: str, compare: bool) -> edgelm.Scorer:
    """A head fitted to rows; the penalty is chosen with folds that split no value of the field."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head"
        report = fit(bundle, rest, path, compare=compare, group=field)
        model = edgelm.load(path)
    values = {row[field] for row in rest}
    click.echo(
        f"fitted to {len(rest)} rows of {len(values)} values of {field}: {report.kind}, penalty {report.penalty:g}"
    )
    assert isinstance(model, edgelm.Scorer)
    return model


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Pairs are comparisons.")
@click.option("--by", help="Field to give the measures of each value of.")
@click.option("--hold-out", "field", help="Field to split by; fits to the rest.")
def main(
    bundle: Path, data: Path, compare: bool, by: str | None, field: str | None
) -> None:
    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    if field is None:
        model = edgelm.load(bundle)
        assert isinstance(model, edgelm.Scorer)
    else:
        rest, rows = hold_out(rows, field)
        model = fit_to_rest(bundle, rest, field, compare)
        by = by or field
    parts: dict[str, Rows] = defaultdict(list)
    for row in rows:
        parts["all"].append(row)
        if by:
            parts[str(row[by])].append(row)
    for name, part in parts.items():
        found = measure(model, part, compare)
        text = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
        click.echo(f"{name} ({len(part)} rows): {text}")


if __name__ == "__main__":
    main()
