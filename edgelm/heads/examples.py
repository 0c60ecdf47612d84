"""Labelled examples to what a head is fitted to: features, targets and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import TOKENS
from edgelm.errors import InputError
from edgelm.heads.fitting import Loss
from edgelm.manifest import NerInfo, ScoringInfo
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.heads import pair_features
from edgelm.runtimes.labels import split_label, word_labels
from edgelm.runtimes.windows import Text, read_tokens, without_space

Features = Literal["text", "pair", "ordered-pair", "token"]


@dataclass(frozen=True)
class HeadProblem:
    """What a head is fitted to.

    Attributes:
        features: What the head will be applied to, as in the manifest.
        rows: float ``[n, features]``.
        targets: float64 ``[n, outputs]``.
        loss: What to make least, where the head is logistic.
        info: What the new bundle gives.
        groups: Group of each row, where a field was named.
        comparison: Whether a row is a difference of two texts: no intercept.
    """

    features: Features
    rows: NDArray[Any]
    targets: NDArray[np.float64]
    loss: Loss
    info: ScoringInfo | NerInfo
    groups: list[str] | None = None
    comparison: bool = False


def make_problems(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    *,
    compare: bool = False,
    group: str | None = None,
) -> dict[str, HeadProblem]:
    """Encode labelled examples; what they are for shows in their fields.

    Args:
        embedder: The encoder.
        examples: ``text`` and ``score`` (a number), ``label`` (a class, or whether
            something is so) or ``labels`` (a list, of classes that do not exclude each
            other); ``text1``, ``text2`` and ``score`` or ``label``; ``tokens`` and ``tags``,
            or ``text`` and ``entities``, and beside these what a text has.
        compare: Pairs are comparisons: a ``score`` above 0 says that ``text1`` is
            better, below 0 that ``text2`` is, 0 that neither is.
        group: Field whose values must not be split between folds.

    Returns:
        One problem, or where there are both one of tokens and one of texts; by the name of
        what is predicted: ``entities``, or the field.

    Raises:
        InputError: The examples have other fields, or a value cannot be used.
    """
    if not examples:
        raise InputError("There are no examples to fit a head to.")
    fields = set(examples[0]) if isinstance(examples[0], Mapping) else set()
    whole = fields | {"text"} if {"tokens", "tags"} <= fields else fields
    found = [due for due in _TOKENS if fields.issuperset(due)][:1]
    found += [due for due in _MAKERS if whole.issuperset(due)][:1]
    if not found:
        raise InputError(
            f"The examples have the fields {', '.join(sorted(fields)) or 'none'}. Give text or text1 and text2, "
            "with score, label or labels; tokens and tags; or text and entities."
        )
    if compare and found != [("text1", "text2", "score")]:
        raise InputError("Comparisons need the fields text1, text2 and score.")
    wanted = {field: None for due in found for field in due if field in fields}
    for number, row in enumerate(examples, 1):
        for field in (*wanted, *([group] if group else [])):
            if not isinstance(row, Mapping) or field not in row:
                raise InputError(f"Example {number} has no field '{field}'.")
    groups = [str(row[group]) for row in examples] if group else None
    if "tokens" in wanted:
        _check_tags(examples)
        examples = [{**row, "text": " ".join(row["tokens"])} for row in examples]
    if compare:
        return {"score": _comparisons(embedder, examples, groups)}
    problems = {}
    for due in found:
        name = "entities" if due in _TOKENS else due[-1]
        maker = _tags if due in _TOKENS else _MAKERS[due]
        problems[name] = maker(embedder, examples, groups)
    return problems


def _comparisons(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    groups: list[str] | None,
) -> HeadProblem:
    first, second = _encode_pairs(embedder, examples)
    wins = (np.sign(_numbers(examples, "score")) + 1) / 2
    info = ScoringInfo(("score",), "none", "single")
    rows = first - second
    return HeadProblem("text", rows, wins[:, None], "sigmoid", info, groups, True)


def _scores(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    groups: list[str] | None,
    field: str = "score",
) -> HeadProblem:
    numbers = _numbers(examples, field)
    features, rows = _features(embedder, examples, "pair")
    span = (float(numbers.min()), float(numbers.max()))
    inputs: Any = "single" if features == "text" else "pair"
    info = ScoringInfo((field,), "none", inputs, span)
    return HeadProblem(features, rows, numbers[:, None], "squared", info, groups)


def _classes(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    groups: list[str] | None,
) -> HeadProblem:
    values = [row["label"] for row in examples]
    if any(isinstance(value, float) for value in values):
        return _scores(embedder, examples, groups, "label")
    if all(isinstance(value, bool) for value in values):
        return _flags(embedder, examples, groups)
    named = [_class_name(value, i) for i, value in enumerate(values, 1)]
    labels = tuple(sorted(set(named)))
    if len(labels) < 2:
        raise InputError(f"All examples have the label {labels[0]}; two are needed.")
    features, rows = _features(embedder, examples, "ordered-pair")
    inputs: Any = "single" if features == "text" else "pair"
    info = ScoringInfo(labels, "softmax", inputs)
    targets = np.equal.outer(named, labels).astype(np.float64)
    return HeadProblem(features, rows, targets, "softmax", info, groups)


def _flags(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    groups: list[str] | None,
) -> HeadProblem:
    """Whether something is so: one score, its probability."""
    targets = np.array([[row["label"]] for row in examples], float)
    if targets.min() == targets.max():
        raise InputError(
            f"All examples have the label {bool(targets[0])}; two are needed."
        )
    features, rows = _features(embedder, examples, "ordered-pair")
    inputs: Any = "single" if features == "text" else "pair"
    info = ScoringInfo(("label",), "sigmoid", inputs)
    return HeadProblem(features, rows, targets, "sigmoid", info, groups)


def _several(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    groups: list[str] | None,
) -> HeadProblem:
    sets = []
    for i, row in enumerate(examples, 1):
        if not isinstance(row["labels"], list):
            raise InputError(f"Example {i}: 'labels' must be a list.")
        sets.append({_class_name(value, i) for value in row["labels"]})
    labels = tuple(sorted(set().union(*sets)))
    if not labels:
        raise InputError("No example has a label.")
    _, rows = _features(embedder, examples, "pair")
    targets = np.array([[label in have for label in labels] for have in sets], float)
    info = ScoringInfo(labels, "sigmoid", "single")
    return HeadProblem("text", rows, targets, "sigmoid", info, groups)


def _check_tags(examples: Sequence[Mapping[str, Any]]) -> None:
    for i, row in enumerate(examples, 1):
        Text.of(row["tokens"], i - 1)
        if len(row["tokens"]) != len(row["tags"]):
            raise InputError(f"Example {i} has not as many tags as tokens.")


def _tags(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    groups: list[str] | None,
) -> HeadProblem:
    """The first token of each word, as `EntityRecognizer` labels words."""
    tagged = "tokens" in examples[0]
    texts = [
        Text.of(row["tokens" if tagged else "text"], i)
        for i, row in enumerate(examples)
    ]
    rows, tags, members = [], [], []
    read = read_tokens(embedder.engine, texts, TOKENS)
    for i, (row, text, tokens) in enumerate(zip(examples, texts, read, strict=True)):
        if not len(tokens.words):
            continue
        starts = tokens.word_starts()
        rows.append(tokens.rows[starts])
        if tagged:
            found = [str(row["tags"][word]) for word in tokens.words[starts]]
        else:
            places = tokens.places(starts)
            places[:, 0] = [without_space(text.text, a, b) for a, b in places.tolist()]
            found = word_labels(row, places, f"Example {i + 1}")
        tags += found
        # Words of a text are alike: they stay together in a fold.
        members += [groups[i] if groups else str(i)] * len(found)
    labels = tuple(sorted(set(tags), key=lambda tag: (tag != "O", tag)))
    if len(labels) < 2:
        raise InputError(
            f"All words have the label {', '.join(labels) or '(there are none)'}; two are needed."
        )
    parts = {split_label(label)[0] for label in labels}
    scheme: Any = "BIOES" if parts & {"E", "S"} else "BIO" if "B" in parts else "IO"
    targets = np.equal.outer(tags, labels).astype(np.float64)
    info = NerInfo(labels, scheme)
    return HeadProblem("token", np.concatenate(rows), targets, "softmax", info, members)


_Maker = Callable[
    [Embedder, Sequence[Mapping[str, Any]], "list[str] | None"], HeadProblem
]
_TOKENS: tuple[tuple[str, ...], ...] = (("tokens", "tags"), ("text", "entities"))
_MAKERS: dict[tuple[str, ...], _Maker] = {
    ("text1", "text2", "score"): _scores,
    ("text1", "text2", "label"): _classes,
    ("text", "score"): _scores,
    ("text", "labels"): _several,
    ("text", "label"): _classes,
}


def _features(
    embedder: Embedder,
    examples: Sequence[Mapping[str, Any]],
    pairs: Literal["pair", "ordered-pair"],
) -> tuple[Features, NDArray[np.float32]]:
    if "text" in examples[0]:
        return "text", embedder.encode([row["text"] for row in examples])
    return pairs, pair_features(*_encode_pairs(embedder, examples), pairs)


def _encode_pairs(
    embedder: Embedder, examples: Sequence[Mapping[str, Any]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of the first and of the second texts; each text is encoded once."""
    both = [row[field] for field in ("text1", "text2") for row in examples]
    place: dict[Any, int] = {}
    at = np.array([place.setdefault(text, len(place)) for text in both])
    vectors = embedder.encode(list(place))[at]
    return vectors[: len(examples)], vectors[len(examples) :]


def _numbers(examples: Sequence[Mapping[str, Any]], field: str) -> NDArray[np.float64]:
    for i, row in enumerate(examples, 1):
        value = row[field]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(
                f"Example {i}: '{field}' must be a number. Got {value!r} instead."
            )
    return np.array([row[field] for row in examples], dtype=np.float64)


def _class_name(value: object, number: int) -> str:
    if isinstance(value, (str, int)):
        return str(value)
    raise InputError(
        f"Example {number}: a label must be a string or a whole number. Got {value!r} instead."
    )
