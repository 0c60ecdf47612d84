"""The second stage: vectors kept in a file, int8 or float16, that score a shortlist again."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError

Precision = Literal["int8", "float16"]


def row_dtype(dimension: int, precision: Precision) -> np.dtype[Any]:
    """How one vector lies in a file: ``dimension + 4`` or ``2 * dimension`` bytes."""
    if precision == "float16":
        return np.dtype(("<f2", (dimension,)))
    return np.dtype([("scale", "<f4"), ("values", "i1", (dimension,))])


def pack_vectors(
    vectors: NDArray[np.float32], precision: Precision = "int8"
) -> NDArray[Any]:
    """Vectors as they are kept for rescoring.

    Args:
        vectors: float ``[n, dim]``.
        precision: ``int8``, each vector with a scale of its own, or ``float16``.

    Returns:
        For ``int8`` structured ``[n]`` of ``scale`` (float32) and ``values`` (int8 ``[dim]``);
        for ``float16`` float16 ``[n, dim]``. `numpy.save` keeps it in a file that
        ``numpy.load(path, mmap_mode="r")`` opens without reading it.

    Raises:
        InputError: The vectors are no matrix, or hold what is not finite or no float16.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise InputError("Vectors to keep must be finite, of shape [n, dim].")
    largest = np.abs(vectors).max(axis=1, initial=0.0)
    if precision == "float16":
        if largest.max(initial=0.0) > np.finfo(np.float16).max:
            raise InputError(
                "These vectors have numbers beyond 65504, which float16 does not hold. Keep them as int8."
            )
        return vectors.astype("<f2")
    packed = np.zeros(len(vectors), row_dtype(vectors.shape[1], "int8"))
    packed["scale"] = largest / 127
    steps = np.where(packed["scale"] > 0, packed["scale"], 1.0)
    packed["values"] = np.rint(vectors / steps[:, None])
    return packed


def rescore(
    query: NDArray[np.float32], stored: NDArray[Any], candidates: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Dot products of a query with some of the vectors that are kept; only these are read.

    Args:
        query: float32 ``[dim]``.
        stored: What `pack_vectors` made, or a memory map of it.
        candidates: int ``[k]``, rows of it.

    Returns:
        float32 ``[k]``; larger is better.

    Raises:
        InputError: The query is of another length than the vectors.
    """
    rows = stored[candidates]
    values = rows if stored.dtype.names is None else rows["values"]
    if values.ndim != 2 or query.shape != values.shape[1:]:
        raise InputError(
            f"The query must be of shape {list(values.shape[1:])}, as the vectors are. Got {list(query.shape)} instead."
        )
    scores: NDArray[np.float32] = values.astype(np.float32) @ query
    return scores if stored.dtype.names is None else scores * rows["scale"]
