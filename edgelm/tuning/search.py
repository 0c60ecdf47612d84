"""What to try next, and when to stop looking at it.

Optuna's TPE sampler (Bergstra et al. 2011; with several objectives Ozaki et al. 2020) asks for configurations, in
generations. As soon as there is something to learn from, a regression on what is known puts most of a generation into
its queue: the fastest that should keep to the limit, and what should add most to the front's hypervolume. Each
candidate gets a partial evaluation, and a regression on that too predicts what it will be worth, give or take the
cross-validated error. What will not reach the limit, or will add next to nothing to that volume, is stopped there. The
others are evaluated in full, in any order and anywhere; then the sampler is told all results in the order in which it
asked. So the same seed gives the same search, on one machine or many, at once or resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from edgelm.errors import EdgelmError, require
from edgelm.tuning.costs import Costs
from edgelm.tuning.pareto import front, hypervolume
from edgelm.tuning.prediction import Predictor, fit
from edgelm.tuning.running import Job
from edgelm.tuning.space import Configuration, Values, every, normal

# Candidates between two looks at what is known; the same everywhere, or the search would depend on the machine.
GENERATION = 4
# Of these, how many a regression chooses as soon as there is one; the sampler is asked for the rest.
_HOPED = 3
# Drawn at random, presets included, before the sampler learns from them.
_STARTUP = 8
_TRIES = 50
# What would make the volume larger by less, as a share of it, is not worth a whole evaluation.
_LEAST_GAIN = 0.01
# How far predicted costs may be above a limit that is measured in the end.
_SLACK = {"p95": 1.25, "size": 1.05}


@dataclass(frozen=True)
class Limits:
    """What is asked for.

    Attributes:
        drop: Most that the quality may fall below the dense model's, percent of it.
        p95_ms: Largest 95th percentile of the latency of one text, ms.
        size_mb: Largest bundle, MB (10^6 bytes).
    """

    drop: float
    p95_ms: float | None = None
    size_mb: float | None = None

    def within_reach(self, costs: Costs) -> bool:
        """Whether costs that are predicted may turn out to be allowed."""
        p95, size = self.p95_ms, self.size_mb
        return (p95 is None or costs.p95 <= p95 * _SLACK["p95"]) and (
            size is None or costs.size_mb <= size * _SLACK["size"]
        )


@dataclass(frozen=True)
class Row:
    """A candidate and what became of it.

    Attributes:
        configuration: What it is.
        costs: What it was predicted to cost.
        partial: Quality by the partial evaluation.
        predicted: Quality that was predicted before the whole evaluation, and
        error: the predictor's cross-validated error then.
        quality: What it is worth; None where it was stopped or failed.
        size_mb: Of its bundle, where the graph was made.
        stopped: Why it was not evaluated in full; empty if it was.
    """

    configuration: Configuration
    costs: Costs
    partial: float | None = None
    predicted: float | None = None
    error: float | None = None
    quality: float | None = None
    size_mb: float | None = None
    stopped: str = ""


@dataclass
class Found:
    """What a search found: its rows, in order, and its last predictor."""

    rows: list[Row] = field(default_factory=list)
    predictor: Predictor | None = None

    @property
    def whole(self) -> list[Row]:
        """The rows that were evaluated in full."""
        return [row for row in self.rows if row.quality is not None]

    @property
    def front(self) -> list[Row]:
        """Those of them that no other beats in quality, latency and size."""
        whole = self.whole
        return [whole[i] for i in front([losses(row) for row in whole])]


def losses(row: Row) -> tuple[float, float, float]:
    """Quality lost, latency, MB of a row that was evaluated in full."""
    assert row.quality is not None
    return -row.quality, row.costs.latency, row.size_mb or row.costs.size_mb


def drop(dense: float, quality: float) -> float:
    """How far a quality is below the dense model's, percent of it."""
    return 100 * (dense - quality) / dense


