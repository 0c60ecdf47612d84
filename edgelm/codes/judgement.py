"""How much of a float search a coder keeps, without labels: texts look for their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.runtimes.codes import (
    Coder,
    Floats,
    asymmetric_scores,
    hamming_distances,
)

# Rescored is the order of the float search among this many times ten documents.
OVERSAMPLE = 4


@dataclass(frozen=True)
class Judgement:
    """Shares of the ten nearest documents by float dot product that a search finds.

    Attributes:
        queries: How many texts searched.
        hamming: By Hamming distance.
        asymmetric: With float queries and factors.
        rescored: So, then 40 documents in the order of the float search.
    """

    queries: int
    hamming: float
    asymmetric: float
    rescored: float


def judge(
    coder: Coder, queries: Floats, documents: Floats, most: int = 1000
) -> Judgement:
    """Judge a coder by texts that it was not fitted to.

    Args:
        coder: The coder.
        queries: float ``[q, dim]``, none of them a document; the first ``most`` are used.
        documents: float ``[n, dim]``, at least 11.
        most: Limit of queries.

    Raises:
        InputError: There are fewer than 11 documents or no query.
    """
    queries = queries[:most]
    if len(documents) < 11 or not len(queries):
        raise InputError(
            f"To judge codes, at least 11 documents and a query are due. Got {len(documents)} and {len(queries)}."
        )
    codes = coder.encode(documents)
    factors = coder.factors(documents, codes)
    near = best(queries @ documents.T, 10)

    def found(scores: Callable[[], Floats | NDArray[np.int32]], depth: int) -> float:
        values = scores().astype(np.float32)
        return recall(near, best(values, depth))

    def asymmetric() -> Floats:
        return asymmetric_scores(coder.project(queries), codes, factors)

    return Judgement(
        len(queries),
        found(lambda: -hamming_distances(coder.encode_queries(queries), codes), 10),
        found(asymmetric, 10),
        found(asymmetric, 10 * OVERSAMPLE),
    )


def best(scores: Floats, depth: int) -> NDArray[np.int64]:
    """Columns of the ``depth`` largest scores of each row, best first; ties by column."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :depth]


def recall(due: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """Mean share of the first that is among the second, row by row."""
    return float((due[:, :, None] == found[:, None, :]).any(axis=2).mean())
