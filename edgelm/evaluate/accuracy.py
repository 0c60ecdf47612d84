"""The accuracy suite: a model on labelled data, by the task's own measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError, GateError, InputError, require
from edgelm.evaluate import measures
from edgelm.evaluate.data import (
    BUILT_IN,
    Dataset,
    Row,
    from_tags,
    load_dataset,
    samples_of,
)
from edgelm.evaluate.measures import Measure
from edgelm.evaluate.subjects import Subject, of_model
from edgelm.metrics import LOWER_IS_BETTER, Span
from edgelm.runtimes import Model
from edgelm.runtimes.labels import split_label

__all__ = [
    "Dataset",
    "Judged",
    "built_in",
    "check_drop",
    "evaluate",
    "find_datasets",
    "from_tags",
    "judge",
    "load_dataset",
]

# Documents that are ranked for each query.
DEPTH = 100


@dataclass(frozen=True)
class Judged:
    """How a subject did on data, unit by unit.

    Attributes:
        units: What each unit is, for people; its length counts for slices.
        rows: The row of the data that each unit belongs to.
        measures: By name, the one that counts first (`edgelm.evaluate.measures`).
        by_label: The first measure of each label or type.
        answers: What it said to each unit.
        change: How far two answers to a unit are apart.
        notes: What a reader must know.
    """

    units: Sequence[str]
    rows: Sequence[Row]
    measures: Mapping[str, Measure]
    answers: Sequence[Any]
    change: Callable[[Any, Any], float]
    by_label: Mapping[str, Measure] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def main(self) -> str:
        """Name of the measure that counts."""
        return next(iter(self.measures))

    def values(self) -> dict[str, float]:
        """The measures of the data itself; percentages 0..100, but perplexity and mae."""
        return {k: measures.value(m, len(self.units)) for k, m in self.measures.items()}


def find_datasets(
    name: str, model: Model | Subject, split: str = "test"
) -> list[Dataset]:
    """The data that a name stands for: ``built-in``, or a file or folder.

    Raises:
        InputError: `load_dataset` refuses it, or there is no built-in data for the task.
    """
    if name != BUILT_IN:
        return [load_dataset(Path(name), split)]
    found = built_in(model)
    if not found:
        raise InputError(
            "There is no built-in data for language models. Give a text with --data."
        )
    return found


def built_in(model: Model | Subject) -> list[Dataset]:
    """The labelled samples that edgelm ships for a model's task; small."""
    subject = model if isinstance(model, Subject) else of_model(model)
    if subject.task == "multi":
        return samples_of("ner" if subject.extract is not None else "embedding")
    return samples_of(subject.task)


def evaluate(model: Model | Subject, data: Dataset) -> dict[str, float]:
    """Measure a model.

    Args:
        model: A bundle or a model, opened.
        data: Labelled data that its task can use.

    Returns:
        Measures by name, the one that counts first; percentages 0..100, but ``mae`` and
        ``perplexity``.

    Raises:
        EdgelmError: As `judge`.
    """
    return judge(model, data).values()


def judge(model: Model | Subject, data: Dataset) -> Judged:
    """Ask a model everything, and say how it did unit by unit.

    Args:
        model: A bundle or a model, opened; or any other subject.
        data: Labelled data that its task can use.

    Raises:
        InputError: The task cannot use the data, or the model does not know its labels.
        EdgelmError: The model gives what is no number, or what no measure is defined for.
    """
    subject = model if isinstance(model, Subject) else of_model(model)
    asked = next(
        (ask for kind, able, ask in _ASK if kind == data.kind and able(subject)), None
    )
    if asked is None:
        raise InputError(
            f"{data.name} is {data.kind} data, which a model for {subject.task} cannot use."
        )
    judged = asked(subject, data)
    for name, value in judged.values().items():
        if not np.isfinite(value):
            raise EdgelmError(
                f"{name} of {subject.name} on {data.name} is not defined: the scores or the labels are all the same."
            )
    return judged


def check_drop(before: float, after: float, max_drop_percent: float, name: str) -> None:
    """Raise `GateError` if a measure got worse by more than a share of what it was.

    Args:
        before: Value of the model that is compared with.
        after: Value of the model.
        max_drop_percent: Share of ``before`` that is allowed, percent.
        name: Of the measure, its first word, and what it was measured on.
    """
    if not (np.isfinite(before) and np.isfinite(after)):
        raise GateError(f"{name} went from {before} to {after}: that cannot be judged.")
    rises = name.split()[0] in LOWER_IS_BETTER
    fall = after - before if rises else before - after
    drop = 100 * fall / abs(before) if before else (np.inf if fall > 0 else 0.0)
    if drop > max_drop_percent:
        raise GateError(
            f"{name} {'rose' if rises else 'fell'} by {drop:.2f} % (from {before:.2f} to {after:.2f}); "
            f"at most {max_drop_percent:g} % is allowed."
        )


