"""Few-shot entity recognition: votes, context, the index of words, the commands and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.bundle import TOKENS, open_bundle
from edgelm.cli import cli
from edgelm.codes.config import BinaryCodes
from edgelm.codes.words import LabelledWords, _left_out, build_word_index
from edgelm.errors import BinaryIndexError, BundleError, InputError
from edgelm.runtimes.engine import Engine, open_engine
from edgelm.runtimes.few_shot import (
    WORDS,
    FewShotRecognizer,
    Voting,
    combine,
    guesses,
    in_context,
    votes,
    word_vectors,
)
from edgelm.runtimes.index import BinaryIndex
from tests.conftest import export_bundle

Bundles = Callable[..., Path]
SENTENCES = [
    ("anna plays in paris", ["anna", "paris"], ["PER", "LOC"]),
    ("peter reads in london", ["peter", "london"], ["PER", "LOC"]),
    ("the man plays the flute", [], []),
    ("the old woman sings in the garden", [], []),
    ("anna peter writes the book", ["anna peter"], ["PER"]),
]
CONFIG = LabelledWords(codes=BinaryCodes(bits=64, iterations=5))


def labelled(sentences: Any = SENTENCES) -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "entities": [
                {"start": text.index(e), "end": text.index(e) + len(e), "label": kind}
                for e, kind in zip(entities, kinds, strict=True)
            ],
        }
        for text, entities, kinds in sentences
    ]


@pytest.fixture(scope="module", params=["embedding", "ner"])
def bundle(
    request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("tokens") / request.param
    return export_bundle(
        str(tiny(request.param)), path, precision="fp32", token_embeddings=1
    )


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return open_engine(open_bundle(bundle))


@pytest.fixture(scope="module")
def index(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "words"
    build_word_index(path, engine, labelled(), CONFIG)
    return path


def invoke(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_what_was_labelled_is_found_again(engine: Engine, index: Path) -> None:
    recognizer = FewShotRecognizer(engine, index)
    texts = [text for text, _, _ in SENTENCES]
    for row, found in zip(labelled(), recognizer.extract(texts), strict=True):
        due = {(e["start"], e["end"], e["label"]) for e in row["entities"]}
        assert {(e.start, e.end, e.label) for e in found} == due
        assert all(0 < e.score <= 1 for e in found)
        assert all(e.text == row["text"][e.start : e.end] for e in found)
    assert recognizer.extract(["", "   "]) == [[], []]
    assert recognizer.extract([]) == []


def test_a_word_is_the_mean_of_its_tokens_also_over_windows(engine: Engine) -> None:
    encoding = engine.tokenize(["uning paris"])[0]
    (rows,) = engine.run([encoding], TOKENS)
    (words,) = word_vectors(engine, ["uning paris"])
    assert words.offsets.tolist() == [[0, 5], [6, 11]]
    assert encoding.word_ids == [None, 0, 0, 1, None]
    np.testing.assert_allclose(words.vectors[0], rows[1:3].mean(axis=0), rtol=1e-6)
    long = " ".join(["paris", "reads", "uning"] * 40)
    (words,) = word_vectors(engine, [long])
    assert [long[a:b] for a, b in words.offsets] == long.split()
    windows = engine.tokenize([long])[0]
    windows = [windows, *windows.overflowing]
    if engine.manifest.task == "embedding":  # its windows do not overlap
        held = dict[int, list[Any]]()
        for window, its in zip(windows, engine.run(windows, TOKENS), strict=True):
            for word, row in zip(window.word_ids, its, strict=True):
                if word is not None:
                    held.setdefault(word, []).append(row)
        due = [np.mean(held[word], axis=0) for word in range(120)]
        np.testing.assert_allclose(words.vectors, due, rtol=1e-5, atol=1e-6)
    assert words.vectors.shape == (120, rows.shape[1])
    assert len(windows) > 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), k=st.integers(1, 5))
def test_votes_are_what_a_loop_counts(seed: int, n: int, k: int) -> None:
    draw = np.random.default_rng(seed)
    labels, scores = draw.integers(0, 3, (n, k)), draw.normal(size=(n, k))
    voting = Voting(temperature=0.5)
    found = votes(labels, scores.astype(np.float32), 3, voting)
    for i in range(n):
        weights = np.exp(scores[i] / 0.5)
        due = [weights[labels[i] == c].sum() / weights.sum() for c in range(3)]
        np.testing.assert_allclose(found[i], 0.99 * np.array(due) + 0.01 / 3, atol=1e-5)


def test_the_weight_of_outside_moves_words_into_entities() -> None:
    cast = np.array([[0.6, 0.4, 0.0]]) + 1e-3
    even = guesses(np.zeros((1, 3)), Voting())
    assert combine(cast, even, Voting())[0].argmax() == 0
    assert combine(cast, even, Voting(outside=0.5))[0].argmax() == 1
    sure = guesses(np.array([[0.0, 0.0, 1.0]]), Voting())
    assert combine(cast, sure, Voting(probe=0.0))[0].argmax() == 0


def test_context_is_both_neighbours_and_of_length_one() -> None:
    rows = in_context(np.eye(3, dtype=np.float32) * 7, 0.5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    middle = rows[1] * np.sqrt(1.5)
    due = [0, 1, 0, 0.5, 0, 0, 0, 0, 0.5]
    np.testing.assert_allclose(middle, due, atol=1e-6)
    assert not rows[0, 3:6].any()
    assert not rows[2, 6:].any()


def test_leaving_a_sentence_out_is_fitting_without_it() -> None:
    draw = np.random.default_rng(0)
    wide, due = draw.normal(size=(30, 5)), draw.normal(size=(30, 2))
    sentences = [slice(0, 7), slice(7, 8), slice(8, 30)]

    def inverse(rows: Any) -> Any:
        return np.linalg.inv(rows.T @ rows + 0.3 * np.eye(5))

    whole = inverse(wide)
    found = _left_out(wide, whole, due, wide @ whole @ wide.T @ due, sentences)
    for its in sentences:
        rest = np.ones(30, bool)
        rest[its] = False
        without = inverse(wide[rest]) @ wide[rest].T @ due[rest]
        np.testing.assert_allclose(found[its], wide[its] @ without, atol=1e-9)


def test_another_bundle_is_refused(index: Path, bundles: Bundles) -> None:
    other = open_engine(open_bundle(bundles("embedding")))
    with pytest.raises(BundleError, match="no output token_embeddings"):
        FewShotRecognizer(other, index)


def test_the_same_model_with_another_layer_is_refused(
    bundle: Path, index: Path, tiny: Any, tmp_path: Path
) -> None:
    if bundle.name != "embedding":
        return  # once is enough
    path = export_bundle(
        str(tiny("embedding")), tmp_path / "last", token_embeddings=-1, precision="fp32"
    )
    with pytest.raises(BinaryIndexError, match="were made by"):
        FewShotRecognizer(open_engine(open_bundle(path)), index)


@pytest.mark.parametrize("name", ["codes", "records", "rows", "factors", WORDS])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_index_is_refused(
    engine: Engine, index: Path, tmp_path: Path, name: str, damage: str
) -> None:
    copy = shutil.copytree(index, tmp_path / "copy")
    file = copy / "data-0" / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    else:
        del data[-1]
    file.write_bytes(data)
    with pytest.raises(BinaryIndexError, match=r"damaged|truncated"):
        FewShotRecognizer(engine, copy)


def test_a_newer_index_of_words_is_refused_by_name(
    engine: Engine, index: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(index, tmp_path / "copy")
    opened = BinaryIndex(copy)
    data = opened.path_of(WORDS).read_bytes()
    newer = data.replace(b'"version":"1"', b'"version":"2"')
    assert newer != data
    with opened.writer() as writer:
        (copy / "words.new").write_bytes(newer)
        writer.attach(WORDS, copy / "words.new")
    with pytest.raises(BinaryIndexError, match="have version 2"):
        FewShotRecognizer(engine, copy)


def test_an_index_of_texts_is_no_index_of_words(engine: Engine, tmp_path: Path) -> None:
    from edgelm.runtimes.few_shot import encoder_info

    BinaryIndex.create(tmp_path / "i", 64, encoder=encoder_info(engine.manifest))
    with pytest.raises(BinaryIndexError, match="no index of words"):
        FewShotRecognizer(engine, tmp_path / "i")


def test_sentences_can_be_deleted_and_the_index_compacted(
    engine: Engine, index: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(index, tmp_path / "copy")
    opened = BinaryIndex(copy)
    opened.delete([f"1.{k}" for k in range(4)])
    before = FewShotRecognizer(engine, copy).extract(["anna plays in paris"])
    opened.compact()
    assert FewShotRecognizer(engine, copy).extract(["anna plays in paris"]) == before


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        ([{"start": 0, "end": 99, "label": "PER"}], "covers no word"),
        ([{"start": 4, "end": 5, "label": "PER"}], "covers no word"),
        (
            [
                {"start": 0, "end": 4, "label": "A"},
                {"start": 2, "end": 8, "label": "B"},
            ],
            "overlaps another",
        ),
        ([{"start": 0, "label": "PER"}], "needs start, end and label"),
        ([{"start": 0, "end": 4}], "needs start, end and label"),
        ([], "no entity"),
    ],
)
def test_bad_labels_are_named_and_leave_nothing(
    engine: Engine, tmp_path: Path, entities: Any, message: str
) -> None:
    rows = [{"text": "anna plays", "entities": entities}]
    with pytest.raises(InputError, match=message):
        build_word_index(tmp_path / "words", engine, rows, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_single_sentence_is_enough(engine: Engine, tmp_path: Path) -> None:
    config = replace(CONFIG, choose=True)
    built = build_word_index(tmp_path / "words", engine, labelled()[:1], config)
    assert built.held_out_f1 is None
    (found,) = FewShotRecognizer(engine, tmp_path / "words").extract(["anna plays"])
    assert all(entity.label in ("PER", "LOC") for entity in found)


def test_the_commands(bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in labelled()), "utf-8")
    words = tmp_path / "words"
    made = invoke("ner-index", "build", data, "--bundle", bundle, "-o", words, "--json")
    assert made.exit_code == 0, made.output
    about = json.loads(made.stdout)
    assert (about["sentences"], about["entities"]) == (5, 5)
    assert about["types"] == ["LOC", "PER"]
    again = invoke("ner-index", "build", data, "--bundle", bundle, "-o", words)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    text = "anna plays in paris"
    result = invoke("run", bundle, "--ner-index", words, text)
    row = json.loads(result.stdout)
    assert row["text"] == text
    assert [(e["text"], e["label"]) for e in row["entities"]] == [
        ("anna", "PER"),
        ("paris", "LOC"),
    ]
    assert set(row["entities"][0]) == {"start", "end", "label", "score", "text"}
    plain = invoke("run", bundle, "--ner-index", tmp_path / "none", text)
    assert plain.exit_code == 1
    assert "is not an index" in plain.stderr


def test_data_that_names_no_entities_is_refused(bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"text1": "a", "text2": "b", "score": 1}\n', "utf-8")
    result = invoke(
        "ner-index", "build", data, "--bundle", bundle, "-o", tmp_path / "x"
    )
    assert result.exit_code == 1
    assert "text and entities" in result.stderr


def test_scorers_give_no_tokens(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(edgelm.errors.ExportError, match="scores texts"):
        export_bundle(str(tiny("scorer")), tmp_path / "b", token_embeddings=-1)
    with pytest.raises(edgelm.errors.ExportError, match="has 2 layers"):
        export_bundle(str(tiny("embedding")), tmp_path / "b", token_embeddings=3)