def search(
    space: Mapping[str, Values],
    start: Sequence[Configuration],
    costs: Callable[[Configuration], Costs],
    evaluate: Callable[[Sequence[Job]], Sequence[Mapping[str, Any]]],
    dense: float,
    limits: Limits,
    *,
    trials: int,
    seed: int = 0,
    go_on: Callable[[int], bool] = lambda generation: True,
    after: Callable[[Found], None] = lambda found: None,
) -> Found:
    """Look for the configurations that no other beats.

    Args:
        space: Parameters and their values.
        start: What is tried first.
        costs: Predicts what a configuration costs.
        evaluate: Gives the results of evaluations, in their order (`trial.evaluate_trial`).
        dense: Quality of the dense model.
        limits: What is asked for.
        trials: How many candidates to consider.
        seed: Of everything random.
        go_on: Asked before each generation but the first.
        after: Called after each generation.

    Returns:
        All candidates.

    Raises:
        EdgelmError: Nothing of the first generation could be evaluated.
    """
    asker = _Asker(space, seed)
    asker.enqueue([c for c in start if limits.within_reach(costs(c))])
    found, generation = Found(), 0
    floor = dense * (1 - limits.drop / 100)
    while len(found.rows) < trials and (generation == 0 or go_on(generation)):
        asker.enqueue(_promising(space, costs, found, limits, dense, seed))
        batch = asker.ask(
            min(GENERATION, trials - len(found.rows)),
            lambda c: limits.within_reach(costs(c)),
        )
        if not batch:
            break  # the space is exhausted
        looks = evaluate([(c, "partial") for c, _ in batch])
        predictor = _learn(found.whole, seed)
        rows = [
            _look(Row(c, costs(c)), look, predictor, found.whole, dense, limits)
            for (c, _), look in zip(batch, looks, strict=True)
        ]
        going = [i for i, row in enumerate(rows) if not row.stopped]
        results = evaluate([(rows[i].configuration, "full") for i in going])
        for i, result in zip(going, results, strict=True):
            rows[i] = _finished(rows[i], result)
        for (_, asked), row in zip(batch, rows, strict=True):
            asker.tell(asked, row, dense, floor)
        found.rows += rows
        found.predictor = predictor
        if generation == 0 and not found.whole:
            raise EdgelmError(
                f"No configuration could be evaluated; the first one said: {rows[0].stopped}"
            )
        after(found)
        generation += 1
    found.predictor = _learn(found.whole, seed) or found.predictor
    return found


def _promising(
    space: Mapping[str, Values],
    costs: Callable[[Configuration], Costs],
    found: Found,
    limits: Limits,
    dense: float,
    seed: int,
) -> list[Configuration]:
    """What a regression on configurations alone makes one hope for, the best first.

    The fastest that should keep to the limit, then what should add most to the volume of all that is beaten.
    """
    whole = found.whole
    # What was stopped teaches by what was predicted of it; else its like would be hoped for again.
    judged = [r for r in found.rows if _worth(r) is not None]
    predictor = fit(
        [r.configuration.features() for r in judged],
        [cast(float, _worth(r)) for r in judged],
        seed,
    )
    if predictor is None:
        return []
    seen = {row.configuration for row in found.rows}
    new = [c for c in every(space) if c not in seen]
    new = [c for c in new if limits.within_reach(costs(c))]
    points = {}
    for c, quality in zip(
        new, predictor.many([c.features() for c in new]), strict=True
    ):
        point = _place(quality, costs(c), dense)
        if point[0] <= limits.drop:
            points[c] = point
    known = [_point(row, dense) for row in whole]
    corner = _corner(known, limits)
    chosen = sorted(points, key=lambda c: points[c][1:])[:1]
    while len(chosen) < _HOPED and len(chosen) < len(points):
        beaten = [*known, *(points[c] for c in chosen)]
        beaten = [beaten[i] for i in front(beaten)]
        rest = [c for c in points if c not in chosen]
        chosen.append(
            max(rest, key=lambda c: hypervolume([*beaten, points[c]], corner))
        )
    return chosen


def _worth(row: Row) -> float | None:
    """A row's quality, as measured or else as predicted."""
    return row.predicted if row.quality is None else row.quality


def _place(quality: float, costs: Costs, dense: float) -> tuple[float, float, float]:
    """Percent lost, latency and MB. More quality than the dense model's is not asked for, and mostly luck."""
    return max(drop(dense, quality), 0.0), costs.latency, costs.size_mb


def _point(row: Row, dense: float) -> tuple[float, float, float]:
    """The place of a row that was evaluated in full."""
    _, latency, size = losses(row)
    return _place(row.quality or 0.0, Costs(latency, row.costs.p95, size), dense)


