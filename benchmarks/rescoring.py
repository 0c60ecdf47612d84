"""How near codes and stored vectors come to an exact float search, and at what price.

    python benchmarks/rescoring.py encode BUNDLE TEXTS ... -o vectors.npy --limit 300000
    python benchmarks/rescoring.py compare vectors.npy -o rescoring.json

encode: sentences of text files (.txt, or .jsonl with the field text), shuffled, to vectors, in parts that an
interrupted run goes on behind.

compare: the vectors of a file; the first are queries, all others are indexed. Coders are fitted to 20,000 of them.
What is scanned must be in memory; the stored vectors lie on the disk, and a search reads some of their rows.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import faiss
import numpy as np
from retrieval import STEP, Contenders, K, finish

from edgelm.codes import BinaryCodes, fit
from edgelm.codes.judgement import recall
from edgelm.runtimes.codes import Coder
from edgelm.runtimes.index import BinaryIndex

PART, SAMPLE = 5000, 20_000
# Codes a hit that the float query is compared with, and stored vectors a hit that are read.
SETTINGS = ((40, 4), (40, 10), (100, 10), (100, 20), (200, 20), (400, 40))


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


def make_index(
    path: Path, coder: Coder, codes: Any, factors: Any, vectors: Any, kind: Any
) -> BinaryIndex:
    index = BinaryIndex.create(
        path, coder.bits, vectors=kind, dimension=vectors.shape[1], factors=True
    )
    with index.writer() as writer:
        for begin in range(0, len(codes), STEP):
            part = slice(begin, min(begin + STEP, len(codes)))
            writer.add(
                [str(i) for i in range(part.start, part.stop)],
                codes[part],
                vectors=index.pack(vectors[part]),
                factors=factors[part],
            )
    index.refresh()
    return index


def cpu_ms(contenders: Contenders, queries: Any, turns: int) -> dict[str, float]:
    """Median CPU time of a query alone, in turns: what others do on the machine counts less in it."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        query = queries[turn % len(queries)][None]
        for name, run in contenders.items():
            began = time.process_time()
            run(query)
            times[name].append((time.process_time() - began) * 1e3)
    return {name: median(its) for name, its in times.items()}


def search(
    index: BinaryIndex, coder: Coder, candidates: int, oversample: int, queries: Any
) -> Any:
    """Rows, as `edgelm index search` finds them."""
    return index.search_rows(
        coder.project(queries),
        K,
        shortlist=coder.encode_queries(queries),
        vectors=queries,
        candidates=candidates,
        oversample=oversample,
        threads=1,
    )[0]


@main.command()
@click.argument("vectors", type=click.Path(path_type=Path))
@click.option("--queries", default=500, show_default=True)
@click.option("--bits", default="256,512,1024", show_default=True)
@click.option("--turns", default=15, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def compare(
    vectors: Path, queries: int, bits: str, turns: int, output: Path | None
) -> None:
    """Recall of the float32 index's ten nearest, CPU time of one query, memory; one thread."""
    rows = np.load(vectors, mmap_mode="r")
    rows = np.ascontiguousarray(rows, np.float32)
    asked, rows = rows[:queries], rows[queries:]
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(rows.shape[1])
    flat.add(rows)
    _, near = flat.search(asked, K)
    base = rows.nbytes / 1e6
    found: list[dict[str, Any]] = []
    for width in map(int, bits.split(",")):
        # The vectors are in random order, so these are a sample.
        coder = fit(rows[:SAMPLE], BinaryCodes(bits=width, iterations=20))
        codes = np.concatenate(
            [coder.encode(rows[i : i + STEP]) for i in range(0, len(rows), STEP)]
        )
        factors = coder.factors(rows, codes)
        for kind in ("int8", "float16"):
            with tempfile.TemporaryDirectory() as folder:
                index = make_index(
                    Path(folder) / "index", coder, codes, factors, rows, kind
                )
                contenders: Contenders = {"float32": lambda q: flat.search(q, K)}
                recalls: dict[str, float] = {}
                for candidates, oversample in SETTINGS:
                    name = f"{candidates}/{oversample}"
                    contenders[name] = partial(
                        search, index, coder, candidates, oversample
                    )
                    recalls[name] = recall(near, contenders[name](asked))
                times = cpu_ms(contenders, asked, turns)
            for name, its in times.items():
                if name == "float32" and found:
                    continue
                own = (
                    base if name == "float32" else (codes.nbytes + factors.nbytes) / 1e6
                )
                found.append(
                    {
                        "bits": "" if name == "float32" else width,
                        "vectors": "" if name == "float32" else kind,
                        "candidates/vectors a hit": name,
                        "recall": round(recalls.get(name, 1.0), 4),
                        "ms": round(its, 3),
                        "x time": round(its / times["float32"], 3),
                        "scanned MB": round(own, 1),
                        "x memory": round(own / base, 3),
                    }
                )
                click.echo(json.dumps(found[-1]), err=True)
    finish(output, f"{len(rows)} vectors, {queries} queries", found)


if __name__ == "__main__":
    main()
