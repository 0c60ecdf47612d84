"""Entity F1 of every strategy, with the scheme's constraints and without.

    python benchmarks/ner_decoding.py NER-BUNDLE test.jsonl ...

The files are those of `edgelm eval`: `text` and `entities`, or `tokens` and `tags`.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

import edgelm
from edgelm.evaluate.accuracy import load_dataset
from edgelm.metrics import entity_f1
from edgelm.runtimes.ner import Strategy


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(bundle: Path, data: tuple[Path, ...]) -> None:
    """Print a table: F1 without and with constraints, a strategy a line."""
    model = edgelm.load(bundle)
    assert isinstance(model, edgelm.EntityRecognizer)
    for path in data:
        rows = load_dataset(path).rows
        gold = [
            {(e["start"], e["end"], e["label"]) for e in row["entities"]}
            for row in rows
        ]
        texts = [row["text"] for row in rows]
        click.echo(f"{path.name}, {len(rows)} texts: F1 without, with constraints")
        for strategy in get_args(Strategy)[1:]:  # "none" gives tokens, not entities
            values = []
            for constrained in (False, True):
                found = model.extract(texts, strategy=strategy, constrained=constrained)
                places = [{(e.start, e.end, e.label) for e in row} for row in found]
                values.append(100 * entity_f1(gold, places)["f1"])
            gain = values[1] - values[0]
            click.echo(f"  {strategy:8} {values[0]:6.2f} {values[1]:6.2f} {gain:+.2f}")


if __name__ == "__main__":
    main()
