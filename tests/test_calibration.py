"""Texts in, batches out."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from edgelm import samples
from edgelm.calibration import (
    Calibration,
    as_pairs,
    load_texts,
    make_batches,
    read_texts,
    text_digest,
)
from edgelm.errors import ConfigError, InputError
from edgelm.models import load_model
from edgelm.pipeline import calibration_batches
from tests.conftest import tiny_tokenizer

LINES = [
    "first text",
    "zweiter Text mit Umlaut ü",
    "三番目",
    "with \u2028 line separator",
]


def write(path: Path) -> Path:
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith(".txt"):
        text = "\n".join(LINES) + "\n"
    else:
        text = "".join(
            json.dumps({"text": t, "id": 1}, ensure_ascii=False) + "\n" for t in LINES
        )
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"]
)
def test_every_form_of_file(tmp_path: Path, name: str) -> None:
    assert list(read_texts(write(tmp_path / name))) == LINES


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.txt",
            b"fine\nbad \xff byte\n",
            "line 2: byte 0xff at position 5 is not UTF-8",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": 3}\n',
            'line 2: there is no string field "text"',
        ),
        ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", 'line 1: there is no string field "text"'),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(read_texts(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read .*none\.txt: No such file"):
        list(read_texts(tmp_path / "none.txt"))


def test_a_file_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "good"}\nbroken\n')
    assert next(read_texts(path)) == "good"


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "e.txt").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="holds no text"):
        load_texts(Calibration(texts=str(tmp_path / "e.txt")))


def test_the_draw_is_seeded_fair_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "n.txt"
    path.write_text("".join(f"{i:03}\n" for i in range(50)), encoding="utf-8")
    counts: Counter[str] = Counter()
    for seed in range(400):
        drawn = load_texts(Calibration(str(path), max_texts=10, seed=seed))
        assert drawn == sorted(drawn)
        assert len(set(drawn)) == 10
        counts.update(drawn)
    assert load_texts(Calibration(str(path), 10, seed=3)) == load_texts(
        Calibration(str(path), 10, seed=3)
    )
    # 400 draws of 1 in 5: 80 expected, standard deviation 8.
    assert len(counts) == 50
    assert max(abs(n - 80) for n in counts.values()) < 40


@pytest.mark.parametrize("field", ["max_texts", "max_tokens"])
def test_parameters_out_of_range(field: str) -> None:
    with pytest.raises(ConfigError, match=f"'{field}'"):
        Calibration(**{field: 0})


def test_batches_hold_every_text_once_with_its_own_length() -> None:
    tokenizer = tiny_tokenizer()
    texts = [
        "the man",
        "a",
        "the old woman plays the flute , and the man sings .",
        "",
    ] * 3
    rows = []
    for batch in make_batches(texts, tokenizer, max_tokens=8, batch_tokens=20):
        assert batch.input_ids.shape == batch.attention_mask.shape
        assert batch.input_ids.numel() <= 20
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            length = int(mask.sum())
            assert bool((mask[:length] == 1).all())
            assert bool((ids[length:] == tokenizer.pad_token_id).all())
            rows.append(tuple(ids[:length].tolist()))
    due = tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert Counter(rows) == Counter(map(tuple, due))


@pytest.mark.parametrize("texts", [["one"], ["a b c", "d"], ["x y", "z", "u v w"]])
def test_pairs_hold_every_text_and_two_texts_each(texts: list[str]) -> None:
    pairs = as_pairs(texts)
    assert len(pairs) == len(texts)
    for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        assert all(pair)
        if i % 2 == 0 and " " in text:
            assert " ".join(pair) == text
        else:
            assert pair == (text, texts[(i + 1) % len(texts)])


def test_a_model_that_scores_pairs_is_calibrated_on_pairs(tiny_scorer: Path) -> None:
    loaded = load_model(str(tiny_scorer))
    texts = ["the man plays", "paris", "an old book of the river"]
    (batch,) = calibration_batches(loaded, texts, Calibration(max_tokens=32))
    assert batch.token_type_ids is not None
    for ids, mask, kinds in zip(
        batch.input_ids, batch.attention_mask, batch.token_type_ids, strict=True
    ):
        separators = (ids == loaded.tokenizer.sep_token_id).nonzero().flatten().tolist()
        assert len(separators) == 2
        assert kinds.nonzero().flatten().tolist() == list(
            range(separators[0] + 1, int(mask.sum()))
        )


def test_the_digest_tells_texts_apart() -> None:
    assert text_digest(["a", "b"]) != text_digest(["ab"])
    assert text_digest(["a", "b"]) == text_digest(iter(["a", "b"]))  # type: ignore[arg-type]


def test_the_built_in_sample_is_what_it_says() -> None:
    texts = samples.calibration()
    assert 1300 <= len(texts) <= 1500
    assert len(set(texts)) == len(texts)
    words = sorted(len(text.split()) for text in texts)
    assert sum(5 <= n <= 180 for n in words) >= 0.97 * len(
        words
    )  # Chinese has no spaces
    assert words[len(words) // 4] < 20
    assert words[-len(words) // 10] > 80


def test_the_labelled_samples_hold_together() -> None:
    for row in samples.ner():
        for entity in row["entities"]:
            assert row["text"][entity["start"] : entity["end"]].strip()
            assert entity["label"] in {"PER", "LOC", "ORG", "MISC"}
    assert all(0 <= row["score"] <= 5 for row in samples.similarity())
    rows = samples.search()
    documents = {row["id"] for row in rows if row["type"] == "document"}
    queries = [row for row in rows if row["type"] == "query"]
    assert all(set(row["relevant"]) <= documents and row["relevant"] for row in queries)


@pytest.mark.parametrize(
    ("weighting", "embedding", "ner"),
    [("auto", True, False), ("text", True, True), ("token", False, False)],
)
def test_what_counts_alike_in_calibration(
    tiny_embedding: Path, tiny_ner: Path, weighting: Any, embedding: bool, ner: bool
) -> None:
    texts = ["the man plays a flute", "paris"]
    calibration = Calibration(weighting=weighting)
    for folder, by_text in ((tiny_embedding, embedding), (tiny_ner, ner)):
        loaded = load_model(str(folder))
        (batch,) = calibration_batches(loaded, texts, calibration)
        total = batch.weights.sum(dim=1)
        lengths = batch.attention_mask.sum(dim=1).float()
        assert total.tolist() == pytest.approx([1, 1] if by_text else lengths.tolist())
        assert bool(((batch.weights > 0) == (batch.attention_mask > 0)).all())
