"""What binary codes cost a search: kinds x bits x ways of searching, against float search and peers.

    python benchmarks/retrieval_quality.py --data scifact --data 20news --cache vectors -o retrieval-quality.json

A data set is a folder in BEIR's layout; its test queries are those of qrels/test.tsv, or of the first other
qrels/test*.tsv. Coders are fitted without queries and labels, to edgelm's built-in calibration text and to the
documents themselves. nDCG@10 is by the labels; recall@10 is of the ten documents that float search finds. A cell of the
tables is nDCG@10 x 100 / recall@10. Rescored: the 40 (4x) or 100 (10x) best by the codes, ordered by float queries and
int8 vectors.

Defaults were chosen with --split train, on SciFact's training queries, and not on what the tables show.
Embeddings are computed once, in PyTorch and float32, and kept in --cache. Peers: faiss-cpu, sentence-transformers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import faiss
import numpy as np
from numpy.typing import NDArray

from edgelm.calibration import Calibration, load_texts
from edgelm.codes import KINDS, BinaryCodes, fit
from edgelm.codes.judgement import best, recall
from edgelm.errors import CompressionError
from edgelm.evaluate.reference import open_reference
from edgelm.lines import open_binary, read_json_lines
from edgelm.reports.charts import curves
from edgelm.runtimes import Embedder
from edgelm.runtimes.codes import Floats, asymmetric_scores, hamming_distances
from edgelm.runtimes.rescoring import pack_vectors, rescore

Order = NDArray[np.int64]
# Way of searching -> how it is called in the tables.
WAYS = {
    "hamming": "Hamming",
    "hamming 4x": "Hamming, rescored 4x",
    "float query": "float query",
    "factors": "float query, factors",
    "factors 4x": "the same, rescored 4x",
    "factors 10x": "the same, rescored 10x",
}


@dataclass(frozen=True)
class Data:
    """Embedded documents and queries, and which of them belong together.

    Attributes:
        documents: float32 ``[n, dim]``.
        queries: float32 ``[q, dim]``.
        grades: float32 ``[q, n]``.
        near: int64 ``[q, 10]``, what float search finds.
    """

    documents: Floats
    queries: Floats
    grades: Floats
    near: Order

    def measure(self, order: Order) -> dict[str, float]:
        """nDCG@10 x 100 and recall@10 of what a search found, int64 ``[q, at least 10]``."""
        discounts = 1 / np.log2(np.arange(2, 12))
        gains = np.take_along_axis(self.grades, order[:, :10], axis=1) @ discounts
        ideal = -np.sort(-self.grades, axis=1)[:, :10] @ discounts
        return {
            "ndcg@10": round(100 * float(np.mean(gains / ideal)), 2),
            "recall@10": round(recall(self.near, order[:, :10]), 4),
        }


def load(folder: Path, split: str, model: str, cache: Path) -> Data:
    """Read a data set and embed it, or find its embeddings in the cache."""
    (qrels, *_) = sorted((folder / "qrels").glob(f"{split}*.tsv"))
    with qrels.open(encoding="utf-8", newline="") as stream:
        labels = list(csv.DictReader(stream, delimiter="\t"))
    asked = {row["query-id"] for row in labels}
    documents = list(_rows(folder / "corpus.jsonl"))
    queries = [q for q in _rows(folder / "queries.jsonl") if q["_id"] in asked]
    texts = [" ".join(filter(None, (d.get("title"), d["text"]))) for d in documents]
    vectors = embed(texts, model, cache)
    asking = embed([q["text"] for q in queries], model, cache)
    row = {q["_id"]: i for i, q in enumerate(queries)}
    column = {d["_id"]: i for i, d in enumerate(documents)}
    grades = np.zeros((len(queries), len(documents)), np.float32)
    for label in labels:
        place = row[label["query-id"]], column[label["corpus-id"]]
        grades[place] = float(label["score"])
    return Data(vectors, asking, grades, best(asking @ vectors.T, 10))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open_binary(path) as stream:
        yield from read_json_lines(stream, str(path))


def embed(texts: Sequence[str], model: str, cache: Path) -> Floats:
    """Embeddings of texts, from the cache where they are there."""
    key = hashlib.sha256("\0".join((model, *texts)).encode()).hexdigest()[:16]
    path = cache / f"{key}.npy"
    if not path.exists():
        embedder = open_reference(model)
        assert isinstance(embedder, Embedder)
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, embedder.encode(texts))
    vectors: Floats = np.load(path)
    return vectors


def of_kind(data: Data, fitted: Floats, bits: int, kind: str, seeds: int) -> Any:
    """All ways of searching with a kind of coder, the mean over seeds."""
    runs = [
        of_coder(data, fitted, BinaryCodes(bits, kind, seed=seed))  # type: ignore[arg-type]
        for seed in range(seeds)
    ]
    return mean(runs)


def mean(runs: list[Any]) -> Any:
    """Mean of numbers that lie alike in nested dicts."""
    if isinstance(runs[0], dict):
        return {key: mean([run[key] for run in runs]) for key in runs[0]}
    return round(sum(runs) / len(runs), 4)


def of_coder(data: Data, fitted: Floats, config: BinaryCodes) -> dict[str, Any]:
    """All ways of searching with one coder."""
    began = time.perf_counter()
    coder = fit(fitted, config)
    fit_s = time.perf_counter() - began
    began = time.perf_counter()
    codes = coder.encode(data.documents)
    encode_s = time.perf_counter() - began
    factors = coder.factors(data.documents, codes)
    rows = coder.project(data.queries)
    hamming = -hamming_distances(coder.encode_queries(data.queries), codes)
    scores = {
        "hamming": hamming.astype(np.float32),
        "float query": asymmetric_scores(rows, codes),
        "factors": asymmetric_scores(rows, codes, factors),
    }
    unbiased = coder.factors(data.documents, codes, power=1.0)
    found = {
        "unbiased": data.measure(best(asymmetric_scores(rows, codes, unbiased), 10)),
        "fit_s": round(fit_s, 2),
        "encode_s": round(encode_s, 2),
    }
    stored = pack_vectors(data.documents, "int8")
    for way, values in scores.items():
        order = best(values, 100)
        found[way] = data.measure(order)
        for times in (4, 10):
            again = rescored(data.queries, stored, order[:, : 10 * times])
            found[f"{way} {times}x"] = data.measure(again)
    return found


def rescored(queries: Floats, stored: NDArray[Any], shortlists: Order) -> Order:
    """Shortlists in the order of the second stage."""
    return np.stack(
        [
            rows[np.argsort(-rescore(query, stored, rows), kind="stable")]
            for query, rows in zip(queries, shortlists, strict=True)
        ]
    )


def of_rabitq(data: Data, fitted: Floats, bits: int) -> dict[str, Any]:
    """faiss's RaBitQ with float queries, after a random rotation, or PCA where there are fewer bits."""
    dimension = data.documents.shape[1]
    turn = f"RR{bits}" if bits == dimension else f"PCAR{bits}"
    index = faiss.index_factory(dimension, f"{turn},RaBitQ", faiss.METRIC_INNER_PRODUCT)
    faiss.downcast_index(index.index).qb = 0
    index.train(fitted)
    index.add(data.documents)
    _, order = index.search(data.queries, 100)
    stored = pack_vectors(data.documents, "int8")
    found = {"factors": data.measure(order)}
    for times in (4, 10):
        again = rescored(data.queries, stored, order[:, : 10 * times])
        found[f"factors {times}x"] = data.measure(again)
    return found


