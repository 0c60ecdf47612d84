"""Binary Paragraph Vectors: on tiny texts of two topics, and against slow references."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.cli import cli
from edgelm.codes.paragraph import (
    ParagraphVectors,
    Rounding,
    Trained,
    build_vocabulary,
    negative_log_likelihood,
    term_weights,
    train,
)
from edgelm.errors import BundleError, ConfigError, InputError
from edgelm.runtimes.paragraph import (
    ABOUT,
    ARRAYS,
    Counts,
    Vocabulary,
    load_paragraph_coder,
    save_paragraph_coder,
    split_words,
)

TOPICS = (
    "river garden winter tree leaf rain stone bird",
    "engine motor wheel brake road tyre fuel gear",
)
SMALL = ParagraphVectors(
    bits=16, min_texts=2, frequent=1.0, ridge=0.5, epochs=60, batch=16, steps=40
)


def texts_of(topic: int, count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng([seed, topic])
    return [" ".join(draw.choice(TOPICS[topic].split(), 12)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train([*texts_of(0, 40), *texts_of(1, 40)], SMALL)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.unpackbits(a[:, None] ^ b[None], axis=2).sum(axis=2)


def test_two_topics_separate(trained: Trained) -> None:
    codes = [trained.coder.encode(texts_of(topic, 20, seed=1)) for topic in (0, 1)]
    for topic, own in enumerate(codes):
        to_own = distances(own, trained.codes[40 * topic : 40 * topic + 40]).mean()
        to_other = distances(own, trained.codes[40 - 40 * topic :][:40]).mean()
        assert to_own + 3 < to_other


def test_an_inferred_code_is_near_the_trained_one(trained: Trained) -> None:
    texts = [*texts_of(0, 40), *texts_of(1, 40)]
    again = trained.coder.encode(texts)
    own = np.unpackbits(again ^ trained.codes, axis=1).sum(axis=1).mean()
    assert own < distances(again, trained.codes).mean() / 2


def test_training_lowers_the_loss_and_is_the_same_for_a_seed(trained: Trained) -> None:
    again = train([*texts_of(0, 40), *texts_of(1, 40)], SMALL)
    assert trained.losses[-1] < trained.losses[0]
    assert np.array_equal(again.codes, trained.codes)
    assert again.coder.digest == trained.coder.digest
    other = train(texts_of(0, 20), ParagraphVectors(bits=8, min_texts=2, epochs=1))
    assert other.coder.digest != trained.coder.digest


def test_real_vectors_of_another_width(trained: Trained) -> None:
    config = ParagraphVectors(bits=16, dimension=24, min_texts=2, epochs=3)
    found = train(texts_of(0, 20), config)
    codes, vectors = found.coder.encode_with_vectors(texts_of(0, 3, seed=2))
    assert codes.shape == (3, 2)
    assert vectors.shape == (3, 24)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert found.rows.shape == (20, 24)


def test_a_code_does_not_depend_on_the_texts_beside_it(trained: Trained) -> None:
    texts = texts_of(0, 130, seed=3)
    together = trained.coder.encode(texts)
    alone = np.concatenate([trained.coder.encode([text]) for text in texts[:5]])
    assert np.array_equal(together[:5], alone)


def test_the_gradient_passes_the_rounding_as_the_sigmoids() -> None:
    inner = torch.randn(5, 7, requires_grad=True)
    upstream = torch.randn(5, 7)
    bits = Rounding.apply(inner)
    assert torch.equal(bits, torch.round(torch.sigmoid(inner.detach())))
    bits.backward(upstream)
    other = inner.detach().clone().requires_grad_()
    torch.sigmoid(other).backward(upstream)
    torch.testing.assert_close(inner.grad, other.grad)


def test_the_loss_is_that_of_a_softmax_over_terms() -> None:
    draw = np.random.default_rng(0)
    dense = draw.integers(0, 3, (4, 9)).astype(np.float32)
    dense[2] = [0, 0, 0, 0, 1, 0, 0, 0, 0]
    rows, terms = np.nonzero(dense)
    counts = Counts(np.searchsorted(rows, np.arange(5)), terms, dense[rows, terms])
    bits = torch.from_numpy(draw.integers(0, 2, (4, 6)).astype(np.float32))
    vectors, bias = torch.randn(9, 6), torch.randn(9)
    expected = 0.0
    for i in range(4):
        logits = [float(vectors[t] @ bits[i] + bias[t]) for t in range(9)]
        total = np.log(np.sum(np.exp(logits)))
        expected += sum(dense[i, t] * (total - logits[t]) for t in range(9))
    found = negative_log_likelihood(bits, vectors, bias, counts)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    # Each term drawn as often as its probability says: the estimate is exact.
    drawn = torch.arange(9), torch.full((9,), 1 / 9)
    estimate = negative_log_likelihood(bits, vectors, bias, counts, drawn)
    assert float(estimate) == pytest.approx(expected, rel=1e-5)


WORDS = st.lists(st.sampled_from(list("abcde")), max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6), st.integers(1, 3))
def test_counts_are_those_of_a_loop(texts: list[str], least: int) -> None:
    config = ParagraphVectors(min_texts=least)
    try:
        vocabulary = build_vocabulary(texts, config)
    except InputError:
        alone = Counter(w for text in texts for w in set(text.split()))
        assert max(alone.values(), default=0) < least
        return
    names = [(w,) for w in vocabulary.words]
    names += [tuple(vocabulary.words[i] for i in pair) for pair in vocabulary.pairs]
    counts = vocabulary.counts(texts)
    in_texts: Counter[tuple[str, ...]] = Counter()
    for i, text in enumerate(texts):
        words = text.split()
        grams = [(w,) for w in words] + list(itertools.pairwise(words))
        in_texts.update(set(grams))
        expected = Counter(gram for gram in grams if gram in set(names))
        entries = slice(counts.starts[i], counts.starts[i + 1])
        terms, values = counts.terms[entries], counts.values[entries]
        assert {names[t]: v for t, v in zip(terms, values, strict=True)} == expected
    assert set(names) == {gram for gram, count in in_texts.items() if count >= least}


def test_the_vocabulary_keeps_the_most_frequent() -> None:
    texts = ["x y z"] * 5 + ["x y"] * 5 + ["x"] * 5
    config = ParagraphVectors(min_texts=1, max_terms=4)
    vocabulary = build_vocabulary(texts, config)
    assert vocabulary.words == ("x", "y")
    assert vocabulary.pairs.tolist() == [[0, 1]]
    plain = build_vocabulary(texts, ParagraphVectors(min_texts=1, pairs=False))
    assert plain.words == ("x", "y", "z")
    assert plain.pairs.shape == (0, 2)
    weights = term_weights(vocabulary.counts(texts), vocabulary, 0.1)
    assert weights[2] == pytest.approx(weights[0] * weights[1])


def test_words_are_letters_digits_and_apostrophes() -> None:
    assert split_words("Don't STOP, it's 3pm_now; Žižek!") == (
        ["don't", "stop", "it's", "3pm", "now", "žižek"]
    )


@pytest.mark.parametrize("bits", [0, 4, 12, 1032])
def test_bits_are_a_multiple_of_eight(bits: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        ParagraphVectors(bits=bits)


def test_texts_that_cannot_be_used_are_named(trained: Trained) -> None:
    with pytest.raises(InputError, match="no text to train on"):
        train([], SMALL)
    with pytest.raises(InputError, match="No word is in 2 of the 2 texts"):
        train(["one", "two"], SMALL)
    with pytest.raises(InputError, match="Text 2 of 2 has no word"):
        trained.coder.encode(["river", "xylophone"])
    assert trained.coder.encode(["river"]).shape == (1, 2)
    assert trained.coder.encode([]).shape == (0, 2)
    some = train(["river", "", "river stone", "alone"], SMALL)
    assert some.kept.tolist() == [0, 2]
    assert len(some.codes) == 2


def test_files_give_the_same_codes_or_an_error(
    trained: Trained, tmp_path: Path
) -> None:
    save_paragraph_coder(trained.coder, tmp_path)
    texts = texts_of(1, 3)
    loaded = load_paragraph_coder(tmp_path)
    assert loaded.digest == trained.coder.digest
    assert np.array_equal(loaded.encode(texts), trained.coder.encode(texts))
    arrays, about = tmp_path / ARRAYS, tmp_path / ABOUT
    whole, described = arrays.read_bytes(), about.read_text("utf-8")
    for broken in (whole[:-1], whole[:20], b"", whole[:-1] + b"\xff"):
        arrays.write_bytes(broken)
        with pytest.raises(BundleError, match="damaged"):
            load_paragraph_coder(tmp_path)
    arrays.write_bytes(whole)
    for text, message in (
        (described[:50], "damaged"),
        (described.replace("river", "rivet"), "digest"),
        (described.replace('"version": 1', '"version": 2'), "Update edgelm"),
        ("{}", "is not a Paragraph Vector"),
    ):
        about.write_text(text, "utf-8")
        with pytest.raises(BundleError, match=message):
            load_paragraph_coder(tmp_path)
    arrays.unlink()
    about.write_text(described, "utf-8")
    with pytest.raises(BundleError, match=ARRAYS):
        load_paragraph_coder(tmp_path)


def test_the_commands(tmp_path: Path) -> None:
    corpus, model, codes = (tmp_path / n for n in ("c.jsonl", "model", "codes.npy"))
    rows = [*texts_of(0, 30), *texts_of(1, 30), "alone"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
    corpus.write_text(lines, "utf-8")
    flags = ["-o", str(model), "--bits", "16", "--epochs", "2", "--json"]
    done = CliRunner().invoke(cli, ["codes", "train", str(corpus), *flags])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["left_out"] == 1
    again = CliRunner().invoke(cli, ["codes", "train", str(corpus), *flags])
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    encode = ["codes", "encode", str(model), str(corpus), "-o", str(codes)]
    refused = CliRunner().invoke(cli, encode)
    assert refused.exit_code == 1
    assert "Text 61 of 61 has no word" in refused.stderr
    assert not codes.exists()
    corpus.write_text("\n".join(rows[:60]), "utf-8")
    (tmp_path / "c.txt").write_text("\n".join(rows[:60]) + "\n", "utf-8")
    encode[3] = str(tmp_path / "c.txt")
    reals = tmp_path / "reals.npy"
    done = CliRunner().invoke(cli, [*encode, "--vectors", str(reals)])
    assert done.exit_code == 0, done.output
    assert np.load(codes).shape == (60, 2)
    assert np.load(codes).dtype == np.uint8
    assert np.load(reals).dtype == np.float32


def test_an_empty_vocabulary_of_pairs_counts_words_alone() -> None:
    vocabulary = Vocabulary(("a", "b"), np.zeros((0, 2), np.int32))
    counts = vocabulary.counts(["a b a", "", "c"])
    assert counts.starts.tolist() == [0, 2, 2, 2]
    assert counts.values.tolist() == [2.0, 1.0]
