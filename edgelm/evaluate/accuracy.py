"""The accuracy suite: a model or bundle on labelled data, by the task's own measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgelm import samples
from edgelm.calibration import open_binary, read_json_lines
from edgelm.errors import GateError, InputError, require
from edgelm.metrics import entity_f1
from edgelm.runtimes import Analyzer, Embedder, EntityRecognizer, Model, Scorer
from edgelm.runtimes.labels import spans

BUILT_IN = "built-in"
Kind = Literal["similarity", "ner", "retrieval"]


@dataclass(frozen=True)
class Dataset:
    """Labelled data.

    Attributes:
        name: Where it comes from.
        kind: What can be measured with it.
        rows: ``similarity``: ``text1``, ``text2``, ``score``. ``ner``: ``text``,
            ``entities`` (start, end, label). ``retrieval``: the queries (``id``, ``text``).
        documents: ``retrieval`` only: ``id``, ``title``, ``text``.
        relevance: ``retrieval`` only: query id to document id to grade.
    """

    name: str
    kind: Kind
    rows: Sequence[Mapping[str, Any]]
    documents: Sequence[Mapping[str, Any]] = ()
    relevance: Mapping[str, Mapping[str, int]] | None = None


def find_datasets(name: str, model: Model) -> list[Dataset]:
    """The data that a name stands for: ``built-in``, or a file or folder.

    Raises:
        InputError: `load_dataset` refuses it.
    """
    return built_in(model) if name == BUILT_IN else [load_dataset(Path(name))]


def built_in(model: Model) -> list[Dataset]:
    """The labelled samples that edgelm ships for a model's task; small."""
    if isinstance(_fitting(model, "ner"), EntityRecognizer):
        return [Dataset("built-in ner", "ner", samples.ner())]
    similarity = Dataset("built-in similarity", "similarity", samples.similarity())
    if not isinstance(model, Embedder):
        return [similarity]
    rows = samples.search()
    queries = [row for row in rows if row["type"] == "query"]
    search = Dataset(
        "built-in search",
        "retrieval",
        queries,
        [row for row in rows if row["type"] == "document"],
        {row["id"]: dict.fromkeys(row["relevant"], 1) for row in queries},
    )
    return [similarity, search]


def load_dataset(path: Path) -> Dataset:
    """Read labelled data; what it is shows in its fields.

    Args:
        path: JSON lines with ``text1``, ``text2``, ``score``; or with ``text`` and
            ``entities``, or ``tokens`` and ``tags``; or a folder in BEIR's layout
            (``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv``).

    Raises:
        InputError: It is none of these, is empty, or a line is not valid.
    """
    if path.is_dir():
        return _load_beir(path)
    with open_binary(path) as stream:
        rows = list(read_json_lines(stream, str(path)))
    if not rows:
        raise InputError(f"{path} holds no rows.")
    fields = set(rows[0]) if isinstance(rows[0], dict) else set()
    if {"text1", "text2", "score"} <= fields:
        kind: Kind = "similarity"
        due: tuple[str, ...] = ("text1", "text2", "score")
    elif {"tokens", "tags"} <= fields:
        kind, due = "ner", ("tokens", "tags")
    elif {"text", "entities"} <= fields:
        kind, due = "ner", ("text", "entities")
    else:
        raise InputError(
            f"{path} has the fields {', '.join(sorted(fields)) or 'none'}. "
            "Give text1, text2 and score; text and entities; or tokens and tags."
        )
    for number, row in enumerate(rows, 1):
        missing = [field for field in due if field not in row]
        if missing:
            raise InputError(f"{path}, row {number}: there is no field '{missing[0]}'.")
    if "tokens" in due:
        rows = [from_tags(row["tokens"], row["tags"]) for row in rows]
    return Dataset(str(path), kind, rows)


def from_tags(tokens: Sequence[str], tags: Sequence[str]) -> dict[str, Any]:
    """Words and tags to a text (words joined by spaces) and its entities."""
    starts = np.cumsum([0, *(len(token) + 1 for token in tokens)]).tolist()
    entities = [
        {"start": starts[a], "end": starts[b - 1] + len(tokens[b - 1]), "label": label}
        for a, b, label in spans(tags)
    ]
    return {"text": " ".join(tokens), "entities": entities}


def evaluate(model: Model, data: Dataset) -> dict[str, float]:
    """Measure a model.

    Args:
        model: A bundle or a model, opened.
        data: Labelled data that its task can use.

    Returns:
        Measures by name, the one that counts first; percentages 0..100.

    Raises:
        InputError: The task cannot use the data.
    """
    model = _fitting(model, data.kind)
    if data.kind == "ner" and isinstance(model, EntityRecognizer):
        return _evaluate_ner(model, data)
    if data.kind == "similarity" and isinstance(model, (Embedder, Scorer)):
        return _evaluate_similarity(model, data)
    if data.kind == "retrieval" and isinstance(model, Embedder):
        return _evaluate_retrieval(model, data)
    raise InputError(
        f"{data.name} is {data.kind} data, which a model for {model.engine.manifest.task} cannot use."
    )


