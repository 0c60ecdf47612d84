"""Entity recognition: decoding, windows, offsets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, IOBES, Entities

import edgelm
from edgelm import samples
from edgelm.errors import InputError
from edgelm.models import load_model
from edgelm.runtimes.labels import softmax, spans, transitions, viterbi
from edgelm.runtimes.ner import EntityRecognizer

Bundles = Callable[..., Path]
BIO = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
BIOES = ("O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC", "E-LOC", "S-LOC")


def test_transitions_of_bio() -> None:
    start, allowed, end = transitions(BIO)
    assert end.all()
    assert start.tolist() == [True, True, False, True, False]
    assert allowed[0].tolist() == [True, True, False, True, False]
    assert allowed[1].tolist() == [True, True, True, True, False]
    assert allowed[2].tolist() == [True, True, True, True, False]


def test_transitions_of_bioes_and_bilou() -> None:
    start, allowed, end = transitions(BIOES)
    assert [BIOES[i] for i in np.flatnonzero(end)] == [
        "O",
        "E-PER",
        "S-PER",
        "E-LOC",
        "S-LOC",
    ]
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
        start, allowed, end = transitions(labels)
        assert start.all()
        assert end.all()
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
    start, allowed, end = transitions(labels)

    def legal(path: tuple[int, ...]) -> bool:
        inner = all(allowed[a, b] for a, b in itertools.pairwise(path))
        return bool(start[path[0]]) and inner and bool(end[path[-1]])

    paths = [p for p in itertools.product(range(len(labels)), repeat=words) if legal(p)]
    best = max(paths, key=lambda p: sum(scores[i, k] for i, k in enumerate(p)))
    assert viterbi(scores, start, allowed, end) == list(best)


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
    path = viterbi(draw.normal(0, 2, (words, len(labels))), *transitions(labels))
    named = [labels[k] for k in path]
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


STRANGE = [
    "",
    " \n\t ",
    "🙂🙂 Ada Lovelace 👩‍👩‍👧‍👦 visited 東京 (Tokyo).",
    "مرحبا Berlin بالعالم Angela Merkel",
    "[SEP] Paris ##ing U.N. x\u0000y Saint-Étienne's O'Neill",
    "Bernhardsdotterwitzenstein of Llanfairpwllgwyngyll and Microsoft-Windows",
]


@pytest.fixture(scope="module")
def pipelines() -> Callable[[str], Any]:
    """The token-classification pipeline of transformers on the weights of minilm-ner."""
    from transformers import TokenClassificationPipeline

    base = load_model("minilm-ner")

    def get(strategy: str) -> Any:
        return TokenClassificationPipeline(
            model=base.model.float().eval(),
            tokenizer=base.tokenizer,
            aggregation_strategy=strategy,
            device="cpu",
        )

    return get


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_strategies_are_those_of_the_transformers_pipeline(
    bundles: Bundles, pipelines: Callable[[str], Any], strategy: Any
) -> None:
    """On real text, entities, places and scores; without constraints, as there."""
    texts = [row["text"] for row in samples.ner()[::4]] + STRANGE
    model = edgelm.load(bundles("minilm-ner"))
    assert isinstance(model, EntityRecognizer)
    found = model.extract(texts, strategy=strategy, constrained=False)
    label = "entity" if strategy == "none" else "entity_group"
    pipeline = pipelines(strategy)
    entities = 0
    for text, row in zip(texts, found, strict=True):
        due = pipeline(text)
        entities += len(due)
        assert [(e.start, e.end, e.label) for e in row] == [
            (d["start"], d["end"], d[label]) for d in due
        ], text
        np.testing.assert_allclose(
            [e.score for e in row], [d["score"] for d in due], atol=1e-4
        )
    assert entities > 30


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_given_words_are_those_of_the_transformers_pipeline(
    bundles: Bundles, pipelines: Callable[[str], Any], strategy: Any
) -> None:
    rows = [row["text"].split() for row in samples.ner()[:8]]
    model = edgelm.load(bundles("minilm-ner"))
    assert isinstance(model, EntityRecognizer)
    # The pipeline's own words are the tokenizer's: where a word has a part of
    # punctuation they differ, by intent, so these are left out here.
    rows = [[word for word in row if word.isalnum()] for row in rows]
    found = model.extract(rows, strategy=strategy, constrained=False)
    label = "entity" if strategy == "none" else "entity_group"
    for words, row in zip(rows, found, strict=True):
        (due,) = pipelines(strategy)(words, is_split_into_words=True)
        assert [(e.start, e.end, e.label) for e in row] == [
            (d["start"], d["end"], d[label]) for d in due
        ]
        np.testing.assert_allclose(
            [e.score for e in row], [d["score"] for d in due], atol=1e-4
        )


def test_a_combining_mark_does_not_split_a_word(bundles: Bundles) -> None:
    """The pipeline of transformers compares lengths of strings, and takes é in two characters for the end of a word."""
    model = edgelm.load(bundles("minilm-ner"))
    assert isinstance(model, EntityRecognizer)
    text = "Mario lives in Saint-E\u0301tienne near Lyon."
    for entity in model.extract([text])[0]:
        assert text[entity.end : entity.end + 1] in ("", " ", ".", "-")


def reference_rows(model: EntityRecognizer, text: str, strategy: str) -> list[Any]:
    """Words by loops: per word of the tokenizer, offsets and probabilities."""
    encoding = model.engine.tokenize([text])[0]
    (logits,) = model.engine.run([encoding])
    words: dict[int, list[int]] = {}
    for token, word in enumerate(encoding.word_ids):
        if word is not None:
            words.setdefault(word, []).append(token)
    rows = []
    for tokens in words.values():
        p = [softmax(logits[t].astype(np.float64)) for t in tokens]
        pooled = {
            "first": p[0],
            "average": sum(p[1:], p[0]) / len(p),
            "max": max(p, key=lambda row: row.max()),
        }[strategy]
        rows.append(pooled)
    return rows


@pytest.mark.parametrize("strategy", ["first", "average", "max"])
def test_pooling_over_tokens_is_the_loops(
    recognizer: EntityRecognizer, strategy: Any
) -> None:
    model = recognizer
    rng = np.random.default_rng(3)
    size = len(model.engine.tokenizer.get_vocab())
    model.engine.session = FromTable(rng.normal(0, 3, (size, 5)).astype(np.float32))
    text = "unable man plays readsing runs newerly anna peter"
    rows = reference_rows(model, text, strategy)
    best = [int(row.argmax()) for row in rows]
    due = [
        (label, np.mean([rows[i][best[i]] for i in range(a, b)]))
        for a, b, label in spans([BIO[k] for k in best])
    ]
    found = model.extract([text], strategy=strategy, constrained=False)[0]
    assert [e.label for e in found] == [label for label, _ in due]
    np.testing.assert_allclose([e.score for e in found], [s for _, s in due])


def test_places_in_bytes_and_in_utf16(recognizer: EntityRecognizer) -> None:
    text = "🙂 é anna 東京 peter ٣ paris\u0301"
    points = recognizer.extract([text])[0]
    assert len(points) >= 3
    for units, encoding, size in (("utf-8", "utf-8", 1), ("utf-16", "utf-16-le", 2)):
        found = recognizer.extract([text], units=units)[0]  # type: ignore[arg-type]
        data = text.encode(encoding)
        for a, b in zip(points, found, strict=True):
            cut = data[b.start * size : b.end * size].decode(encoding)
            assert cut == a.text == b.text == text[a.start : a.end]


def test_given_words_are_kept_whole(recognizer: EntityRecognizer) -> None:
    words = ["the", "un-able", "man", "", "anna", "peter", "  paris", "!"]
    found = recognizer.extract([words], units="words")[0]
    assert [(e.start, e.end, e.label) for e in found] == [
        (1, 2, "PER"),
        (4, 6, "PER"),
        (6, 7, "LOC"),
    ]
    joined = " ".join(words)
    for entity in recognizer.extract([words, "the"])[0]:
        assert joined[entity.start : entity.end] == entity.text
    assert recognizer.extract([[]], units="words") == [[]]


def test_thresholds_of_types(recognizer: EntityRecognizer) -> None:
    text = ["anna the paris"]
    assert [e.label for e in recognizer.extract(text)[0]] == ["PER", "LOC"]
    assert recognizer.extract(text, thresholds=1.0) == [[]]
    for strategy in ("first", "none"):
        only = recognizer.extract(text, strategy=strategy, thresholds={"PER": 1.0})[0]  # type: ignore[arg-type]
        assert [e.label for e in only] == ["LOC" if strategy == "first" else "B-LOC"]
    with pytest.raises(InputError, match=r"no type 'GPE'.*PER, LOC"):
        recognizer.extract(text, thresholds={"GPE": 0.5})


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ("anna", {}, "write \\[text\\] instead"),
        ([3], {}, "Text 0 must be a string or a list of words"),
        ([["anna", 3]], {}, "Text 0 must be a string or a list of words"),
        (["anna"], {"strategy": "last"}, "must be one of none, simple"),
        (["anna"], {"units": "bytes"}, "must be one of code-points, utf-8"),
        (["anna"], {"units": "words"}, "need texts that are lists of words"),
        (["anna"], {"thresholds": float("nan")}, "must be a number. Got nan"),
        (["anna"], {"thresholds": {"PER": None}}, "must be a number. Got None"),
        (["anna", "a\ud800"], {}, "Text 1 holds half of a surrogate pair"),
    ],
)
def test_what_cannot_be_used_is_refused(
    recognizer: EntityRecognizer, texts: Any, settings: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        recognizer.extract(texts, **settings)


def test_a_type_without_a_begin_may_begin_with_an_inside() -> None:
    start, allowed, end = transitions(("O", "I-PER", "B-LOC", "I-LOC"))
    assert start.tolist() == [True, True, True, False]
    assert allowed[0].tolist() == [True, True, True, False]
    assert end.all()


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    words=st.lists(st.sampled_from(["anna", "unable", "newerly", "()"]), max_size=90),
    strategy=st.sampled_from(["none", "simple", "first", "average", "max"]),
    stride=st.integers(0, 20),
    seed=st.integers(0, 99),
    split=st.booleans(),
)
def test_windows_of_any_stride_give_what_one_pass_gives(
    recognizer: EntityRecognizer,
    words: list[str],
    strategy: Any,
    stride: int,
    seed: int,
    split: bool,
) -> None:
    """For every strategy, where a token's logits do not depend on its neighbours."""
    size = len(recognizer.engine.tokenizer.get_vocab())
    table = np.random.default_rng(seed).normal(0, 3, (size, 5)).astype(np.float32)
    recognizer.engine.session = FromTable(table)
    texts: list[Any] = [words if split else " ".join(words)]
    try:
        recognizer.engine.tokenizer.enable_truncation(32, stride=stride)
        windowed = recognizer.extract(texts, strategy=strategy)
        recognizer.engine.tokenizer.enable_truncation(100_000)
        assert windowed == recognizer.extract(texts, strategy=strategy)
    finally:
        recognizer.engine.tokenizer.enable_truncation(32, stride=8)


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> EntityRecognizer:
    """A tokenizer that makes tokens of white space alone, as RoBERTa's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForTokenClassification,
    )

    from edgelm.evaluate.reference import open_reference

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["Ada wrote in London"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", model_max_length=64
    )
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=66,
        id2label=dict(enumerate(["O", "B-PER", "I-PER"])),
    )
    model = RobertaForTokenClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.constant_(model.classifier.bias[0], -9)  # everything is an entity
    folder = tmp_path_factory.mktemp("spaced")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    opened = open_reference(str(folder))
    assert isinstance(opened, EntityRecognizer)
    return opened


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("constrained", [True, False])
def test_white_space_is_no_entity_and_ends_none(
    spaced: EntityRecognizer, strategy: Any, constrained: bool
) -> None:
    texts = ["Ada  wrote", "  Ada ", "Ada\r\n\r\nwrote\u00a0\u2003", "   ", " \n🙂  é"]
    given = spaced.extract(texts, strategy=strategy, constrained=constrained)
    for text, entities in zip(texts, given, strict=True):
        for entity in entities:
            assert entity.text == text[entity.start : entity.end] != ""
            assert entity.text == entity.text.strip()
        covered = {i for e in entities for i in range(e.start, e.end)}
        assert covered >= {i for i, c in enumerate(text) if not c.isspace()}
