"""What a model is worth, 0 to 100: on labelled data, or without labels.

With labels it is the task's own measure on a part of the data, the tuning split; the rest confirms what was chosen.
Without, it depends on the task:

- embedding: each text is cut in two, and each half is compared with the other halves of all texts. How often is its
  own nearer than another (the area under the ROC curve)? That needs no labels, and dense and compressed models
  answer the same question: a model is not marked down for vectors that are other, but as good.
- ner: entity F1 against the entities that the dense model finds.
- scoring: Spearman's rank correlation with the dense model's scores, or of several labels the share of texts with
  the same best one.

The last two are agreement with the dense model: mistakes that a compressed model corrects count as losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.calibration import as_pairs
from edgelm.errors import InputError, require
from edgelm.evaluate.accuracy import Dataset, evaluate, load_dataset
from edgelm.metrics import entity_f1
from edgelm.runtimes import Analyzer, Embedder, EntityRecognizer, Model, Scorer

# With fewer rows or texts a measure says nothing.
LEAST = 16
# Words of the shortest text that is cut in two.
_WORDS = 6


@dataclass(frozen=True)
class Judge:
    """Judges models by one measure.

    Attributes:
        measure: What is measured, in words.
        rows: What it is measured on: rows of labelled data, texts, or pairs of texts.
        data: The labelled data; None without labels.
        due: What the dense model answered, where the measure is agreement with it.
    """

    measure: str
    rows: Sequence[Any]
    data: Dataset | None = None
    due: Any = None

    def part(self, count: int) -> Judge:
        """The same on some of the rows, evenly spread."""
        if len(self.rows) <= count:
            return self
        chosen = [i * len(self.rows) // count for i in range(count)]
        due = None if self.due is None else [self.due[i] for i in chosen]
        return replace(self, rows=[self.rows[i] for i in chosen], due=due)

    def __call__(self, model: Model) -> float:
        """The quality of a model, 0..100.

        Raises:
            InputError: The model gives nothing that can be measured.
        """
        if self.data is not None:
            found = next(
                iter(evaluate(model, replace(self.data, rows=self.rows)).values())
            )
        elif isinstance(model, Embedder):
            found = 100 * matching(
                *(model.encode([row[i] for row in self.rows]) for i in (0, 1))
            )
        else:
            assert not isinstance(model, Analyzer)  # several heads are not tuned
            found = 100 * _agreement(self.due, answers(model, self.rows))
        if not np.isfinite(found):
            raise InputError(
                f"The model's {self.measure} is not a number: its answers do not differ, or are not finite."
            )
        return float(found)


def judges(model: Model, texts: Sequence[str], data: str | None) -> tuple[Judge, Judge]:
    """What to tune by and, on other rows, what to confirm by.

    Args:
        model: The dense model.
        texts: Text that nothing is calibrated on; used where there is no data.
        data: A file of labelled data.

    Raises:
        InputError: The data cannot be used, or there is too little of it.
    """
    if data is not None:
        return _split(_labelled(model, data))
    if isinstance(model, Embedder):
        rows: list[Any] = list(filter(None, map(halves, texts)))
        measure = "share of texts whose own other half is nearer than another's (area under the ROC curve)"
        return _split(Judge(measure, rows))
    if isinstance(model, EntityRecognizer):
        measure = "entity F1 against the dense model's entities"
        return _split(Judge(measure, texts, due=answers(model, texts)))
    assert not isinstance(model, Analyzer)
    rows = list(as_pairs(texts) if model.takes_pairs else texts)
    due = answers(model, rows)
    several = np.ndim(due[0]) > 0
    measure = (
        "share of the dense model's best labels"
        if several
        else "Spearman with the dense model's scores"
    )
    return _split(Judge(measure, rows, due=due))


def answers(model: EntityRecognizer | Scorer, rows: Sequence[Any]) -> list[Any]:
    """A model's answer to each row: its entities, a score or scores."""
    if isinstance(model, EntityRecognizer):
        found = model.extract(list(rows))
        return [{(e.start, e.end, e.label) for e in entities} for entities in found]
    return list(model.score(list(rows)))


def matching(first: NDArray[Any], second: NDArray[Any]) -> float:
    """How often a row is nearer to its own partner than to another's, both ways, 0..1; ties count half.

    Args:
        first: Vectors ``[n, dimension]``.
        second: Vectors of their partners, in the same order.
    """
    x, y = (
        v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12)
        for v in (first, second)
    )
    near = x @ y.T
    own = np.diag(near)
    ways = [
        (own[:, None] > s).sum() + ((own[:, None] == s).sum() - len(s)) / 2
        for s in (near, near.T)
    ]
    return float(sum(ways) / (2 * len(own) * (len(own) - 1)))


def halves(text: str) -> tuple[str, str] | None:
    """A text cut in two at a word; None for one that is too short."""
    words = text.split()
    if len(words) < _WORDS:
        return None
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def _agreement(due: Sequence[Any], found: Sequence[Any]) -> float:
    if isinstance(due[0], set):
        if not any(due):
            raise InputError(
                "The dense model finds no entities in the text, so nothing can be judged by it. "
                "Give --data FILE, or text with entities as --texts FILE."
            )
        return entity_f1(due, found)["f1"]
    if np.ndim(due[0]) > 0:
        same = [np.argmax(a) == np.argmax(b) for a, b in zip(due, found, strict=True)]
        return float(np.mean(same))
    if np.ptp(due) == 0 or np.ptp(found) == 0:
        return float("nan")
    return float(require("scipy.stats", "eval").spearmanr(due, found).statistic)


def _labelled(model: Model, data: str) -> Judge:
    path = Path(data)
    if path.is_dir():
        raise InputError(
            f"{data} is a folder in BEIR's layout, whose judgements are a test split: nothing may be chosen by them. "
            "Give a file of pairs or entities, or tune without --data."
        )
    dataset = load_dataset(path)
    first = next(iter(evaluate(model, dataset)))
    return Judge(f"{first} on {data}", dataset.rows, data=dataset)


def _split(judge: Judge) -> tuple[Judge, Judge]:
    """Three quarters to tune by, every fourth row to confirm by."""
    if len(judge.rows) < LEAST:
        raise InputError(
            f"There are {len(judge.rows)} rows or texts to judge by; at least {LEAST} are needed. Give more."
        )
    numbers = range(len(judge.rows))
    parts = []
    for chosen in ([i for i in numbers if i % 4], [i for i in numbers if not i % 4]):
        due = None if judge.due is None else [judge.due[i] for i in chosen]
        parts.append(replace(judge, rows=[judge.rows[i] for i in chosen], due=due))
    return parts[0], parts[1]
