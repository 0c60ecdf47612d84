"""Several heads on one encoder: one pass answers for all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import POOLED
from edgelm.errors import InputError
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import Engine, Row
from edgelm.runtimes.ner import Entity, EntityRecognizer, Strategy, Units
from edgelm.runtimes.scoring import Scorer
from edgelm.runtimes.windows import flat, read_windows, texts_of

# A score, the scores of several labels, or entities.
Answer = float | dict[str, float] | list[Entity]


class Analyzer:
    """Scores texts and finds their entities in one pass, for example whether there is a definition, and where.

    Attributes:
        engine: The opened bundle.
        heads: Name to the recognizer or scorer of each head; each may be used by itself.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened bundle of several heads; `edgelm.load` does it."""
        self.engine = engine
        self.heads: dict[str, EntityRecognizer | Scorer] = {}
        for name, head in engine.manifest.heads.items():
            own = _only(engine, name)
            self.heads[name] = (
                EntityRecognizer(own) if head.task == "ner" else Scorer(own)
            )

    @cached_property
    def embedder(self) -> Embedder | None:
        """Gives the encoder's vectors; None where its graph gives none of texts."""
        outputs = {tensor.name for tensor in self.engine.manifest.graph.outputs}
        return _embedder(self.engine) if POOLED in outputs else None

    def analyze(
        self,
        texts: Sequence[str | Sequence[str]],
        *,
        heads: Sequence[str] | None = None,
        strategy: Strategy = "first",
        constrained: bool = True,
        thresholds: float | Mapping[str, float] = 0.0,
        units: Units = "code-points",
    ) -> list[dict[str, Answer]]:
        """What every head says of each text.

        Args:
            texts: The texts; or texts split into words, as `EntityRecognizer.extract` takes them.
            heads: Names of the heads to ask; all if not given.
            strategy: Of entities, as are those that follow: see `EntityRecognizer.extract`.
            constrained: See there.
            thresholds: See there.
            units: See there.

        Returns:
            For each text, by the heads' names: a score, or where a head has several labels
            a dict of scores; or a list of entities. Entities are found in the whole
            text; scores are of what the model takes of it (`analyze_with_truncation`
            tells which texts were longer).

        Raises:
            InputError: There is no such head, or as `EntityRecognizer.extract`.
        """
        return self.analyze_with_truncation(
            texts,
            heads=heads,
            strategy=strategy,
            constrained=constrained,
            thresholds=thresholds,
            units=units,
        )[0]

    def analyze_with_truncation(
        self,
        texts: Sequence[str | Sequence[str]],
        *,
        heads: Sequence[str] | None = None,
        strategy: Strategy = "first",
        constrained: bool = True,
        thresholds: float | Mapping[str, float] = 0.0,
        units: Units = "code-points",
    ) -> tuple[list[dict[str, Answer]], NDArray[np.bool_]]:
        """As `analyze`; and a bool ``[n]``, True where a text was longer than its scores have seen."""
        chosen = {name: self._head(name) for name in heads or self.heads}
        given = texts_of(texts)
        ways = {
            name: model.labelling(given, strategy, constrained, thresholds, units)
            for name, model in chosen.items()
            if isinstance(model, EntityRecognizer)
        }
        groups = read_windows(self.engine, given)
        scored = len(ways) < len(chosen)
        truncated = np.array([scored and len(g) > 1 for g in groups], dtype=bool)
        if not ways:
            groups = [group[:1] for group in groups]
        sources = tuple({m.engine.source: None for m in chosen.values()})
        passed = self.engine.run_outputs(flat(groups), sources)
        firsts = np.cumsum([0, *map(len, groups)])[:-1].tolist()
        answers: list[dict[str, Answer]] = [{} for _ in given]
        for name, model in chosen.items():
            at = sources.index(model.engine.source)
            rows = [row[at] for row in passed]
            found: Sequence[Answer]
            if isinstance(model, EntityRecognizer):
                found = model.label(given, groups, rows, ways[name])
            else:
                found = _scores(model, [rows[i] for i in firsts])
            for answer, one in zip(answers, found, strict=True):
                answer[name] = one
        return answers, truncated

    def _head(self, name: str) -> EntityRecognizer | Scorer:
        if name not in self.heads:
            raise InputError(
                f"{self.engine.name} has no head {name!r}. Its heads: {', '.join(self.heads)}."
            )
        return self.heads[name]


def _only(engine: Engine, name: str) -> Engine:
    """The same engine as one of a bundle that has a single head."""
    head = engine.manifest.heads[name]
    own = copy.copy(engine)
    own.head = engine.heads.get(name)
    own.manifest = replace(
        engine.manifest,
        task=head.task,
        head=head.head,
        ner=head.ner,
        scoring=head.scoring,
        heads={},
    )
    return own


def _embedder(engine: Engine) -> Embedder:
    from tokenizers import Tokenizer

    own = copy.copy(engine)
    own.manifest = replace(engine.manifest, task="embedding", heads={})
    # Windows of entities overlap, those of vectors do not.
    own.tokenizer = Tokenizer.from_str(engine.tokenizer.to_str())
    own.tokenizer.enable_truncation(engine.manifest.tokenizer.max_length)
    return Embedder(own)


def _scores(scorer: Scorer, rows: Sequence[Row]) -> list[Answer]:
    if not rows:
        return []
    logits, head = np.stack(rows), scorer.engine.head
    scores = scorer.scores_of(logits if head is None else head.logits(logits))
    if scores.ndim == 1:
        return [float(score) for score in scores]
    return [dict(zip(scorer.labels, map(float, row), strict=True)) for row in scores]
