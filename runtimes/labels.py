"""Sequences of labels: what a scheme allows, the best path, the spans it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError

# What may begin, what may follow what, what may end.
Scheme = tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax over the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    result: NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def transitions(labels: Sequence[str]) -> Scheme:
    """Which labels may begin a text, which may follow which, and which may end it.

    An inside (or end) must continue its own type, unless the type has no begin at all;
    where the scheme has ends, what was begun must be ended.

    Args:
        labels: ``O``, ``B-x``, ``I-x``, and where the scheme has them ``E-x``
            and ``S-x`` (``L-x``, ``U-x``); or ``O`` and bare types.

    Returns:
        bool ``[labels]``, bool ``[labels, labels]`` (from, to) and bool ``[labels]``.
    """
    parts = [split_label(label) for label in labels]
    begun = {kind for part, kind in parts if part == "B"}
    ended = {kind for part, kind in parts if part == "E"}

    def follows(before: tuple[str, str], after: tuple[str, str]) -> bool:
        open_type = before[1] if before[0] in ("B", "I") else None
        if after[0] in ("I", "E") and after[1] in begun:
            return open_type == after[1]
        return open_type not in ended

    outside = ("O", "")
    start = np.array([follows(outside, part) for part in parts])
    allowed = np.array([[follows(a, b) for b in parts] for a in parts])
    end = np.array([follows(part, outside) for part in parts])
    return start, allowed, end


def viterbi(
    scores: NDArray[np.floating],
    start: NDArray[np.bool_],
    allowed: NDArray[np.bool_],
    end: NDArray[np.bool_],
) -> list[int]:
    """The best sequence of labels that the scheme allows.

    Args:
        scores: Log-probabilities ``[words, labels]``.
        start: Which labels may begin, bool ``[labels]``.
        allowed: Which label may follow which, bool ``[labels, labels]``.
        end: Which labels may end, bool ``[labels]``.

    Returns:
        The label index of each word.
    """
    if not len(scores):
        return []
    barrier = np.where(allowed, 0.0, -1e9)
    total = scores[0] + np.where(start, 0.0, -1e9)
    choices = []
    for row in scores[1:]:
        paths = total[:, None] + barrier
        choices.append(paths.argmax(axis=0))
        total = paths.max(axis=0) + row
    path = [int((total + np.where(end, 0.0, -1e9)).argmax())]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path[::-1]


def best_path(probabilities: NDArray[np.floating], scheme: Scheme) -> list[int]:
    """As `viterbi`, of probabilities, ``[words, labels]``, and what `transitions` gives."""
    return viterbi(np.log(probabilities + 1e-30), *scheme)


def spans(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """Spans of a sequence of labels.

    Args:
        labels: In BIO, BIOES, BILOU or IO.

    Returns:
        ``(begin, end, type)`` of each entity, half-open, in words. A part that
        continues nothing begins an entity.
    """
    found: list[tuple[int, int, str]] = []
    begin, kind = 0, ""
    for i, label in enumerate([*labels, "O"]):
        part, name = split_label(label)
        if kind and not (part in ("I", "E") and name == kind):
            found.append((begin, i, kind))
            kind = ""
        if part != "O" and not kind:
            begin, kind = i, name
        if kind and part in ("E", "S"):
            found.append((begin, i + 1, kind))
            kind = ""
    return found


def split_label(label: str) -> tuple[str, str]:
    """Part and type of a label: ``"B-PER"`` to ``("B", "PER")``; BILOU's L and U are E and S; a bare type is I."""
    if label == "O":
        return "O", ""
    part, dash, name = label.partition("-")
    if dash and part in ("B", "I", "E", "S", "L", "U"):
        return {"L": "E", "U": "S"}.get(part, part), name
    return "I", label


def word_labels(
    row: Mapping[str, Any], offsets: NDArray[np.int64], where: str
) -> list[str]:
    """A label (``O``, ``B-x``, ``I-x``) for each word: of the entity that it lies in or overlaps.

    Args:
        row: ``text`` and its ``entities``, each ``start``, ``end`` and ``label``.
        offsets: Start and end of each word, ``[words, 2]``.
        where: How to name the row in an error.

    Raises:
        InputError: An entity covers no word, overlaps another, or lacks something.
    """
    found = ["O"] * len(offsets)
    for entity in row["entities"]:
        try:
            start, end = int(entity["start"]), int(entity["end"])
            label = str(entity["label"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{where}: an entity needs start, end and label. Got {entity!r}."
            ) from error
        covered = [
            k for k, (a, b) in enumerate(offsets) if a < end and b > start and a < b
        ]
        if not 0 <= start < end <= len(row["text"]) or not covered:
            raise InputError(
                f"{where}: the entity {start} to {end} covers no word of its text."
            )
        if not label or any(found[k] != "O" for k in covered):
            raise InputError(
                f"{where}: the entity {start} to {end} overlaps another or has no label."
            )
        for k in covered:
            found[k] = f"{'B' if k == covered[0] else 'I'}-{label}"
    return found
