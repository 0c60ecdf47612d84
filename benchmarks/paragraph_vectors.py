"""Codes of raw text side by side: 20 Newsgroups, relevant is what has the query's label.

    python benchmarks/paragraph_vectors.py --data 20news --cache vectors --gensim PYTHON -o paragraph-vectors.json

Queries are test posts (a seeded sample), the database is all train posts, in random order because ties of
Hamming distances are broken by it. With --split train the queries are a tenth of the train posts, which then
are not in the database: parameters are chosen with it. Measures: mean average precision, nDCG@10 and
precision at 11 points of recall (the best precision at that recall or above), means over queries.

Needs scikit-learn; --gensim names a Python that has gensim (benchmarks/doc2vec.py), else its rows are left out.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from retrieval_quality import embed
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from edgelm.codes import BinaryCodes, fit
from edgelm.codes.paragraph import ParagraphVectors, train
from edgelm.lines import open_binary, read_json_lines
from edgelm.reports.charts import curves
from edgelm.runtimes.codes import Floats, hamming_distances
from edgelm.runtimes.paragraph import split_words

Scores = NDArray[np.float32]
# Share of the database that codes give to the second stage.
SHORTLIST = 0.05


def unit(rows: Floats) -> Floats:
    """Rows of length 1."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Floats = rows / np.maximum(lengths, 1e-12)
    return result


def measure(scores: Scores, relevant: NDArray[np.bool_]) -> dict[str, Any]:
    """Measures x 100 of rankings by scores, both ``[q, n]``; of ties the first column wins."""
    order = np.argsort(-scores, axis=1, kind="stable")
    hits = np.take_along_axis(relevant, order, axis=1)
    found = np.cumsum(hits, axis=1)
    precision = found / np.arange(1, hits.shape[1] + 1)
    total = found[:, -1:]
    average = (precision * hits).sum(axis=1) / total[:, 0]
    discounts = 1 / np.log2(np.arange(2, 12))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    points = []
    for level in np.linspace(0, 1, 11):
        at = (found < np.maximum(level * total, 1)).sum(axis=1)
        points.append(100 * float(best[np.arange(len(best)), at].mean()))
    return {
        "map": 100 * float(average.mean()),
        "ndcg@10": 100 * float((hits[:, :10] @ discounts / discounts.sum()).mean()),
        "precision at recall 0, .1, ... 1": [round(p, 2) for p in points],
    }


def two_stages(by_code: Scores, by_vector: Scores) -> Scores:
    """The nearest by code in the order of vectors, then the rest by code."""
    first = max(1, round(SHORTLIST * by_code.shape[1]))
    order = np.argsort(-by_code, axis=1, kind="stable")[:, :first]
    scores = by_code.astype(np.float32).copy()
    above = scores.max() + 2 + np.take_along_axis(by_vector, order, axis=1)
    np.put_along_axis(scores, order, above, axis=1)
    return scores


def nearness(queries: NDArray[np.uint8], codes: NDArray[np.uint8]) -> Scores:
    """Minus the Hamming distances, float32 ``[q, n]``."""
    return -hamming_distances(queries, codes).astype(np.float32)


def paragraph(texts: list[str], asked: list[str], bits: int, dimension: int) -> Any:
    """Scores by codes, and by real vectors; the training."""
    config = ParagraphVectors(bits=bits, dimension=dimension)
    began = time.perf_counter()
    trained = train(texts, config)
    train_s = time.perf_counter() - began
    coder = trained.coder
    codes, vectors = _whole(len(texts), trained.kept, trained.codes, trained.rows)
    # What has no known term has no code: all zeros, which ranks it by chance.
    known = np.flatnonzero(np.diff(coder.vocabulary.counts(asked).starts))
    began = time.perf_counter()
    found = coder.encode_with_vectors([asked[i] for i in known])
    encode_s = time.perf_counter() - began
    asked_codes, asked_vectors = _whole(len(asked), known, *found)
    about = {
        "train_s": round(train_s, 1),
        "encode_ms_per_text": round(1e3 * encode_s / len(known), 2),
        "without a known term": [
            len(texts) - len(trained.kept),
            len(asked) - len(known),
        ],
    }
    return nearness(asked_codes, codes), asked_vectors @ unit(vectors).T, about


