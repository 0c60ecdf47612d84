"""Fitting coders: what each kind promises, and what the kinds are worth on data of known shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgelm.codes import KINDS, BinaryCodes, fit, judge
from edgelm.codes.fitting import fit_decoder, optimised_rotation
from edgelm.errors import CompressionError, ConfigError, InputError
from edgelm.runtimes.codes import Coder, Floats, sign, signs


def embeddings(count: int, dimension: int = 48, seed: int = 0) -> Floats:
    """Of length 1, away from 0, with variances that fall as those of text embeddings do."""
    draw = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(7).standard_normal((dimension,) * 2))[0]
    spread = 1 / np.sqrt(1 + np.arange(dimension) / 4)
    found = (draw.standard_normal((count, dimension)) * spread) @ basis + 0.1
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def config(kind: Any, bits: int, **more: Any) -> BinaryCodes:
    return BinaryCodes(bits=bits, kind=kind, **more)


@pytest.mark.parametrize("bits", [32, 40, 48, 104, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_any_width_or_says_why_not(kind: str, bits: int) -> None:
    data = embeddings(150)
    settings = config(kind, bits, iterations=3, rounds=1)
    if kind in ("sign", "centred") and bits > 48:
        with pytest.raises(CompressionError, match=f"at most 48 here; {bits}"):
            fit(data, settings)
        return
    coder = fit(data, settings)
    assert (coder.dimension, coder.bits) == (48, bits)
    assert all(np.isfinite(a).all() for a in (coder.encoder, coder.decoder))
    assert coder.encode(data[:3]).shape == (3, bits // 8)
    assert fit(data.copy(), settings).digest == coder.digest


def test_sign_is_what_sentence_transformers_does() -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    data = embeddings(64)
    due = quantize_embeddings(data, "ubinary")
    assert np.array_equal(fit(data, config("sign", 48)).encode(data), due)
    assert np.array_equal(fit(data, config("sign", 32)).encode(data), due[:, :4])


def test_centred_signs_split_every_dimension() -> None:
    data = embeddings(999)
    bits = np.unpackbits(fit(data, config("centred", 48)).encode(data), axis=1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.1
    assert (
        np.abs(
            np.unpackbits(fit(data, config("sign", 48)).encode(data), axis=1).mean(0)
            - 0.5
        ).max()
        > 0.1
    )


@pytest.mark.parametrize("bits", [32, 48, 96])
@pytest.mark.parametrize("kind", ["rotation", "itq"])
def test_rotations_keep_lengths(kind: str, bits: int) -> None:
    encoder = fit(embeddings(200), config(kind, bits)).encoder
    product = encoder.T @ encoder if bits <= 48 else encoder @ encoder.T
    assert np.allclose(product, np.eye(min(bits, 48)), atol=1e-5)


@pytest.mark.parametrize("bits", [32, 48, 72])
def test_the_optimised_rotation_is_changed_less_by_signs(bits: int) -> None:
    data = embeddings(500)
    centred = data - data.mean(axis=0)

    def change(iterations: int) -> float:
        encoder = optimised_rotation(
            centred, config("itq", bits, iterations=iterations)
        )
        values = centred @ encoder
        values /= np.abs(values).mean()
        return float(np.mean((values - sign(values)) ** 2))

    assert change(0) > change(5) > change(50)


def test_the_optimised_rotation_spans_the_principal_axes() -> None:
    data = embeddings(500)
    centred = data - data.mean(axis=0)
    encoder = optimised_rotation(centred, config("itq", 32))
    _, _, axes = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    assert np.allclose(encoder @ encoder.T, axes[:32].T @ axes[:32], atol=1e-4)


def test_the_decoder_is_the_ridge_regression_of_the_embeddings_on_the_codes() -> None:
    data = embeddings(300)
    settings = config("autoencoder", 40, ridge=0.1)
    mean = data.mean(axis=0)
    start = fit(data, replace(settings, kind="itq"))
    decoder, codes = fit_decoder(start, data - mean, settings)
    # The ridge as rows of its own, solved by another routine.
    rows = np.concatenate([codes, np.sqrt(0.1 * 300) * np.eye(40)])
    due = np.concatenate([data - mean, np.zeros((40, 48))])
    assert np.allclose(decoder, np.linalg.lstsq(rows, due)[0].T, atol=1e-5)


def test_the_autoencoder_loses_less_of_new_embeddings() -> None:
    data, new = embeddings(800), embeddings(200, seed=1)

    def lost(coder: Coder) -> float:
        decoded = signs(coder.encode(new), coder.bits) @ coder.decoder.T
        centred = new - coder.mean
        return float(np.sum((centred - decoded) ** 2) / np.sum(centred**2))

    losses = [
        lost(fit(data, config(kind, 48))) for kind in ("autoencoder", "itq", "rotation")
    ]
    assert losses[0] < 0.9 * losses[1] < 0.9 * losses[2]


def test_what_kinds_are_worth_on_held_out_embeddings() -> None:
    data, queries = embeddings(1200), embeddings(100, seed=1)
    found = {
        kind: judge(fit(data, config(kind, 48)), queries, data)
        for kind in ("autoencoder", "itq", "sign")
    }
    assert all(j.queries == 100 for j in found.values())
    assert found["autoencoder"].asymmetric > found["itq"].asymmetric
    assert found["itq"].asymmetric > found["sign"].asymmetric
    for judged in found.values():
        assert judged.hamming < judged.asymmetric < judged.rescored <= 1


def test_judgement_of_a_code_that_loses_nothing() -> None:
    """Corners of a cube are their own codes."""
    draw = np.random.default_rng(0)
    corners = sign(draw.standard_normal((60, 32)).astype(np.float32))
    judged = judge(fit(corners, config("sign", 32)), corners[:5], corners[5:])
    assert judged.rescored == 1
    # Ties of whole-number products are broken by position in both searches.
    assert (judged.hamming, judged.asymmetric) == (1, 1)


def test_one_more_bit_is_worth_something() -> None:
    data, queries = embeddings(1200), embeddings(100, seed=1)
    recalls = [
        judge(
            fit(data, config("autoencoder", bits, rounds=2)), queries, data
        ).asymmetric
        for bits in (32, 48, 96)
    ]
    assert recalls == sorted(recalls)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 24),
        ("bits", 36),
        ("bits", 1032),
        ("iterations", -1),
        ("rounds", 0),
        ("sweeps", 101),
        ("ridge", 0.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' parameter of BinaryCodes"):
        BinaryCodes(**{key: value})


@pytest.mark.parametrize(
    "data",
    [
        np.tile(embeddings(1, 40), (50, 1)),
        embeddings(1, 40),
        np.zeros((0, 40), np.float32),
    ],
    ids=["alike", "one", "none"],
)
def test_embeddings_without_variance_are_refused(data: Floats) -> None:
    with pytest.raises(CompressionError, match="all alike"):
        fit(data, BinaryCodes(32))


def test_embeddings_that_are_no_numbers_are_refused() -> None:
    data = embeddings(20)
    data[3, 3] = np.inf
    with pytest.raises(CompressionError, match="finite"):
        fit(data, BinaryCodes(32))
    with pytest.raises(InputError, match="at least 11"):
        judge(fit(embeddings(20), BinaryCodes(32)), data[:0], data)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_embeddings_than_bits_are_enough(kind: str) -> None:
    data = embeddings(5)
    coder = fit(data, config(kind, 40))
    assert np.isfinite(coder.decoder).all()
    assert coder.encode(embeddings(3, seed=2)).shape == (3, 5)