def _corner(
    points: Sequence[tuple[float, float, float]], limits: Limits
) -> tuple[float, ...]:
    """What is a little worse than all of them: where the volume ends."""
    return limits.drop, *(max(p[i] for p in points) * 1.01 for i in (1, 2))


def _learn(whole: Sequence[Row], seed: int) -> Predictor | None:
    """Fit a predictor to the rows that were evaluated in full."""
    return fit(
        [_features(row) for row in whole],
        [cast(float, row.quality) for row in whole],
        seed,
    )


def _features(row: Row) -> list[float]:
    assert row.partial is not None
    return [*row.configuration.features(), row.partial]


def _look(
    row: Row,
    look: Mapping[str, Any],
    predictor: Predictor | None,
    whole: Sequence[Row],
    dense: float,
    limits: Limits,
) -> Row:
    """Decide by a partial evaluation whether a whole one is worth it."""
    if "error" in look:
        return replace(row, stopped=f"failed: {look['error']}")
    row = replace(row, partial=look["quality"])
    if predictor is None:
        return row
    hoped = predictor(_features(row))
    row = replace(row, predicted=hoped, error=predictor.error)
    best = hoped + predictor.error
    if drop(dense, best) > limits.drop:
        return replace(row, stopped="predicted below the limit")
    known = [_point(other, dense) for other in whole]
    grown = [*known, _place(best, row.costs, dense)]
    corner = _corner(grown, limits)
    if hypervolume(grown, corner) <= hypervolume(known, corner) * (1 + _LEAST_GAIN):
        return replace(row, stopped="predicted to add next to nothing to the front")
    return row


def _finished(row: Row, result: Mapping[str, Any]) -> Row:
    if "error" in result:
        return replace(row, stopped=f"failed: {result['error']}")
    size = result.get("size_mb", row.costs.size_mb)
    return replace(row, quality=result["quality"], size_mb=size)


class _Asker:
    """Optuna's sampler behind ask and tell, for configurations that are new and allowed."""

    def __init__(self, space: Mapping[str, Values], seed: int) -> None:
        self._optuna = require("optuna", "tune")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        sampler = self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=_STARTUP)
        self._study = self._optuna.create_study(
            directions=["minimize"] * 3, sampler=sampler
        )
        self._space = space
        self._seen: set[Configuration] = set()
        self._draw = random.Random(seed)

    def enqueue(self, configurations: Sequence[Configuration]) -> None:
        """Let these be asked for next."""
        for c in configurations:
            self._study.enqueue_trial(
                {
                    name: values.index(getattr(c, name))
                    for name, values in self._space.items()
                }
            )

    def ask(
        self, count: int, allowed: Callable[[Configuration], bool]
    ) -> list[tuple[Configuration, Any]]:
        """Configurations that have not been asked for; fewer where no more are left."""
        batch: list[tuple[Configuration, Any]] = []
        for attempt in range(2 * _TRIES):
            if len(batch) == count:
                break
            if attempt >= _TRIES:  # the sampler repeats itself: any other will do
                left = [c for c in every(self._space) if c not in self._seen]
                left = [c for c in left if allowed(c)]
                if not left:
                    break
                self.enqueue([self._draw.choice(left)])
            asked = self._study.ask()
            found = normal(
                Configuration(**{name: self._pick(asked, name) for name in self._space})
            )
            if found in self._seen or not allowed(found):
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
                continue
            self._seen.add(found)
            batch.append((found, asked))
        return batch

    def tell(self, asked: Any, row: Row, dense: float, floor: float) -> None:
        """Tell the sampler what came out, or what was predicted of what was stopped."""
        quality = _worth(row)
        if quality is None:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
            return
        lost, latency, size = drop(dense, quality), row.costs.latency, row.costs.size_mb
        if quality < floor:
            # However small and fast, it is no use: beaten by all that reach the limit.
            latency, size = latency + 1e6, size + 1e6
        self._study.tell(asked, [lost, latency, size])

    def _pick(self, asked: Any, name: str) -> Any:
        """Numbers in their order, other values as categories."""
        values = self._space[name]
        if isinstance(values[0], str):
            return values[asked.suggest_categorical(name, range(len(values)))]
        return values[asked.suggest_int(name, 0, len(values) - 1)]
