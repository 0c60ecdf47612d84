"""Vectors for the second stage: in files, read where they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import InputError
from edgelm.runtimes.rescoring import Precision, pack_vectors, rescore, row_dtype


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 6),
    dimension=st.integers(1, 17),
    scale=st.floats(1e-6, 1e4),
    seed=st.integers(0, 99),
)
def test_int8_is_within_half_a_step(
    count: int, dimension: int, scale: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    vectors = (scale * draw.standard_normal((count, dimension))).astype(np.float32)
    packed = pack_vectors(vectors, "int8")
    assert packed.dtype == row_dtype(dimension, "int8")
    assert packed.dtype.itemsize == dimension + 4
    back = packed["values"] * packed["scale"][:, None].astype(np.float64)
    assert (np.abs(back - vectors) <= packed["scale"][:, None] * 0.501).all()


@pytest.mark.parametrize("precision", get_args(Precision))
def test_candidates_are_scored_from_a_memory_map(
    tmp_path: Path, precision: Any
) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((50, 33)).astype(np.float32)
    query = draw.standard_normal(33).astype(np.float32)
    packed = pack_vectors(vectors, precision)
    np.save(tmp_path / "kept.npy", packed)
    (tmp_path / "raw").write_bytes(packed.tobytes())
    mapped = np.load(tmp_path / "kept.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    raw = np.memmap(tmp_path / "raw", row_dtype(33, precision), mode="r")
    candidates = np.array([49, 0, 7, 7])
    for stored in (packed, mapped, raw.reshape(packed.shape)):
        found = rescore(query, stored, candidates)
        assert found.dtype == np.float32
        assert np.allclose(found, vectors[candidates] @ query, atol=0.15)
    assert rescore(query, mapped, np.array([], np.int64)).shape == (0,)


def test_zeros_stay_zeros() -> None:
    packed = pack_vectors(np.zeros((2, 5), np.float32))
    query = np.ones(5, np.float32)
    assert rescore(query, packed, np.arange(2)).tolist() == [0, 0]


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(InputError, match="Keep them as int8"):
        pack_vectors(np.array([[1e6]], np.float32), "float16")
    with pytest.raises(InputError, match="finite"):
        pack_vectors(np.array([[np.inf]], np.float32))
    with pytest.raises(InputError, match=r"\[n, dim\]"):
        pack_vectors(np.zeros(3, np.float32))
    with pytest.raises(InputError, match=r"shape \[5\]"):
        rescore(np.ones(4, np.float32), pack_vectors(np.ones((2, 5))), np.arange(2))