def _fitting(model: Model, kind: Kind) -> Model:
    """Of a bundle of several heads the first that can use such data; else the model itself."""
    if not isinstance(model, Analyzer):
        return model
    wanted = EntityRecognizer if kind == "ner" else Embedder
    faces = (*model.heads.values(), model.embedder)
    return next((one for one in faces if isinstance(one, wanted)), model)


def check_drop(before: float, after: float, max_drop_percent: float, name: str) -> None:
    """Raise `GateError` if a measure fell by more than a share of what it was."""
    drop = 100 * (before - after) / before if before else 0.0
    if drop > max_drop_percent:
        raise GateError(
            f"{name} fell by {drop:.2f} % (from {before:.2f} to {after:.2f}); "
            f"at most {max_drop_percent:g} % is allowed."
        )


def _evaluate_ner(model: EntityRecognizer, data: Dataset) -> dict[str, float]:
    gold = [
        {(e["start"], e["end"], e["label"]) for e in row["entities"]}
        for row in data.rows
    ]
    labels = {label for row in gold for _, _, label in row}
    known = {label.partition("-")[2] or label for label in model.labels}
    if not labels & known:
        raise InputError(
            f"{data.name} has the entity types {', '.join(sorted(labels))}; the model has {', '.join(sorted(known))}."
        )
    found = model.extract([row["text"] for row in data.rows])
    predicted = [{(e.start, e.end, e.label) for e in row} for row in found]
    scores = entity_f1(gold, predicted)
    return {key: 100 * scores[key] for key in ("f1", "precision", "recall")}


def _evaluate_similarity(model: Embedder | Scorer, data: Dataset) -> dict[str, float]:
    stats = require("scipy.stats", "eval")
    first = [row["text1"] for row in data.rows]
    second = [row["text2"] for row in data.rows]
    if isinstance(model, Embedder):
        scores = np.sum(
            _unit(model.encode(first)) * _unit(model.encode(second)), axis=1
        )
    elif not model.takes_pairs:
        raise InputError(f"{data.name} holds pairs, which the model does not take.")
    else:
        scores = model.score(list(zip(first, second, strict=True)))
    gold = [float(row["score"]) for row in data.rows]
    return {
        "spearman": 100 * float(stats.spearmanr(scores, gold).statistic),
        "pearson": 100 * float(stats.pearsonr(scores, gold).statistic),
    }


def _evaluate_retrieval(model: Embedder, data: Dataset) -> dict[str, float]:
    measures = require("ir_measures", "eval")
    texts = [
        " ".join(filter(None, (d.get("title"), d["text"]))) for d in data.documents
    ]
    documents = _unit(model.encode(texts))
    queries = _unit(model.encode([row["text"] for row in data.rows]))
    ids = [str(d.get("id", d.get("_id"))) for d in data.documents]
    depth = min(100, len(ids))
    run = {}
    for row, scores in zip(data.rows, queries @ documents.T, strict=True):
        best = np.argpartition(-scores, depth - 1)[:depth]
        run[str(row.get("id", row.get("_id")))] = {
            ids[i]: float(scores[i]) for i in best
        }
    ndcg, recall = measures.nDCG @ 10, measures.R @ 10
    results = measures.calc_aggregate([ndcg, recall], data.relevance, run)
    return {"ndcg@10": 100 * results[ndcg], "recall@10": 100 * results[recall]}


def _load_beir(path: Path) -> Dataset:
    grades: dict[str, dict[str, int]] = {}
    qrels = path / "qrels" / "test.tsv"
    if not qrels.is_file():
        raise InputError(f"{path} is not in BEIR's layout: there is no qrels/test.tsv.")
    for number, line in enumerate(qrels.read_text(encoding="utf-8").split("\n")[1:], 2):
        parts = line.split("\t")
        if line and len(parts) != 3:
            raise InputError(
                f"{qrels}, line {number}: query, document and grade are due, by tabs."
            )
        if line:
            grades.setdefault(parts[0], {})[parts[1]] = int(parts[2])
    with open_binary(path / "corpus.jsonl") as stream:
        documents = list(read_json_lines(stream, str(path / "corpus.jsonl")))
    with open_binary(path / "queries.jsonl") as stream:
        queries = [
            q
            for q in read_json_lines(stream, str(path / "queries.jsonl"))
            if q["_id"] in grades
        ]
    if not queries or not documents:
        raise InputError(f"{path} holds no query with a relevant document.")
    return Dataset(str(path), "retrieval", queries, documents, grades)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
    return unit
