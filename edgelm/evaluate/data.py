"""Labelled data: what the accuracy suite reads, checked line by line."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgelm import samples
from edgelm.bundle import file_digest
from edgelm.errors import InputError
from edgelm.lines import numbered_json_lines, numbered_lines, open_binary
from edgelm.runtimes.labels import spans

BUILT_IN = "built-in"
Kind = Literal[
    "similarity", "ner", "retrieval", "classification", "regression", "language"
]
Row = Mapping[str, Any]

_TAG = re.compile(r"O|[BIESLU]-\S+")
_CONLL = (".conll", ".bio", ".iob", ".iob2", ".bioes", ".bilou")
_JSON = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Dataset:
    """Labelled data.

    Attributes:
        name: Where it comes from.
        kind: What can be measured with it.
        rows: ``similarity``: ``text1``, ``text2``, ``score``. ``ner``: ``text``,
            ``entities`` (start, end, label). ``retrieval``: the queries (``id``,
            ``text``). ``classification``: ``text``, or ``text1`` and ``text2``, and
            ``label``. ``regression``: ``text``, ``score``. ``language``: ``text``. Each
            may have a ``domain``.
        documents: ``retrieval`` only: ``id``, ``title``, ``text``.
        relevance: ``retrieval`` only: query id to document id to grade.
        digest: SHA-256 (hex) of what was read.
    """

    name: str
    kind: Kind
    rows: Sequence[Row]
    documents: Sequence[Row] = ()
    relevance: Mapping[str, Mapping[str, int]] | None = None
    digest: str = ""


def samples_of(task: str) -> list[Dataset]:
    """The labelled samples that edgelm ships for a task; small, and empty for ``lm``."""
    if task == "lm":
        return []
    if task == "ner":
        rows = samples.ner()
        return [Dataset("built-in ner", "ner", rows, digest=_rows_digest(rows))]
    pairs = samples.similarity()
    similarity = Dataset(
        "built-in similarity", "similarity", pairs, digest=_rows_digest(pairs)
    )
    if task == "scoring":
        return [similarity]
    rows = samples.search()
    queries = [row for row in rows if row["type"] == "query"]
    search = Dataset(
        "built-in search",
        "retrieval",
        queries,
        [row for row in rows if row["type"] == "document"],
        {row["id"]: dict.fromkeys(row["relevant"], 1) for row in queries},
        _rows_digest(rows),
    )
    return [similarity, search]


def load_dataset(path: Path, split: str = "test") -> Dataset:
    """Read labelled data; what it is shows in its fields.

    Args:
        path: JSON lines with ``text1``, ``text2`` and ``score`` or ``label``; with
            ``text`` and ``entities``, ``score`` or ``label``; with ``tokens`` and
            ``tags``; or with ``text`` alone (language modelling). A CoNLL file (a word
            a line, its tag in the last column, an empty line behind a sentence). Plain
            text (language modelling). Or a folder in BEIR's layout (``corpus.jsonl``,
            ``queries.jsonl``, ``qrels/SPLIT.tsv``).
        split: Which relevance judgements of a folder in BEIR's layout.

    Raises:
        InputError: It is none of these, is empty, or a line is not valid; the message
            names the line.
    """
    if path.is_dir():
        return _load_beir(path, split)
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    lines = None if name.endswith(_JSON) else list(_text_lines(path))
    first = next((line for _, line in lines or () if line.strip()), "{")
    if first.lstrip().startswith("{"):
        kind, rows = _read_rows(path)
    elif name.endswith(_CONLL) or _is_conll(lines or []):
        kind, rows = "ner", _read_conll(path, lines or [])
    else:
        kind, rows = "language", [{"text": "\n".join(line for _, line in lines or ())}]
    if not rows:
        raise InputError(f"{path} holds no rows.")
    return Dataset(str(path), kind, rows, digest=file_digest(path))


def from_tags(tokens: Sequence[str], tags: Sequence[str]) -> dict[str, Any]:
    """Words and tags to a text (words joined by spaces) and its entities."""
    starts = np.cumsum([0, *(len(token) + 1 for token in tokens)]).tolist()
    entities = [
        {"start": starts[a], "end": starts[b - 1] + len(tokens[b - 1]), "label": label}
        for a, b, label in spans(tags)
    ]
    return {"text": " ".join(tokens), "entities": entities}


def _rows_digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def _string(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(map(_string, value))


def _entities(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(e, dict)
        and type(e.get("start")) is int
        and type(e.get("end")) is int
        and _string(e.get("label"))
        for e in value
    )


# Field -> what it must be, and in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (_string, "a string"),
    "text1": (_string, "a string"),
    "text2": (_string, "a string"),
    "score": (_number, "a finite number"),
    "label": (
        lambda value: _string(value) or _number(value) or isinstance(value, bool),
        "a string or a number",
    ),
    "tokens": (_strings, "a list of strings"),
    "tags": (_strings, "a list of strings"),
    "entities": (_entities, "a list of objects with start, end (numbers) and label"),
    "domain": (_string, "a string"),
}
# The first whose fields a file has says what it is.
_KINDS: tuple[tuple[tuple[str, ...], Kind], ...] = (
    (("text1", "text2", "score"), "similarity"),
    (("text1", "text2", "label"), "classification"),
    (("tokens", "tags"), "ner"),
    (("text", "entities"), "ner"),
    (("text", "score"), "regression"),
    (("text", "label"), "classification"),
    (("text",), "language"),
)


def _read_rows(path: Path) -> tuple[Kind, list[Row]]:
    with open_binary(path) as stream:
        numbered = list(numbered_json_lines(stream, str(path)))
    if not numbered:
        raise InputError(f"{path} holds no rows.")
    fields = set(numbered[0][1]) if isinstance(numbered[0][1], dict) else set()
    found = next((k for k in _KINDS if fields.issuperset(k[0])), None)
    if found is None:
        raise InputError(
            f"{path} has the fields {', '.join(sorted(fields)) or 'none'}. Give text1 and text2 with score or label; "
            "text with entities, score or label; tokens and tags; or text alone."
        )
    due, kind = found
    rows = [_checked(row, due, f"{path}, line {number}") for number, row in numbered]
    # As for heads: labels with a fraction are numbers, not names.
    if kind == "classification" and any(isinstance(r["label"], float) for r in rows):
        for (number, _), row in zip(numbered, rows, strict=True):
            if not _number(row["label"]):
                raise InputError(
                    f"{path}, line {number}: the label {row['label']!r} is no number, as those of other lines are."
                )
        kind = "similarity" if "text1" in due else "regression"
        rows = [{**row, "score": row["label"]} for row in rows]
    return kind, rows


def _checked(row: Any, due: Sequence[str], where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON object is due, not {type(row).__name__}.")
    for field in (*due, "domain") if "domain" in row else due:
        if field not in row:
            raise InputError(f"{where}: there is no field '{field}'.")
        valid, what = _FIELDS[field]
        if not valid(row[field]):
            raise InputError(f"{where}: the field '{field}' is not {what}.")
    if "tokens" in due:
        if len(row["tokens"]) != len(row["tags"]):
            raise InputError(
                f"{where}: there are {len(row['tokens'])} tokens and {len(row['tags'])} tags."
            )
        extra = {"domain": row["domain"]} if "domain" in row else {}
        return {**from_tags(row["tokens"], row["tags"]), **extra}
    if "entities" in due:
        for e in row["entities"]:
            if not 0 <= e["start"] < e["end"] <= len(row["text"]):
                raise InputError(
                    f"{where}: the entity from {e['start']} to {e['end']} does not lie in the text "
                    f"of {len(row['text'])} characters."
                )
    return row


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_binary(path) as stream:
        yield from numbered_lines(stream, str(path))


def _passed_over(line: str) -> bool:
    """Comments, and what CoNLL-2003 puts between documents."""
    comment = line.startswith("#") and not _TAG.fullmatch(line.split()[-1])
    return comment or line.startswith("-DOCSTART-")


def _is_conll(lines: Sequence[tuple[int, str]]) -> bool:
    """Whether the first words all have a tag in the last column."""
    words = [line.split() for _, line in lines if line.strip()]
    words = [parts for parts in words if not _passed_over(" ".join(parts))][:20]
    return bool(words) and all(
        len(parts) > 1 and _TAG.fullmatch(parts[-1]) for parts in words
    )


def _read_conll(path: Path, lines: Sequence[tuple[int, str]]) -> list[Row]:
    rows: list[Row] = []
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in [*lines, (len(lines) + 1, "")]:
        parts = line.split()
        if not parts or line.startswith("-DOCSTART-"):
            if tokens:
                rows.append(from_tags(tokens, tags))
            tokens, tags = [], []
        elif not _passed_over(line):
            if len(parts) < 2 or not _TAG.fullmatch(parts[-1]):
                raise InputError(
                    f"{path}, line {number}: a word and its tag are due (O, B-x, I-x, E-x or S-x in the last "
                    f"column). Got {line[:60]!r}."
                )
            tokens.append(parts[0])
            tags.append(parts[-1])
    return rows


def _load_beir(path: Path, split: str) -> Dataset:
    qrels = path / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        there = ", ".join(sorted(p.stem for p in path.glob("qrels/*.tsv"))) or "none"
        raise InputError(
            f"{path} is not in BEIR's layout: there is no qrels/{split}.tsv. "
            f"Splits that are there: {there}; choose one with --split."
        )
    grades = _grades(qrels)
    documents = list(_records(path / "corpus.jsonl", "document"))
    queries = [
        q for q in _records(path / "queries.jsonl", "query") if q["id"] in grades
    ]
    if not queries or not documents:
        raise InputError(f"{path} holds no query with a relevant document.")
    files = (path / "corpus.jsonl", path / "queries.jsonl", qrels)
    digest = hashlib.sha256("".join(map(file_digest, files)).encode()).hexdigest()
    grades = {q["id"]: grades[q["id"]] for q in queries}
    return Dataset(str(path), "retrieval", queries, documents, grades, digest)


def _grades(qrels: Path) -> dict[str, dict[str, int]]:
    grades: dict[str, dict[str, int]] = {}
    for number, line in _text_lines(qrels):
        parts = line.split("\t")
        valid = len(parts) == 3 and re.fullmatch(r"-?\d+", parts[2].strip())
        if not line or (number == 1 and not valid):  # the heading
            continue
        if not valid:
            raise InputError(
                f"{qrels}, line {number}: query, document and grade (a whole number) are due, by tabs."
            )
        grades.setdefault(parts[0], {})[parts[1]] = int(parts[2])
    return grades


def _records(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """Documents or queries; their ``id`` is a string, whether it was ``_id`` or ``id``."""
    seen: set[str] = set()
    with open_binary(path) as stream:
        for number, row in numbered_json_lines(stream, str(path)):
            where = f"{path}, line {number}"
            record = dict(_checked(row, ("text",), where))
            name = record.get("_id", record.get("id"))
            if name is None:
                raise InputError(f"{where}: there is no field '_id'.")
            if str(name) in seen:
                raise InputError(f"{where}: there is a {what} '{name}' already.")
            seen.add(str(name))
            yield {**record, "id": str(name)}