def _finite(subject: Subject, data: Dataset, scores: NDArray[Any]) -> NDArray[Any]:
    """Scores, none of them NaN or infinite."""
    wrong = ~np.isfinite(scores.reshape(len(scores), -1)).all(axis=1)
    if wrong.any():
        raise EdgelmError(
            f"{subject.name} gives no number for {int(wrong.sum())} of {len(scores)} inputs of {data.name}; "
            f"the first is input {int(wrong.argmax()) + 1}. It cannot be measured."
        )
    return scores


def _ner(subject: Subject, data: Dataset) -> Judged:
    assert subject.extract is not None
    gold: list[set[Span]] = [
        {(e["start"], e["end"], e["label"]) for e in row["entities"]}
        for row in data.rows
    ]
    labels = {label for row in gold for _, _, label in row}
    known = {split_label(label)[1] for label in subject.tags} - {""}
    if not labels & known:
        raise InputError(
            f"{data.name} has the entity types {', '.join(sorted(labels)) or 'none'}; the model has "
            f"{', '.join(sorted(known))}."
        )
    notes = []
    if strange := sorted(labels - known):
        notes.append(
            f"{data.name} has the entity types {', '.join(strange)}, which {subject.name} does not know: "
            "all of these count as missed."
        )
    texts = [row["text"] for row in data.rows]
    found = subject.extract(texts)
    overall, by_type = measures.entities(gold, found)
    return Judged(
        texts,
        data.rows,
        overall,
        [sorted(spans) for spans in found],
        lambda a, b: float(len(set(a) ^ set(b))),
        by_type,
        notes,
    )


def _inputs(subject: Subject, data: Dataset) -> tuple[list[Any], list[str]]:
    """What a scorer is asked, and the same for people."""
    pairs = "text1" in data.rows[0]
    if pairs != subject.takes_pairs:
        what, takes = ("pairs", "single texts") if pairs else ("single texts", "pairs")
        raise InputError(f"{data.name} holds {what}; {subject.name} takes {takes}.")
    if not pairs:
        texts = [row["text"] for row in data.rows]
        return texts, texts
    both = [(row["text1"], row["text2"]) for row in data.rows]
    return both, [" | ".join(pair) for pair in both]


def _numbers(
    subject: Subject, data: Dataset, scores: NDArray[Any], units: Sequence[str]
) -> Judged:
    """Numbers against numbers."""
    if scores.ndim != 1:
        raise InputError(
            f"{data.name} holds one score a row; {subject.name} gives {scores.shape[1]}."
        )
    scores = _finite(subject, data, scores).astype(np.float64)
    gold = np.array([float(row["score"]) for row in data.rows])
    found = measures.correlations(scores, gold)
    if data.kind == "regression":
        found["mae"] = measures.mean(np.abs(scores - gold))
    return Judged(
        units, data.rows, found, scores.tolist(), lambda a, b: abs(float(a) - float(b))
    )


def _score_numbers(subject: Subject, data: Dataset) -> Judged:
    assert subject.score is not None
    inputs, units = _inputs(subject, data)
    return _numbers(subject, data, subject.score(inputs), units)


def _cosines(subject: Subject, data: Dataset) -> Judged:
    assert subject.encode is not None
    first, second = ([row[f"text{i}"] for row in data.rows] for i in (1, 2))
    a, b = subject.encode(first, ""), subject.encode(second, "")
    cosines = np.sum(_unit(a) * _unit(b), axis=1)
    units = [f"{x} | {y}" for x, y in zip(first, second, strict=True)]
    return _numbers(subject, data, cosines, units)


