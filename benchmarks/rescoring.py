"""How near codes and stored vectors come to an exact float search, and at what price.

    python benchmarks/rescoring.py encode BUNDLE TEXTS ... -o vectors.npy --limit 300000
    python benchmarks/rescoring.py compare vectors.npy -o rescoring.json

encode: sentences of text files (.txt, or .jsonl with the field text), shuffled, to vectors, in parts that an
interrupted run goes on behind.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

PART = 5000


def sentences(path: Path) -> Iterator[str]:
    """Sentences and titles of 40 to 400 characters."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"] if path.suffix == ".jsonl" else line
            for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
                found = " ".join(part.split())
                if 40 <= len(found) <= 400:
                    yield found


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--limit", default=300_000, show_default=True)
@click.option("--threads", default=1, show_default=True)
def encode(
    bundle: Path, texts: tuple[Path, ...], output: Path, limit: int, threads: int
) -> None:
    """Vectors of distinct sentences of files, in an order that the seed 0 gives."""
    import edgelm

    found = sorted({text for path in texts for text in sentences(path)})
    random.Random(0).shuffle(found)
    found = found[:limit]
    embedder = edgelm.load(bundle, threads=threads)
    assert isinstance(embedder, edgelm.Embedder)
    folder = output.with_suffix(".parts")
    folder.mkdir(exist_ok=True)
    parts = []
    for begin in range(0, len(found), PART):
        part = folder / f"{begin}.npy"
        if not part.exists():
            fresh = folder / "new.npy"
            np.save(fresh, embedder.encode(found[begin : begin + PART]))
            fresh.rename(part)
        parts.append(part)
        click.echo(f"{begin + PART} of {len(found)}", err=True)
    np.save(output, np.concatenate([np.load(part) for part in parts]))


if __name__ == "__main__":
    main()