def of_sentence_transformers(data: Data, bits: int) -> dict[str, Any]:
    """Its binary search over the first dimensions; its own rescoring is float queries on 40 codes."""
    from sentence_transformers.util import quantization

    codes = quantization.quantize_embeddings(data.documents[:, :bits], "ubinary")
    found = {}
    for way, again in (("hamming", False), ("float query", True)):
        results, _ = quantization.semantic_search_faiss(
            data.queries[:, :bits],
            corpus_embeddings=codes,
            corpus_precision="ubinary",
            rescore=again,
            rescore_multiplier=4,
        )
        order = [[hit["corpus_id"] for hit in hits] for hits in results]
        found[way] = data.measure(np.array(order, np.int64))
    return found


def markdown(rows: dict[str, Any], name: str, source: str, widths: list[int]) -> str:
    """A table: a line a kind and way of searching, a column a width."""
    prefix = f"{name}  {source}  "
    kinds = list(
        dict.fromkeys(key.split("  ")[3] for key in rows if key.startswith(prefix))
    )
    lines = [
        f"| {name}, fitted to {source} | {' | '.join(map(str, widths))} |",
        "|---" * (len(widths) + 1) + "|",
    ]
    for kind in kinds:
        for way, called in WAYS.items():
            cells = [rows.get(f"{prefix}{w}  {kind}", {}).get(way) for w in widths]
            if any(cells):
                shown = " | ".join("" if c is None else cell(c) for c in cells)
                lines.append(f"| {kind}, {called} | {shown} |")
    return "\n".join(lines)


