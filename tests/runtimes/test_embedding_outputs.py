"""Embeddings in other forms: poolings, dimensions, bytes, bits, windows, tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm import samples
from edgelm.bundle import MANIFEST, open_bundle, seal
from edgelm.errors import BundleError, InputError
from edgelm.runtimes.quantization import Ranges, shorten, signs
from tests.conftest import export_bundle, with_token_embeddings
from tests.runtimes.test_embedding_and_scoring import STRANGE, embedder

Bundles = Callable[..., Path]
TEXTS = ["the old man plays", "paris", "", "a flute in the garden, a river !"]
LONG = "the old man reads a book in the garden . " * 12


def sentence_model(folder: Path, to: Path, pooling: str, normalize: bool) -> Path:
    """A tiny model with the files of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Normalize,
        Pooling,
        Transformer,
    )

    base = Transformer(str(folder))
    modules = [base, Pooling(32, pooling_mode=pooling)]
    modules += [Normalize()] if normalize else []
    SentenceTransformer(modules=modules, device="cpu").save(str(to))
    return to


@pytest.mark.parametrize(
    ("pooling", "normalize"),
    [("cls", True), ("max", False), ("lasttoken", True), ("mean", False)],
)
def test_every_pooling_is_that_of_sentence_transformers(
    tiny_embedding: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    source = sentence_model(tiny_embedding, tmp_path / "st", pooling, normalize)
    theirs = SentenceTransformer(str(source), device="cpu")
    ours = embedder(export_bundle(str(source), tmp_path / "b", precision="fp32"))
    texts = [*TEXTS, LONG, *STRANGE]
    due = theirs.encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(ours.encode(texts), due, atol=1e-5)


@pytest.mark.slow
def test_500_real_texts_are_those_of_sentence_transformers(bundles: Bundles) -> None:
    from sentence_transformers import SentenceTransformer

    from edgelm.models import load_model

    texts = samples.calibration()[: 500 - len(STRANGE)] + STRANGE
    theirs = SentenceTransformer(str(load_model("minilm").folder), device="cpu")
    due = theirs.encode(texts, show_progress_bar=False)
    np.testing.assert_allclose(
        embedder(bundles("minilm")).encode(texts), due, atol=1e-5
    )


def stating(bundle: Path, to: Path, **changes: Any) -> edgelm.Embedder:
    """The same bundle, whose manifest states something else of its embeddings."""
    shutil.copytree(bundle, to)
    manifest = open_bundle(to).manifest
    (to / MANIFEST).unlink()
    assert manifest.embedding is not None
    seal(to, replace(manifest, embedding=replace(manifest.embedding, **changes)))
    return embedder(to)


def test_many_texts_come_in_order_and_say_which_were_cut(bundles: Bundles) -> None:
    """More than are tokenised at a time."""
    model = embedder(bundles("embedding", "fp32"))
    texts = ["paris " * (1 + i % 5) + "river " * (i % 3) for i in range(2100)]
    texts[1030] = texts[2099] = LONG
    vectors, truncated = model.encode_with_truncation(texts)
    assert np.flatnonzero(truncated).tolist() == [1030, 2099]
    few = [0, 1023, 1024, 1030, 2047, 2048, 2099]
    due = np.concatenate([model.encode([texts[i]]) for i in few])
    np.testing.assert_allclose(vectors[few], due, atol=1e-5)
    with pytest.raises(InputError, match="Text 2000 must be a string"):
        model.encode([*texts[:2000], None])  # type: ignore[list-item]


def test_fewer_dimensions(bundles: Bundles, tmp_path: Path) -> None:
    model = embedder(bundles("embedding"))
    whole = model.encode(TEXTS)
    np.testing.assert_array_equal(model.encode(TEXTS, dimensions=8), whole[:, :8])
    assert model.encode(TEXTS, dimensions=32).shape == (4, 32)
    normal = stating(
        bundles("embedding"), tmp_path / "n", normalize=True, dimensions=(8, 16)
    )
    short = normal.encode(TEXTS, dimensions=8)
    due = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, due, atol=1e-6)
    with pytest.raises(InputError, match=r"trained for 8, 16 dimensions\. Got 12"):
        normal.encode(TEXTS, dimensions=12)
    for wrong in (0, 33, -1):
        with pytest.raises(InputError, match="must be 1 to 32"):
            model.encode(TEXTS, dimensions=wrong)
    with pytest.raises(InputError, match="leave dimensions out"):
        model.encode(TEXTS, dimensions=8, output="codes")


def test_trained_dimensions_come_from_the_config(
    tiny_embedding: Path, tmp_path: Path
) -> None:
    path = tiny_embedding / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "matryoshka_dimensions": [16, 8, 512]}))
    model = embedder(
        export_bundle(str(tiny_embedding), tmp_path / "b", precision="fp32")
    )
    assert model.dimensions == (8, 16)


def test_bytes_by_the_ranges_measured_at_export(bundles: Bundles) -> None:
    model = embedder(bundles("minilm", "int8"))
    texts = samples.calibration()[1:200:9]
    vectors = model.encode(texts)
    ranges = model.engine.ranges
    assert ranges is not None
    bytes_ = model.encode(texts, output="uint8")
    ints = model.encode(texts, output="int8")
    assert (bytes_.dtype, ints.dtype) == (np.uint8, np.int8)
    np.testing.assert_array_equal(ints.astype(int) + 128, bytes_)
    loops = [
        [
            min(255, max(0, round((x - low) / ((high - low) / 255))))
            for x, low, high in zip(row, ranges.low, ranges.high, strict=True)
        ]
        for row in vectors[:3].astype(float)
    ]
    assert np.abs(bytes_[:3].astype(int) - loops).max() <= 1  # ties in float32
    inside = np.clip(vectors, ranges.low, ranges.high)
    for codes in (bytes_, ints):
        error = np.abs(ranges.restore(codes) - inside)
        assert (error <= ranges.step * 0.501).all()
    near = np.sum(ranges.restore(ints) * vectors, axis=1)
    assert near.min() > 0.999 * np.sum(inside * vectors, axis=1).min()


