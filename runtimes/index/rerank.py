"""The finer stages of a search: float query against codes, and stored vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.runtimes.index.manifest import VectorType


def asymmetric_scores(
    query: NDArray[np.float32],
    codes: NDArray[np.uint8],
    factors: NDArray[np.float16] | None = None,
) -> NDArray[np.float32]:
    """Dot products of a float query with the signs that codes stand for.

    Args:
        query: float32 ``[bits]``.
        codes: uint8 ``[n, bits / 8]``.
        factors: float16 ``[n]``: multiplies each.

    Returns:
        float32 ``[n]``; larger is nearer.
    """
    # Bits are 0 and 1: twice the sum over the set ones, less the sum over all, is the sum over signs.
    ones = np.unpackbits(codes, axis=1).astype(np.float32) @ query
    scores: NDArray[np.float32] = 2 * ones - query.sum()
    return scores if factors is None else scores * factors.astype(np.float32)


def pack_vectors(vectors: NDArray[np.float32], kind: VectorType) -> NDArray[Any]:
    """Vectors as they are stored.

    Args:
        vectors: float32 ``[n, dimension]``, finite.
        kind: ``int8``, each vector with a scale of its own, or ``float16``.

    Returns:
        float16 ``[n, dimension]``, or ``[n]`` of a scale (float32) and values (int8 ``[dimension]``).

    Raises:
        InputError: A value is not finite, or too large for float16.
    """
    if not np.isfinite(vectors).all():
        raise InputError("A vector holds a value that is not finite.")
    if kind == "float16":
        if np.abs(vectors, dtype=np.float32).max(initial=0) > np.finfo(np.float16).max:
            raise InputError(
                "A vector is too large for float16. Store vectors as int8."
            )
        return vectors.astype("<f2")
    row = np.dtype([("scale", "<f4"), ("values", "i1", (vectors.shape[1],))])
    packed = np.zeros(len(vectors), row)
    scale = np.abs(vectors).max(axis=1, initial=0) / 127
    packed["scale"] = scale
    steps = vectors / np.where(scale > 0, scale, 1)[:, None]
    packed["values"] = np.clip(np.rint(steps), -127, 127)
    return packed


def vector_scores(
    query: NDArray[np.float32], stored: NDArray[Any]
) -> NDArray[np.float32]:
    """Dot products of a query, float32 ``[dimension]``, with vectors of `pack_vectors`."""
    if stored.dtype.names is None:
        scores: NDArray[np.float32] = stored.astype(np.float32) @ query
        return scores
    products = stored["values"].astype(np.float32) @ query
    scaled: NDArray[np.float32] = products * stored["scale"]
    return scaled