def cell(found: dict[str, float]) -> str:
    """nDCG and recall of a search."""
    return f"{found['ndcg@10']:.1f} / {found['recall@10']:.2f}"


def plot(rows: dict[str, Any], name: str, source: str, widths: list[int]) -> str:
    """nDCG@10 over the width of the codes, without rescoring."""
    series = [
        (
            f"{kind}, {WAYS[way]}",
            [rows[f"{name}  {source}  {w}  {kind}"][way] for w in widths],
        )
        for kind, way in (
            ("autoencoder", "factors"),
            ("itq", "factors"),
            ("itq", "hamming"),
            ("rotation", "hamming"),
        )
    ]
    return curves(
        f"{name}: nDCG@10 over bits, fitted to {source}",
        list(map(str, widths)),
        [(label, [v["ndcg@10"] for v in values]) for label, values in series],
        level=("float", rows[f"{name}  float"]["ndcg@10"]),
    )


@click.command()
@click.option("--model", default="minilm", show_default=True)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, exists=True),
    help="Folder in BEIR's layout; repeatable.",
)
@click.option("--split", default="test", show_default=True)
@click.option("--bits", default="64,128,256,384,512", show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    help="Random rotations to begin with; the tables show means.",
)
@click.option("--cache", type=click.Path(path_type=Path), required=True)
@click.option("--figures", type=click.Path(path_type=Path), help="Folder for plots.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    model: str,
    data: tuple[Path, ...],
    split: str,
    bits: str,
    kinds: str,
    seeds: int,
    cache: Path,
    figures: Path | None,
    output: Path,
) -> None:
    """Measure; print tables, write JSON and plots. Rows that OUTPUT has already are not run again."""
    widths = [int(width) for width in bits.split(",")]
    found = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    found["about"] = {
        "model": model,
        "split": split,
        "seeds": seeds,
        "faiss": faiss.__version__,
        "numpy": np.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    rows = found["rows"]
    built_in = embed(load_texts(Calibration()), model, cache)
    for folder in data:
        name = folder.name
        loaded = load(folder, split, model, cache)
        rows[f"{name}  float"] = loaded.measure(loaded.near)
        click.echo(f"{name}: float search, nDCG@10 {rows[f'{name}  float']['ndcg@10']}")
        for source, vectors in (
            ("its documents", loaded.documents),
            ("the built-in text", built_in),
        ):
            for width in widths:
                jobs: dict[str, Callable[[], Any]] = {
                    kind: partial(of_kind, loaded, vectors, width, kind, seeds)
                    for kind in kinds.split(",")
                }
                if width <= loaded.documents.shape[1]:
                    jobs["faiss RaBitQ"] = partial(of_rabitq, loaded, vectors, width)
                    jobs["sentence-transformers"] = partial(
                        of_sentence_transformers, loaded, width
                    )
                for kind, measure in jobs.items():
                    key = f"{name}  {source}  {width}  {kind}"
                    if key in rows:
                        continue
                    try:
                        rows[key] = measure()
                    except CompressionError:  # a bit a dimension, and too few of these
                        continue
                    output.write_text(json.dumps(found, indent=1) + "\n")
            click.echo(f"\n{markdown(rows, name, source, widths)}\n")
            if figures is not None:
                figures.mkdir(parents=True, exist_ok=True)
                path = figures / f"codes-{name}-{source.replace(' ', '-')}.svg"
                path.write_text(plot(rows, name, source, widths), encoding="utf-8")


if __name__ == "__main__":
    main()
