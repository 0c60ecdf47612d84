"""Binary codes on the device, against loops over single bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgelm.errors import BundleError, InputError
from edgelm.runtimes.codes import (
    GROUPS,
    Coder,
    Floats,
    asymmetric_scores,
    hamming_distances,
    load_coder,
    save_coder,
    signs,
)


def random_coder(dimension: int, bits: int, sweeps: int = 0, seed: int = 0) -> Coder:
    draw = np.random.default_rng(seed)
    mean, encoder, decoder = (
        draw.standard_normal(shape).astype(np.float32)
        for shape in ((dimension,), (dimension, bits), (dimension, bits))
    )
    return Coder(mean, encoder, decoder / np.float32(bits), sweeps)


def some_vectors(count: int, dimension: int, seed: int = 1) -> Floats:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((count, dimension)).astype(np.float32)


def slow_code(coder: Coder, vector: Floats, sweeps: int) -> list[int]:
    """One code, bit by bit, in double precision; bits of a group do not see each other change."""
    x = vector.astype(np.float64) - coder.mean
    code = [1.0 if x @ coder.encoder[:, j] >= 0 else -1.0 for j in range(coder.bits)]
    decoder, size = coder.decoder.astype(np.float64), coder.bits // GROUPS
    for _ in range(sweeps):
        for first in range(0, coder.bits, size):
            before = list(code)
            for j in range(first, first + size):
                others = sum(
                    before[k] * decoder[:, k] for k in range(coder.bits) if k != j
                )
                code[j] = 1.0 if decoder[:, j] @ (x - others) >= 0 else -1.0
    return [int(bit > 0) for bit in code]


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(0, 5),
    dimension=st.integers(1, 9),
    size=st.integers(4, 9),
    sweeps=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_codes_are_those_of_loops_over_bits(
    count: int, dimension: int, size: int, sweeps: int, seed: int
) -> None:
    coder = random_coder(dimension, 8 * size, sweeps, seed)
    vectors = some_vectors(count, dimension, seed + 1)
    found = np.unpackbits(coder.encode(vectors), axis=1, bitorder="big")
    assert found.shape == (count, 8 * size)
    for vector, code in zip(vectors, found, strict=True):
        assert code.tolist() == slow_code(coder, vector, sweeps)


def test_queries_have_the_code_of_the_encoder() -> None:
    coder, vectors = random_coder(6, 32, sweeps=2), some_vectors(9, 6)
    plain = Coder(coder.mean, coder.encoder, coder.decoder)
    assert np.array_equal(coder.encode_queries(vectors), plain.encode(vectors))
    assert not np.array_equal(coder.encode(vectors), plain.encode(vectors))


def test_sweeps_bring_decoded_documents_nearer() -> None:
    vectors = some_vectors(200, 24)

    def error(sweeps: int) -> float:
        coder = random_coder(24, 64, sweeps)
        decoded = signs(coder.encode(vectors), 64) @ coder.decoder.T
        return float(np.sum((vectors - coder.mean - decoded) ** 2))

    assert error(0) > error(1) > error(4)


def test_many_rows_are_worked_on_in_parts() -> None:
    coder, vectors = random_coder(3, 32, sweeps=1), some_vectors(9001, 3)
    codes = coder.encode(vectors)
    rows = [0, 4095, 4096, 8191, 8192, 9000]
    assert np.array_equal(codes[rows], coder.encode(vectors[rows]))
    factors = coder.factors(vectors, codes)
    assert np.array_equal(factors[rows], coder.factors(vectors[rows], codes[rows]))
    scores = asymmetric_scores(coder.project(vectors[:2]), codes)
    assert np.allclose(
        scores[:, rows], coder.project(vectors[:2]) @ signs(codes[rows], 32).T
    )


def test_a_value_of_zero_is_a_one() -> None:
    eye = np.eye(32, dtype=np.float32)
    coder = Coder(np.zeros(32, np.float32), eye, eye)
    vector = np.full((1, 32), -1.0, np.float32)
    vector[0, [0, 9]] = 0.0, -0.0
    vector[0, 31] = np.float32(-1e-45)
    assert coder.encode(vector).tolist() == [[0b10000000, 0b01000000, 0, 0]]


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 20),
    queries=st.integers(0, 4),
    count=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_hamming_distances_count_bits(
    width: int, queries: int, count: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    first, second = (
        draw.integers(0, 256, (n, width), np.uint8) for n in (queries, count)
    )
    found = hamming_distances(first, second)
    assert found.shape == (queries, count)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            pairs = zip(a.tolist(), b.tolist(), strict=True)
            assert found[i, j] == sum((x ^ y).bit_count() for x, y in pairs)


def test_a_float_query_scores_decoded_documents() -> None:
    coder = random_coder(12, 40, sweeps=2)
    documents, queries = some_vectors(7, 12), some_vectors(3, 12, seed=5)
    codes = coder.encode(documents)
    decoded = signs(codes, 40) @ coder.decoder.T
    scores = asymmetric_scores(coder.project(queries), codes)
    assert np.allclose(scores, queries @ decoded.T, atol=1e-5)
    factors = coder.factors(documents, codes)
    assert np.allclose(
        asymmetric_scores(coder.project(queries), codes, factors),
        scores * factors.astype(np.float32),
    )


def test_the_full_factor_makes_a_document_score_its_own_length() -> None:
    coder = random_coder(16, 128, sweeps=3)
    documents = some_vectors(20, 16)
    codes = coder.encode(documents)
    factors = coder.factors(documents, codes, power=1.0).astype(np.float64)
    centred = documents - coder.mean
    own = np.sum(centred * (signs(codes, 128) @ coder.decoder.T), axis=1)
    assert (factors < 9).all()  # else the limit hides what is tested
    assert np.allclose(own * factors, np.sum(centred**2, axis=1), rtol=2e-3)
    half = coder.factors(documents, codes).astype(np.float64)
    assert np.allclose(half**2, factors, rtol=3e-3)


def test_the_full_factor_is_unbiased_over_random_rotations() -> None:
    """RaBitQ's theorem 3.2, by simulation."""
    draw = np.random.default_rng(0)
    document, query = draw.standard_normal((2, 1, 32)).astype(np.float32)
    plain, corrected = [], []
    for _ in range(3000):
        rotation = np.linalg.qr(draw.standard_normal((32, 32)))[0].astype(np.float32)
        coder = Coder(np.zeros(32, np.float32), rotation, rotation / np.float32(8))
        codes = coder.encode(document)
        factors = coder.factors(document, codes, power=1.0)
        rows = coder.project(query)
        plain.append(asymmetric_scores(rows, codes)[0, 0])
        corrected.append(asymmetric_scores(rows, codes, factors)[0, 0])
    due = float(document[0] @ query[0])
    error = np.std(corrected) / np.sqrt(len(corrected))
    assert abs(np.mean(corrected) - due) < 4 * error
    assert abs(np.mean(plain) - due) > 20 * error