def _classes(subject: Subject, data: Dataset) -> Judged:
    assert subject.score is not None
    inputs, units = _inputs(subject, data)
    # One score of a text is the probability of "yes".
    names = subject.labels if len(subject.labels) > 1 else ("0", "1")
    gold = [_class_name(row["label"], names) for row in data.rows]
    if strange := sorted(set(gold) - set(names)):
        raise InputError(
            f"{data.name} has the labels {', '.join(strange[:10])}, which {subject.name} does not know. "
            f"Its labels are {', '.join(names)}; numbers name them in this order, from 0."
        )
    scores = _finite(subject, data, subject.score(inputs)).astype(np.float64)
    if scores.ndim == 1:
        scores = np.stack([1 - scores, scores], axis=1)
    found = [names[i] for i in scores.argmax(axis=1)]
    overall, by_class = measures.classes(gold, found)
    answers = [
        {"label": label, "scores": dict(zip(names, map(float, row), strict=True))}
        for label, row in zip(found, scores, strict=True)
    ]

    def change(a: Any, b: Any) -> float:
        keys = set(a["scores"]) & set(b["scores"])
        moved = sum(abs(a["scores"][k] - b["scores"][k]) for k in keys)
        return float(moved + (a["label"] != b["label"]) * 1e3)

    return Judged(units, data.rows, overall, answers, change, by_class)


def _class_name(label: Any, names: Sequence[str]) -> str:
    """A label by its name; a whole number that is no name counts from 0."""
    if isinstance(label, bool):
        label = int(label)
    text = str(label)
    if text not in names and isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return text


def _retrieval(subject: Subject, data: Dataset) -> Judged:
    ir = require("ir_measures", "eval")
    ids = [str(document["id"]) for document in data.documents]
    queries = [row["text"] for row in data.rows]
    names = [str(row["id"]) for row in data.rows]
    depth = min(DEPTH, len(ids))
    if subject.search is not None:
        ranked = subject.search(queries, DEPTH)
        if not {name for row in ranked for name in row} & set(ids):
            raise InputError(
                f"What {subject.name} finds is not among the documents of {data.name}. "
                "Build the index from its corpus.jsonl."
            )
    else:
        ranked = _rank(subject, data, queries, ids, depth)
    run = {
        name: {one: float(-place) for place, one in enumerate(row)}
        for name, row in zip(names, ranked, strict=True)
    }
    wanted = {
        "ndcg@10": ir.nDCG @ 10,
        "recall@10": ir.R @ 10,
        f"recall@{DEPTH}": ir.R @ DEPTH,
        f"map@{DEPTH}": ir.AP @ DEPTH,
    }
    each = {name: dict.fromkeys(names, 0.0) for name in wanted}
    named = {str(measure): name for name, measure in wanted.items()}
    for row in ir.iter_calc(list(wanted.values()), data.relevance, run):
        each[named[str(row.measure)]][row.query_id] = row.value

    def change(a: Any, b: Any) -> float:
        return 1.0 - len(set(a) & set(b)) / max(len(a), len(b), 1)

    return Judged(
        queries,
        data.rows,
        {n: measures.mean(list(v.values()), 100.0) for n, v in each.items()},
        [row[:10] for row in ranked],
        change,
    )


def _rank(
    subject: Subject, data: Dataset, queries: list[str], ids: list[str], depth: int
) -> list[list[str]]:
    assert subject.encode is not None
    texts = [
        " ".join(filter(None, (d.get("title"), d["text"]))) for d in data.documents
    ]
    documents = _finite(subject, data, _unit(subject.encode(texts, "document")))
    vectors = _finite(subject, data, _unit(subject.encode(queries, "query")))
    ranked = []
    for start in range(0, len(vectors), 64):
        for scores in vectors[start : start + 64] @ documents.T:
            best = np.argpartition(-scores, depth - 1)[:depth]
            order = best[np.lexsort((best, -scores[best]))]
            ranked.append([ids[i] for i in order])
    return ranked


def _language(subject: Subject, data: Dataset) -> Judged:
    assert subject.likelihood is not None
    found = subject.likelihood([row["text"] for row in data.rows])
    each = found.losses / np.maximum(found.tokens, 1)
    return Judged(
        found.texts,
        [data.rows[i] for i in found.rows],
        {"perplexity": measures.perplexity(found.losses, found.tokens)},
        each.tolist(),
        lambda a, b: abs(float(a) - float(b)),
    )


_Able = Callable[[Subject], bool]
# Kind of data, who can answer, and how it is asked.
_ASK: tuple[tuple[str, _Able, Callable[[Subject, Dataset], Judged]], ...] = (
    ("ner", lambda s: s.extract is not None, _ner),
    ("similarity", lambda s: s.encode is not None, _cosines),
    ("similarity", lambda s: s.score is not None, _score_numbers),
    ("regression", lambda s: s.score is not None, _score_numbers),
    ("classification", lambda s: s.score is not None, _classes),
    ("retrieval", lambda s: (s.encode or s.search) is not None, _retrieval),
    ("language", lambda s: s.likelihood is not None, _language),
)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
    return unit