def _whole(count: int, kept: NDArray[np.int64], *parts: Any) -> list[Any]:
    """Rows in their places among all; others are 0."""
    wholes = [np.zeros((count, part.shape[1]), part.dtype) for part in parts]
    for whole, part in zip(wholes, parts, strict=True):
        whole[kept] = part
    return wholes


def fitted(base: Floats, asked: Floats, bits: int, kind: str) -> Scores:
    """Scores by codes of vectors, fitted to the database."""
    coder = fit(base, BinaryCodes(bits, kind))  # type: ignore[arg-type]
    return nearness(coder.encode_queries(asked), coder.encode(base))


def hyperplanes(base: Any, asked: Any, bits: int) -> Scores:
    """Random hyperplanes through the origin of sparse rows (SimHash, Charikar 2002)."""
    normals = np.random.default_rng(0).normal(size=(base.shape[1], bits))
    packed = [np.packbits(rows @ normals >= 0, axis=1) for rows in (asked, base)]
    return nearness(*packed)


def doc2vec(
    python: Path, texts: list[str], asked: list[str], dimension: int
) -> tuple[Floats, Floats]:
    """Vectors of gensim, of the database and of queries."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, rows in (("train.jsonl", texts), ("asked.jsonl", asked)):
            lines = (json.dumps(split_words(text)) for text in rows)
            (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        files = [folder / "train.jsonl", folder / "asked.jsonl"]
        script = Path(__file__).parent / "doc2vec.py"
        result = folder / "vectors.npz"
        command = [python, script, *files, str(dimension), result]
        subprocess.run(list(map(str, command)), check=True)
        with np.load(result) as arrays:
            return arrays["train"], arrays["others"]


def markdown(rows: dict[str, Any], widths: list[int]) -> str:
    """MAP and nDCG@10 a cell; a line a method, a column a width."""
    methods = list(dict.fromkeys(key.split("  ")[1] for key in rows))
    lines = [f"| MAP / nDCG@10 | {' | '.join(f'{w} bits' for w in widths)} | float |"]
    lines.append("|---" * (len(widths) + 2) + "|")
    for method in methods:
        cells = [rows.get(f"{where}  {method}") for where in (*widths, "float")]
        shown = [f"{c['map']:.1f} / {c['ndcg@10']:.1f}" if c else "" for c in cells]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(rows: dict[str, Any], bits: int, chance: float) -> str:
    """Precision over recall of the codes of one width."""
    names = (
        "Binary PV",
        "Real-Binary PV",
        "gensim PV-DBOW, rounded",
        "LSA, ITQ",
        "TF-IDF, hyperplanes",
        "minilm, ITQ",
    )
    series = [
        (name, rows[key]["precision at recall 0, .1, ... 1"])
        for name in names
        if (key := f"{bits}  {name}") in rows
    ]
    ticks = [f"{level:.1f}" for level in np.linspace(0, 1, 11)]
    return curves(
        f"20 Newsgroups, {bits} bits: precision (%) over recall",
        ticks,
        series,
        level=("chance", 100 * chance),
    )


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, exists=True), required=True, help="BEIR."
)
@click.option("--split", type=click.Choice(["test", "train"]), default="test")
@click.option("--queries", default=1000, show_default=True)
@click.option("--bits", default="32,64,128", show_default=True)
@click.option("--dimension", default=128, show_default=True, help="Of Real-Binary.")
@click.option("--cache", type=click.Path(path_type=Path), help="minilm's embeddings.")
@click.option("--gensim", type=click.Path(path_type=Path), help="A Python.")
@click.option("--figures", type=click.Path(path_type=Path), help="Folder for plots.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    data: Path,
    split: str,
    queries: int,
    bits: str,
    dimension: int,
    cache: Path | None,
    gensim: Path | None,
    figures: Path | None,
    output: Path,
) -> None:
    """Measure; print the table, write JSON and plots. Rows that OUTPUT has already are not run again."""
    widths = [int(width) for width in bits.split(",")]
    base, pool = (_read(data / f"{n}.jsonl") for n in ("corpus", "queries"))
    draw = np.random.default_rng(0)
    if split == "train":
        mixed = draw.permutation(len(base))
        tenth = len(base) // 10
        pool = [base[i] for i in mixed[:tenth]]
        base = [base[i] for i in np.sort(mixed[tenth:])]
    asked = [pool[i] for i in draw.permutation(len(pool))[:queries]]
    texts, questions = ([row["text"] for row in part] for part in (base, asked))
    # The file is sorted by label, and ties go to the first.
    shuffled = np.random.default_rng(1).permutation(len(base))
    labels = np.array([row["label"] for row in base])[shuffled]
    relevant = np.array([row["label"] for row in asked])[:, None] == labels
    found = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    found["about"] = {
        "split": split,
        "queries": len(asked),
        "database": len(base),
        "seed": 0,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    rows = found["rows"]

    def row(key: str, scores: Scores, **more: Any) -> None:
        rows[key] = {**measure(scores[:, shuffled], relevant), **more}
        click.echo(f"{key}: MAP {rows[key]['map']:.2f}")
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for width in widths:
        if f"{width}  Binary PV" not in rows:
            by_code, by_vector, about = paragraph(texts, questions, width, 0)
            row(f"{width}  Binary PV", by_code, **about)
            both = two_stages(by_code, by_vector)
            row(f"{width}  Binary PV, ranked by its own rows", both)
            row(f"float  Binary PV of {width} bits, its rows", by_vector)
        if f"{width}  Real-Binary PV" not in rows:
            by_code, by_vector, about = paragraph(texts, questions, width, dimension)
            row(f"{width}  Real-Binary PV, codes alone", by_code)
            row(f"{width}  Real-Binary PV", two_stages(by_code, by_vector), **about)
            row(f"float  Real-Binary PV of {width} bits", by_vector)
    counted = TfidfVectorizer(sublinear_tf=True, min_df=5, stop_words="english")
    sparse = counted.fit_transform(texts), counted.transform(questions)
    row("float  TF-IDF", (sparse[1] @ sparse[0].T).toarray())
    sources: dict[str, Callable[[int], tuple[Floats, Floats]]] = {}
    sources["LSA"] = lambda width: _lsa(*sparse, width)
    if cache is not None:
        embedded = embed(texts, "minilm", cache), embed(questions, "minilm", cache)
        sources["minilm"] = lambda width: embedded
    if gensim is not None:
        python = gensim
        sources["gensim PV-DBOW"] = lambda width: doc2vec(
            python, texts, questions, width
        )
    for width in widths:
        row(f"{width}  TF-IDF, hyperplanes", hyperplanes(*sparse, width))
        for name, make in sources.items():
            kinds = {"rounded": "centred"} if name.startswith("gensim") else {}
            kinds = kinds or {"hyperplanes": "rotation", "ITQ": "itq"}
            if all(f"{width}  {name}, {kind}" in rows for kind in kinds):
                continue
            vectors, others = make(width)
            # minilm has one width; the others a dimension a bit.
            one = name == "minilm" or width == max(widths)
            where = "float" if one else f"{width} dimensions"
            row(f"{where}  {name}", unit(others) @ unit(vectors).T)
            for called, kind in kinds.items():
                scores = fitted(unit(vectors), unit(others), width, kind)
                row(f"{width}  {name}, {called}", scores)
    click.echo(markdown(rows, widths))
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        for width in widths:
            path = figures / f"paragraph-vectors-{width}.svg"
            path.write_text(plot(rows, width, relevant.mean()), encoding="utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    with open_binary(path) as stream:
        return list(read_json_lines(stream, str(path)))


def _lsa(base: Any, asked: Any, dimension: int) -> tuple[Floats, Floats]:
    svd = TruncatedSVD(dimension, random_state=0).fit(base)
    return tuple(svd.transform(part).astype(np.float32) for part in (base, asked))  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
