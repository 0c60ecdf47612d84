"""Entity recognition: decoding, windows, offsets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, IOBES, Entities

import edgelm
from edgelm.runtimes.ner import EntityRecognizer, softmax, spans, transitions, viterbi

Bundles = Callable[..., Path]
BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
BIOES = ("O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC", "E-LOC", "S-LOC")


def test_transitions_of_bio() -> None:
    start, allowed = transitions(BIO)
    assert start.tolist() == [True, True, False, True, False]
    assert allowed[0].tolist() == [True, True, False, True, False]
    assert allowed[1].tolist() == [True, True, True, True, False]
    assert allowed[2].tolist() == [True, True, True, True, False]


def test_transitions_of_bioes_and_bilou() -> None:
    start, allowed = transitions(BIOES)
    assert [BIOES[i] for i in np.flatnonzero(start)] == [
        "O",
        "B-PER",
        "S-PER",
        "B-LOC",
        "S-LOC",
    ]
    assert [BIOES[i] for i in np.flatnonzero(allowed[1])] == ["I-PER", "E-PER"]
    assert [BIOES[i] for i in np.flatnonzero(allowed[3])] == [
        "O",
        "B-PER",
        "S-PER",
        "B-LOC",
        "S-LOC",
    ]
    bilou = [label.replace("E-", "L-").replace("S-", "U-") for label in BIOES]
    assert np.array_equal(transitions(bilou)[1], allowed)


def test_io_allows_everything() -> None:
    for labels in (("O", "I-PER", "I-LOC"), ("O", "PER", "LOC")):
        start, allowed = transitions(labels)
        assert start.all()
        assert allowed.all()


@settings(max_examples=80, deadline=None)
@given(
    words=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    labels=st.sampled_from([BIO, BIOES[:5]]),
)
def test_viterbi_is_the_best_of_all_allowed_paths(
    words: int, seed: int, labels: tuple[str, ...]
) -> None:
    scores = np.log(
        softmax(np.random.default_rng(seed).normal(0, 2, (words, len(labels))))
    )
    start, allowed = transitions(labels)

    def legal(path: tuple[int, ...]) -> bool:
        return bool(start[path[0]]) and all(
            allowed[a, b] for a, b in itertools.pairwise(path)
        )

    paths = [p for p in itertools.product(range(len(labels)), repeat=words) if legal(p)]
    best = max(paths, key=lambda p: sum(scores[i, k] for i, k in enumerate(p)))
    assert viterbi(scores, start, allowed) == list(best)


def test_viterbi_of_nothing() -> None:
    assert viterbi(np.zeros((0, 5)), *transitions(BIO)) == []


@settings(max_examples=200, deadline=None)
@given(labels=st.lists(st.sampled_from(BIO), max_size=10))
def test_spans_of_bio_are_those_of_seqeval(labels: list[str]) -> None:
    due = [(a, b + 1, kind) for kind, a, b in get_entities(labels)]
    assert spans(labels) == due


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    words=st.integers(1, 10),
    labels=st.sampled_from([BIO, BIOES]),
)
def test_spans_of_well_formed_labels_are_those_of_strict_seqeval(
    seed: int, words: int, labels: tuple[str, ...]
) -> None:
    draw = np.random.default_rng(seed)
    start, allowed = transitions(labels)
    path = viterbi(draw.normal(0, 2, (words, len(labels))), start, allowed)
    named = [labels[k] for k in path]
    if labels == BIOES and named[-1][0] in "BI":
        named[-1] = ("S" if named[-1][0] == "B" else "E") + named[-1][1:]
    found = Entities([named], scheme=IOB2 if labels == BIO else IOBES)
    due = [(e.start, e.end, e.tag) for e in found.entities[0]]
    assert spans(named) == due


class FromTable:
    """A session that gives each token the logits of its id."""

    provider = runtime = "table"
    batch_tokens = 512
    length_step = 1

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.longest = 0

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.longest = max(self.longest, feeds["input_ids"].shape[1])
        return {"logits": self.table[feeds["input_ids"]]}


@pytest.fixture
def recognizer(bundles: Bundles) -> EntityRecognizer:
    """The tiny recogniser with a session that knows paris, london, anna and peter."""
    model = edgelm.load(bundles("ner"))
    assert isinstance(model, EntityRecognizer)
    vocabulary = model.engine.tokenizer.get_vocab()
    table = np.zeros((len(vocabulary), 5), np.float32)
    table[:, 0] = 5
    for word, label in (
        ("anna", 1),
        ("peter", 2),
        ("paris", 3),
        ("london", 3),
        ("un", 1),
        ("##able", 4),
    ):
        table[vocabulary[word]] = 0
        table[vocabulary[word], label] = 9
    model.engine.session = FromTable(table)
    return model


def found(recognizer: EntityRecognizer, text: str) -> list[tuple[str, str]]:
    entities = recognizer.extract([text])[0]
    assert all(text[e.start : e.end] == e.text for e in entities)
    assert all(0 <= e.score <= 1 for e in entities)
    return [(e.text, e.label) for e in entities]


def test_offsets_point_into_the_text_as_given(recognizer: EntityRecognizer) -> None:
    assert found(recognizer, "  The man ANNA Peter, in\tPARIS!") == [
        ("ANNA Peter", "PER"),
        ("PARIS", "LOC"),
    ]
    assert found(recognizer, "🙂🙂 é anna 東京 (paris)") == [
        ("anna", "PER"),
        ("paris", "LOC"),
    ]
    assert found(recognizer, "") == []
    assert found(recognizer, "the man") == []


def test_the_first_token_of_a_word_speaks_for_it(recognizer: EntityRecognizer) -> None:
    assert found(recognizer, "the unable man") == [("unable", "PER")]


def test_an_inside_is_never_left_without_its_begin(
    recognizer: EntityRecognizer,
) -> None:
    """Sure of "peter" as an inside, the best legal path begins one word earlier."""
    assert found(recognizer, "anna peter") == [("anna peter", "PER")]
    assert found(recognizer, "the peter") == [("the peter", "PER")]


def test_a_long_text_is_read_whole(recognizer: EntityRecognizer) -> None:
    text = "the old man reads . " * 40 + "anna peter " + "the river , " * 50 + "paris"
    assert found(recognizer, text) == [("anna peter", "PER"), ("paris", "LOC")]
    session = recognizer.engine.session
    assert isinstance(session, FromTable)
    assert session.longest == 32


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    words=st.lists(
        st.sampled_from(["the", "anna", "peter", "paris", ",", "unable", "man"]),
        max_size=120,
    )
)
def test_windows_give_what_one_pass_gives(
    recognizer: EntityRecognizer, words: list[str]
) -> None:
    """Where a token's label does not depend on context, windows must not matter."""
    text = " ".join(words)
    windowed = recognizer.extract([text])[0]
    recognizer.engine.tokenizer.enable_truncation(100_000)
    try:
        assert windowed == recognizer.extract([text])[0]
    finally:
        recognizer.engine.tokenizer.enable_truncation(32, stride=8)


def test_several_texts_of_several_windows_keep_their_order(
    recognizer: EntityRecognizer,
) -> None:
    texts = ["anna", "the man " * 60 + "paris", "", "london " + "the " * 90]
    labels = [[(e.text, e.label) for e in row] for row in recognizer.extract(texts)]
    assert labels == [[("anna", "PER")], [("paris", "LOC")], [], [("london", "LOC")]]
