"""A search, coarse to fine: codes, then float queries against codes, then stored vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.runtimes.codes import asymmetric_scores
from edgelm.runtimes.index import scan
from edgelm.runtimes.index.approximate import Lists
from edgelm.runtimes.index.checks import check_codes, check_floats
from edgelm.runtimes.index.snapshot import Snapshot
from edgelm.runtimes.rescoring import rescore

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]

# How many rows a hit the finer stages look at; benchmarks/retrieval.py measures them.
CANDIDATES, OVERSAMPLE = 40, 4


def search_rows(
    snapshot: Snapshot,
    lists: Lists | None,
    queries: NDArray[Any],
    k: int,
    *,
    shortlist: NDArray[np.uint8] | None,
    vectors: NDArray[np.float32] | None,
    candidates: int,
    oversample: int,
    threads: int,
) -> tuple[Rows, Scores]:
    """As `BinaryIndex.search_rows`; ``lists`` stand in for a scan of all codes."""
    manifest = snapshot.manifest
    for name, value in (
        ("k", k),
        ("candidates", candidates),
        ("oversample", oversample),
        ("threads", threads),
    ):
        if value < 1:
            raise InputError(
                f"The '{name}' of a search must be at least 1. Got {value} instead."
            )
    as_float = queries.dtype != np.uint8
    if as_float:
        check_floats(queries, manifest.bits, "queries")
        codes = np.packbits(queries > 0, axis=1) if shortlist is None else shortlist
    else:
        codes = queries
    check_codes(codes, manifest.bits)
    if len(codes) != len(queries):
        raise InputError(f"There are {len(queries)} queries but {len(codes)} codes.")
    codes = np.ascontiguousarray(codes)
    stored = snapshot.vectors
    if vectors is not None:
        if stored is None:
            raise InputError(
                f"{snapshot.index} stores no vectors to compare the queries' with."
            )
        check_floats(vectors, manifest.dimension, "vectors")
        if len(vectors) != len(queries):
            raise InputError(
                f"There are {len(queries)} queries but {len(vectors)} vectors."
            )
    read = k * oversample if vectors is not None else k
    wide = max(read, k * candidates) if as_float else read
    distances, rows = _nearest(snapshot, lists, codes, wide, threads)
    scores = (manifest.bits - distances).astype(np.float32)
    if as_float:
        for i, its in enumerate(rows):
            factors = None if snapshot.factors is None else snapshot.factors[its]
            query, codes = queries[i : i + 1], snapshot.codes[its]
            scores[i] = asymmetric_scores(query, codes, factors)[0]
        rows, scores = _best(rows, scores, read)
    if vectors is not None and stored is not None:
        for i, its in enumerate(rows):
            scores[i] = rescore(vectors[i], stored, its)
        rows, scores = _best(rows, scores, k)
    return rows, scores


def _nearest(
    snapshot: Snapshot,
    lists: Lists | None,
    codes: NDArray[np.uint8],
    k: int,
    threads: int,
) -> scan.Nearest:
    """The nearest rows that are not deleted, by Hamming distance."""
    k = min(k, len(snapshot))
    spare = min(len(snapshot.deleted), k)
    while True:
        if lists is not None:
            distances, rows = lists.nearest(codes, k + spare, threads)
        else:
            distances, rows = scan.nearest(codes, snapshot.codes, k + spare, threads)
        if not len(snapshot.deleted):
            return distances, rows
        gone = snapshot.is_deleted(rows)
        if spare == len(snapshot.deleted) or (gone.sum(axis=1) <= spare).all():
            # Deleted rows last, else the order as it is.
            order = np.argsort(gone, axis=1, kind="stable")[:, :k]
            distances = np.take_along_axis(distances, order, 1)
            return distances, np.take_along_axis(rows, order, 1)
        spare = min(4 * spare, len(snapshot.deleted))


def _best(rows: Rows, scores: Scores, k: int) -> tuple[Rows, Scores]:
    """The k best of each line; the lower row first among equals."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