def test_given_ranges_and_those_of_fewer_dimensions(bundles: Bundles) -> None:
    model = embedder(bundles("embedding"))
    low, high = np.full(32, -9.0), np.full(32, 9.0)
    found = model.encode(TEXTS, output="uint8", ranges=(low, high))
    due = np.rint((model.encode(TEXTS) + 9) / (18 / 255))
    assert np.abs(found - due).max() <= 1
    with pytest.raises(InputError, match=r"calibrate\(texts, dimensions=8\)"):
        model.encode(TEXTS, output="int8", dimensions=8)
    own = model.calibrate(TEXTS, dimensions=8)
    short = model.encode(TEXTS, output="int8", dimensions=8, ranges=own)
    assert short.shape == (4, 8)
    assert short.min(axis=0).tolist() == [-128] * 8
    assert short.max(axis=0).tolist() == [127] * 8
    with pytest.raises(InputError, match="of 8 dimensions, the vectors have 32"):
        model.encode(TEXTS, output="int8", ranges=own)
    with pytest.raises(InputError, match="least and the greatest"):
        model.encode(TEXTS, output="int8", ranges=(high, low))
    with pytest.raises(InputError, match="at least one text"):
        model.calibrate([])


def test_a_bundle_without_ranges_says_how_to_get_them(
    bundles: Bundles, tmp_path: Path
) -> None:
    model = stating(bundles("embedding"), tmp_path / "b", ranges=None)
    with pytest.raises(InputError, match=r"ranges=embedder\.calibrate\(texts\)"):
        model.encode(TEXTS, output="int8")
    shutil.copytree(bundles("embedding"), tmp_path / "c")
    Ranges(np.zeros(3, np.float32), np.ones(3, np.float32)).save(
        tmp_path / "c" / "ranges.safetensors"
    )
    seal(tmp_path / "c", open_bundle(bundles("embedding")).manifest)
    with pytest.raises(BundleError, match="does not hold ranges of 32 dimensions"):
        edgelm.load(tmp_path / "c")


def test_signs_are_packed_bits(bundles: Bundles) -> None:
    model = embedder(bundles("embedding"))
    for dimensions in (32, 12):
        found = model.encode(TEXTS, output="binary", dimensions=dimensions)
        vectors = model.encode(TEXTS, dimensions=dimensions)
        for row, vector in zip(found, vectors, strict=True):
            text = "".join(f"{byte:08b}" for byte in row)
            assert text == "".join("01"[int(x > 0)] for x in vector).ljust(
                len(text), "0"
            )
    assert model.encode([], output="binary").shape == (0, 4)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(0, 5), dim=st.integers(1, 20))
def test_forms_of_any_shape(seed: int, n: int, dim: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    assert signs(vectors).shape == (n, -(-dim // 8))
    short = shorten(vectors, 1 + seed % dim, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), np.ones(n), rtol=1e-5)
    if n:
        ranges = Ranges.of(vectors)
        back = ranges.restore(ranges.quantize(vectors))
        assert (np.abs(back - vectors) <= ranges.step * 0.501 + 1e-6).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_windows_are_pooled_by_their_tokens(
    bundles: Bundles, tmp_path: Path, normalize: bool
) -> None:
    model = stating(bundles("embedding"), tmp_path / "b", normalize=normalize)
    found, cut = model.encode_with_truncation([*TEXTS, LONG], long_texts="windows")
    assert not cut.any()
    encoding = model.engine.tokenize([LONG])[0]
    windows = [encoding, *encoding.overflowing]
    assert len(windows) == 4
    total = sum(len(w) * model.engine.run([w])[0].astype(float) for w in windows)
    due = total / sum(len(w) for w in windows)
    due = due / np.linalg.norm(due) if normalize else due
    np.testing.assert_allclose(found[-1], due, atol=1e-5)
    if not normalize:
        np.testing.assert_allclose(found[:-1], model.encode(TEXTS), atol=1e-5)


def test_long_texts_are_an_error_where_that_is_asked_for(bundles: Bundles) -> None:
    model = embedder(bundles("embedding"))
    assert model.encode(TEXTS, long_texts="error").shape == (4, 32)
    with pytest.raises(InputError, match="Text 1 is longer than the 32 tokens"):
        model.encode(["the", LONG], long_texts="error")
    with pytest.raises(InputError, match="must be one of truncate, error, windows"):
        model.encode(TEXTS, long_texts="cut")  # type: ignore[call-overload]


def test_vectors_of_tokens_are_what_is_pooled(bundles: Bundles, tmp_path: Path) -> None:
    model = embedder(with_token_embeddings(bundles("embedding"), tmp_path / "b"))
    texts = [*TEXTS, LONG]
    found = model.encode_tokens(texts)
    due = model.encode(texts)
    for text, tokens, vector in zip(texts, found, due, strict=True):
        np.testing.assert_allclose(tokens.vectors.mean(axis=0), vector, atol=1e-5)
        assert tokens.offsets.shape == (len(tokens.vectors), 2)
        words = [text[a:b] for a, b in tokens.offsets.tolist() if b > a]
        assert "".join(text.split()).startswith("".join(words))
    assert [tokens.truncated for tokens in found] == [False] * 4 + [True]
    with pytest.raises(BundleError, match="no output token_embeddings"):
        embedder(bundles("embedding")).encode_tokens(TEXTS)
