"""A head fitted by `edgelm fit-head` on held-out data, against the commonest class or the mean.

    edgelm fit-head bundle --data train.jsonl --compare --group topic -o scorer
    python benchmarks/heads.py scorer test.jsonl --compare

The file has the fields that the head was fitted to; `--by FIELD` also gives each of its values.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

import edgelm


def measure(
    model: edgelm.Scorer, rows: list[dict[str, Any]], compare: bool
) -> dict[str, float]:
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


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--compare", is_flag=True, help="Pairs are comparisons.")
@click.option("--by", help="Field to give the measures of each value of.")
def main(bundle: Path, data: Path, compare: bool, by: str | None) -> None:
    """Print measures on held-out data."""
    model = edgelm.load(bundle)
    assert isinstance(model, edgelm.Scorer)
    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
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
