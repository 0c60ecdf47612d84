"""How quality without labels goes along with quality by labels: what `edgelm tune` may rely on.

    python benchmarks/label_free.py --data stsb/dev.jsonl --work label-free -o label-free.json

`minilm` with neurons or heads removed, float32: the tuner's own label-free measure on the built-in sample, the cosine
to the dense vectors, and the labelled measure. Use a split on which nothing is reported otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgelm import samples
from edgelm.evaluate.accuracy import evaluate, load_dataset
from edgelm.evaluate.reference import open_reference
from edgelm.metrics import cosine
from edgelm.pipeline import compress_model
from edgelm.recipe import parse_recipe
from edgelm.runtimes import Embedder
from edgelm.tuning.quality import halves, matching
from edgelm.tuning.space import Configuration

CONFIGURATIONS = (
    Configuration(),
    Configuration(neurons=0.75),
    Configuration(neurons=0.5),
    Configuration(neurons=0.25),
    Configuration(neurons=0.125),
    Configuration(heads=0.75),
    Configuration(heads=0.75, neurons=0.5),
    Configuration(heads=0.5),
)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--texts", default=192, show_default=True, help="To calibrate on.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(data: Path, work: Path, texts: int, output: Path) -> None:
    """Measure; print a table, write JSON."""
    rows = [h for h in map(halves, samples.calibration()[::4]) if h]
    labelled = load_dataset(data)
    found: list[dict[str, Any]] = []
    dense: Any = None
    click.echo("| | cosine to dense | matching | drop % | labelled | drop % |")
    click.echo("|---|---|---|---|---|---|")
    for number, c in enumerate(CONFIGURATIONS):
        reference, folder = "minilm", work / str(number)
        if c.steps:
            calibration = {"max_texts": texts, "max_tokens": 128}
            recipe = parse_recipe({"calibration": calibration, "steps": c.steps}, "x")
            if not folder.exists():
                compress_model("minilm", recipe, folder)
            reference = str(folder)
        model = open_reference(reference)
        assert isinstance(model, Embedder)
        parts = [model.encode([row[i] for row in rows]) for i in (0, 1)]
        gold = next(iter(evaluate(model, labelled).values()))
        area = 100 * matching(parts[0], parts[1])
        dense = dense or {"first": parts[0], "matching": area, "labelled": gold}
        row = {
            "name": c.name.removesuffix(", int8"),
            "cosine": float(np.mean(cosine(parts[0], dense["first"]))),
            "matching": area,
            "matching_drop": 100 * (1 - area / dense["matching"]),
            "labelled": gold,
            "labelled_drop": 100 * (1 - gold / dense["labelled"]),
        }
        found.append(row)
        cells = [
            f"{v:.3f}" if k == "cosine" else f"{v:.2f}"
            for k, v in row.items()
            if k != "name"
        ]
        click.echo(f"| {row['name']} | " + " | ".join(cells) + " |")
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
