"""Named-entity recognition: texts to entities with their places in the text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, SupportsFloat, get_args

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.manifest import NerInfo
from edgelm.runtimes.engine import Engine
from edgelm.runtimes.labels import best_path, softmax, spans, split_label, transitions
from edgelm.runtimes.windows import (
    Text,
    Tokens,
    flat,
    join_windows,
    read_windows,
    texts_of,
    without_space,
)

if TYPE_CHECKING:
    from tokenizers import Encoding

Strategy = Literal["none", "simple", "first", "average", "max"]
Units = Literal["code-points", "utf-8", "utf-16", "words"]
Rows = NDArray[np.floating]


@dataclass(frozen=True)
class Entity:
    """A named entity.

    Attributes:
        start: Where it begins in the text, in the units that were asked for.
        end: One behind its end.
        label: Its type, for example ``PER``.
        score: Mean probability of its words' labels, 0..1.
        text: Its characters, as they stand in the text.
    """

    start: int
    end: int
    label: str
    score: float
    text: str


@dataclass(frozen=True)
class Labelling:
    """How entities are made of tokens: what `EntityRecognizer.extract` was asked for, least scores by type."""

    strategy: str
    constrained: bool
    minimum: Mapping[str, float]
    units: str


class EntityRecognizer:
    """Finds named entities.

    Attributes:
        engine: The opened bundle.
        labels: Labels of a token, in the order of the logits.
        types: Types of entities: the labels without their parts (``PER`` of ``B-PER``).
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened NER bundle; `edgelm.load` does it."""
        info = engine.manifest.ner or NerInfo((), "BIO")
        self.engine = engine
        self.labels = info.labels
        kinds = (split_label(label)[1] for label in info.labels)
        self.types = tuple(dict.fromkeys(kind for kind in kinds if kind))
        self._scheme = transitions(info.labels)

    def extract(
        self,
        texts: Sequence[str | Sequence[str]],
        *,
        strategy: Strategy = "first",
        constrained: bool = True,
        thresholds: float | Mapping[str, float] = 0.0,
        units: Units = "code-points",
    ) -> list[list[Entity]]:
        """Find the entities of each text.

        A text longer than the model takes is read in overlapping windows, so nothing is
        cut; each token's probabilities come from the window in which it has the most
        context, and only then are words and entities made.

        Args:
            texts: The texts; or texts that are split into words already, as lists of
                words. Such a text is its words joined by single spaces, and none of its
                entities ends within a word.
            strategy: What is labelled. ``none``: each token, which is an entity of its
                own, label as the model gives it (``B-PER``). ``simple``: each token;
                neighbours are put together. ``first``, ``average``, ``max``: each word,
                by its first token, by the mean of its tokens, or by its most certain
                token. They mean what the token-classification pipeline of transformers
                means by them, but for what a word is: that is the tokenizer's say.
            constrained: Take the most probable sequence of labels that the scheme allows
                (no inside without its begin). Otherwise each label is the most probable
                one by itself, as in transformers. Models whose labels have a begin that
                is only used between neighbours (IOB1) need it off.
            thresholds: Least score of an entity; or for each type its own, 0 for
                types that are not named.
            units: What start and end count: ``code-points`` as Python does, bytes of
                ``utf-8``, 16-bit units of ``utf-16`` as JavaScript and Java do, or the
                given ``words``.

        Returns:
            For each text its entities, by position.

        Raises:
            InputError: Something among the texts is neither a string nor a list of
                strings, a setting is not known, or a threshold is not a number or of no type.
        """
        given = texts_of(texts)
        labelling = self.labelling(given, strategy, constrained, thresholds, units)
        groups = read_windows(self.engine, given)
        rows = self.engine.run(flat(groups), self.engine.source)
        return self.label(given, groups, rows, labelling)

    def labelling(
        self,
        texts: Sequence[Text],
        strategy: Strategy,
        constrained: bool,
        thresholds: float | Mapping[str, float],
        units: Units,
    ) -> Labelling:
        """The arguments of `extract`, checked. Errors are those of `extract`."""
        _check_choice("strategy", strategy, get_args(Strategy))
        _check_choice("units", units, get_args(Units))
        if units == "words" and any(text.words is None for text in texts):
            raise InputError(
                'Units of words need texts that are lists of words, for example ["Ada", "wrote"].'
            )
        return Labelling(strategy, constrained, self._minimum(thresholds), units)

    def label(
        self,
        texts: Sequence[Text],
        groups: Sequence[Sequence[Encoding]],
        rows: Sequence[NDArray[np.float32]],
        labelling: Labelling,
    ) -> list[list[Entity]]:
        """Find the entities of texts whose windows have been run.

        Args:
            texts: The texts.
            groups: The windows of each.
            rows: Of every window in turn its row of the engine's `source`.
            labelling: How.
        """
        head, found = self.engine.head, []
        logits = rows if head is None else [head.logits(row) for row in rows]
        tokens_of_all = join_windows(self.engine, texts, groups, logits)
        for text, tokens in zip(texts, tokens_of_all, strict=True):
            entities = [
                entity
                for kind, entity in self._entities(text.text, tokens, labelling)
                if entity.score >= labelling.minimum[kind]
            ]
            found.append(_count(text, entities, labelling.units))
        return found

    def _minimum(self, thresholds: float | Mapping[str, float]) -> dict[str, float]:
        if not isinstance(thresholds, Mapping):
            thresholds = dict.fromkeys(self.types, thresholds)
        for value in thresholds.values():
            # Against NaN no score is enough, and every entity would be gone.
            if not isinstance(value, SupportsFloat) or np.isnan(float(value)):
                raise InputError(
                    f"A threshold must be a number. Got {value!r} instead."
                )
        unknown = [name for name in thresholds if name not in self.types]
        if unknown:
            raise InputError(
                f"There is no type {unknown[0]!r} to have a threshold. The types are: {', '.join(self.types)}."
            )
        return {name: float(thresholds.get(name, 0.0)) for name in self.types}

    def _entities(
        self, text: str, tokens: Tokens, labelling: Labelling
    ) -> list[tuple[str, Entity]]:
        """Entities, each with its type."""
        if not len(tokens.rows):
            return []
        strategy = labelling.strategy
        starts = np.arange(len(tokens.rows))
        if strategy in _POOL:
            starts = tokens.word_starts()
        shares = softmax(tokens.rows.astype(np.float64))
        rows = _POOL.get(strategy, _first)(shares, starts)
        path = rows.argmax(axis=1)
        if labelling.constrained:
            path = np.array(best_path(rows, self._scheme))
        scores = rows[np.arange(len(rows)), path]
        named = [self.labels[k] for k in path]
        parts = [(a, b, kind, kind) for a, b, kind in spans(named)]
        if strategy == "none":
            parts = [
                (i, i + 1, split_label(label)[1], label)
                for i, label in enumerate(named)
                if label != "O"
            ]
        places = tokens.places(starts)
        found = [
            (kind, entity(text, places[a:b], scores[a:b], label))
            for a, b, kind, label in parts
        ]
        return [(kind, entity) for kind, entity in found if entity.text]


def entity(text: str, places: NDArray[np.int64], scores: Rows, label: str) -> Entity:
    """The entity of neighbouring words: their places ``[words, 2]`` and scores ``[words]``."""
    begin, end = int(places[0, 0]), int(places[-1, 1])
    end = begin + len(text[begin:end].rstrip())
    begin = without_space(text, begin, end)
    return Entity(begin, end, label, float(scores.mean()), text[begin:end])


def _count(text: Text, entities: list[Entity], units: str) -> list[Entity]:
    """The same entities, their places in other units."""
    if units == "code-points" or not entities:
        return entities
    if text.words is not None and units == "words":
        starts = [start for start, _ in text.words]
        return [
            replace(
                e,
                start=bisect_right(starts, e.start) - 1,
                end=bisect_right(starts, e.end - 1),
            )
            for e in entities
        ]
    points = np.frombuffer(text.text.encode("utf-32-le"), np.uint32)
    width = 1 + (points > 0xFFFF).astype(np.int64)
    if units == "utf-8":
        width += (points > 0x7F).astype(np.int64) + (points > 0x7FF)
    place = np.concatenate([[0], np.cumsum(width)])
    return [
        replace(e, start=int(place[e.start]), end=int(place[e.end])) for e in entities
    ]


def _first(rows: Rows, starts: NDArray[np.int64]) -> Rows:
    """The first token speaks for its word."""
    return rows[starts]


def average(rows: Rows, starts: NDArray[np.int64]) -> Rows:
    """The mean of a word's tokens, whose first ones are given."""
    counts = np.diff(starts, append=len(rows))
    mean: Rows = np.add.reduceat(rows, starts, axis=0) / counts[:, None]
    return mean


def _max(rows: Rows, starts: NDArray[np.int64]) -> Rows:
    """The token that is surest of its label speaks for its word; the first of equals."""
    peak = rows.max(axis=1)
    ends = np.append(starts[1:], len(rows))
    chosen = [a + int(peak[a:b].argmax()) for a, b in zip(starts, ends, strict=True)]
    return rows[chosen]


_POOL: dict[str, Callable[[Rows, NDArray[np.int64]], Rows]] = {
    "first": _first,
    "average": average,
    "max": _max,
}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            f"The {name} must be one of {', '.join(choices)}. Got {value!r} instead."
        )
