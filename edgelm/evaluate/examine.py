"""A run of the accuracy suite: everything that its table, JSON and page show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgelm import schema
from edgelm.errors import InputError
from edgelm.evaluate.accuracy import Judged, judge
from edgelm.evaluate.bootstrap import (
    RESAMPLES,
    SEED,
    compare,
    interval,
    resample,
    statement,
)
from edgelm.evaluate.data import Dataset
from edgelm.evaluate.identity import machine
from edgelm.evaluate.slices import disagreements, slices
from edgelm.evaluate.subjects import Subject

KIND = "edgelm-eval"


def examine(
    subject: Subject,
    datasets: Sequence[Dataset],
    other: Subject | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    changes: int = 10,
) -> dict[str, Any]:
    """Measure a subject, and how sure the numbers are.

    Args:
        subject: What to measure.
        datasets: On what.
        other: What to compare with.
        resamples: Draws of the bootstrap.
        seed: Of the draws.
        changes: How many of the units whose answers changed most to list.

    Returns:
        Plain data: ``kind``, ``machine``, ``seed``, ``resamples``, ``model`` and ``against``
        (`identity`), and for each of the ``datasets`` its digest, the ``measures`` with
        ``intervals``, and with ``other`` the ``comparisons`` (the first with its ``statement``),
        ``slices`` and ``disagreements``.

    Raises:
        EdgelmError: As `judge`; or two language models split the text differently.
    """
    return {
        "kind": KIND,
        "machine": machine(),
        "seed": seed,
        "resamples": resamples,
        "model": dict(subject.identity),
        "against": None if other is None else dict(other.identity),
        "datasets": [
            _examine(subject, data, other, resamples, seed, changes)
            for data in datasets
        ],
    }


def _examine(
    subject: Subject,
    data: Dataset,
    other: Subject | None,
    resamples: int,
    seed: int,
    changes: int,
) -> dict[str, Any]:
    judged = judge(subject, data)
    count = len(judged.units)
    drawn = resample(judged.measures, count, resamples=resamples, seed=seed)
    about: dict[str, Any] = {
        "name": data.name,
        "kind": data.kind,
        "digest": data.digest,
        "rows": len(data.rows),
        "units": count,
        "measures": judged.values(),
        "intervals": {name: interval(values) for name, values in drawn.items()},
        "notes": list(judged.notes),
    }
    second = None
    if other is not None:
        second = judge(other, data)
        _check_comparable(judged, second, subject, other)
        found = [
            compare(
                name,
                judged.measures[name],
                second.measures[name],
                count,
                resamples=resamples,
                seed=seed,
            )
            for name in judged.measures
        ]
        about["against"] = second.values()
        about["comparisons"] = [schema.plain(one) for one in found]
        about["statement"] = statement(found[0], subject.name, other.name, data.name)
        listed = disagreements(judged, second, changes)
        about["disagreements"] = [schema.plain(one) for one in listed]
    parts = slices(judged, second, resamples=resamples, seed=seed)
    about["slices"] = [schema.plain(one) for one in parts]
    return about


def _check_comparable(
    judged: Judged, second: Judged, subject: Subject, other: Subject
) -> None:
    """Refuse to compare perplexities a token where the tokens are not the same."""
    if list(judged.units) != list(second.units):
        raise InputError(
            f"{subject.name} and {other.name} split the text into different tokens or windows: their perplexities "
            "a token cannot be compared. Measure each alone, or give both the same --context."
        )