def test_factors_of_what_has_no_direction() -> None:
    coder = random_coder(8, 32)
    documents = np.stack([coder.mean, coder.mean + 1])
    codes = coder.encode(documents)
    factors = coder.factors(documents, codes)
    assert factors.dtype == np.float16
    assert factors[0] == 1
    wrong = coder.factors(documents, np.bitwise_not(codes))
    assert wrong[1] == np.float16(np.sqrt(10))  # a code that says the opposite


@pytest.mark.parametrize("kind", ["width", "matrix", "finite", "codes", "count"])
def test_what_does_not_fit_is_refused(kind: str) -> None:
    coder, vectors = random_coder(8, 32), some_vectors(3, 8)
    codes = coder.encode(vectors)
    if kind == "width":
        with pytest.raises(InputError, match=r"shape \[n, 8\].*\[3, 7\]"):
            coder.encode(vectors[:, :7])
    elif kind == "matrix":
        with pytest.raises(InputError, match="shape"):
            coder.project(vectors[0])
    elif kind == "finite":
        vectors[1, 1] = np.nan
        with pytest.raises(InputError, match="finite"):
            coder.encode(vectors)
    elif kind == "codes":
        with pytest.raises(InputError, match="uint8 of shape"):
            asymmetric_scores(coder.project(vectors), codes[:, :3])
        with pytest.raises(InputError, match="uint8 of shape"):
            hamming_distances(codes, codes[:, :3])
    else:
        with pytest.raises(InputError, match="3 vectors and 2 codes"):
            coder.factors(vectors, codes[:2])
        with pytest.raises(InputError, match="one for each"):
            asymmetric_scores(
                coder.project(vectors), codes, np.ones(2, dtype=np.float16)
            )


def test_a_coder_survives_its_file(tmp_path: Path) -> None:
    coder = random_coder(10, 48, sweeps=3)
    save_coder(coder, tmp_path / "coder")
    again = load_coder(tmp_path / "coder")
    assert again.digest == coder.digest
    assert (again.bits, again.dimension, again.sweeps) == (48, 10, 3)
    vectors = some_vectors(50, 10)
    assert np.array_equal(again.encode(vectors), coder.encode(vectors))


def test_the_digest_is_of_all_that_decides() -> None:
    coder = random_coder(4, 32, sweeps=1)
    others = [
        Coder(coder.mean + 1, coder.encoder, coder.decoder, 1),
        Coder(coder.mean, coder.encoder * 2, coder.decoder, 1),
        Coder(coder.mean, coder.encoder, coder.decoder * 2, 1),
        Coder(coder.mean, coder.encoder, coder.decoder, 2),
    ]
    assert len({c.digest for c in (coder, *others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "Update edgelm"),
        ({"format": "other"}, "not a coder"),
        ({"sweeps": "-1"}, "damaged"),
        ({"encoder": np.zeros((4, 33), np.float32)}, "damaged"),
        ({"decoder": np.zeros((4, 40), np.float32)}, "damaged"),
        ({"mean": np.zeros(5, np.float32)}, "damaged"),
        ({"mean": np.zeros(4, np.float64)}, "damaged"),
        ({"mean": np.full(4, np.nan, np.float32)}, "damaged"),
        ({"more": np.zeros(1, np.float32)}, "not a coder"),
    ],
)
def test_files_that_are_no_coders_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    coder = random_coder(4, 32)
    arrays = {k: getattr(coder, k) for k in ("mean", "encoder", "decoder")}
    about = {"format": "edgelm-coder", "version": "1", "sweeps": "0"}
    for key, value in change.items():
        (arrays if isinstance(value, np.ndarray) else about)[key] = value  # type: ignore[index]
    save_file(arrays, tmp_path / "coder", about)
    with pytest.raises(BundleError, match=message):
        load_coder(tmp_path / "coder")


def test_a_cut_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "coder"
    with pytest.raises(BundleError, match="cannot be read"):
        load_coder(path)
    save_coder(random_coder(4, 32), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BundleError, match="cannot be read"):
        load_coder(path)
