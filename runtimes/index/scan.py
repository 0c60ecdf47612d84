"""The nearest codes by Hamming distance: exact, over memory that is mapped.

faiss's own kernels (the ones of IndexBinaryFlat) run on the mapped codes as they lie, so nothing is copied
and the page cache is the only memory. With several threads each scans a part of the codes: one query is
as parallel as a batch. Without faiss, numpy does the same, some ten times slower.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Nearest = tuple[NDArray[np.int32], NDArray[np.int64]]

# Fewer codes than this are scanned sooner than a second thread starts.
_PER_THREAD = 1 << 15
# Codes that numpy compares at once: distances of a block stay in the cache.
_BLOCK = 1 << 14
_BITS_OF_BYTE = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def nearest(
    queries: NDArray[np.uint8], codes: NDArray[np.uint8], k: int, threads: int = 1
) -> Nearest:
    """Find the nearest codes of each query.

    Args:
        queries: uint8 ``[q, bytes]``, contiguous.
        codes: uint8 ``[n, bytes]``, contiguous; may be mapped.
        k: How many; at most n are found.
        threads: Threads to use.

    Returns:
        Distances in bits, int32, and rows, int64, ``[q, min(k, n)]``: nearest first, the lower row first among equals.
    """
    n = len(codes)
    k = min(k, n)
    if k == 0 or not len(queries):
        shape = (len(queries), k)
        return np.zeros(shape, np.int32), np.zeros(shape, np.int64)
    kernel = _faiss_nearest if has_faiss() else _numpy_nearest
    parts = max(1, min(threads, n // _PER_THREAD))
    if parts == 1:
        return in_order(*kernel(queries, codes, k), k)
    bounds = np.linspace(0, n, parts + 1).astype(int)

    def scan(low: int, high: int) -> Nearest:
        distances, rows = kernel(queries, codes[low:high], min(k, high - low))
        return distances, rows + low

    found = list(_pool(parts).map(scan, bounds[:-1], bounds[1:]))
    return merge(found, k)


def merge(found: list[Nearest], k: int) -> Nearest:
    """The nearest of several findings over different rows."""
    distances = np.concatenate([part[0] for part in found], axis=1)
    rows = np.concatenate([part[1] for part in found], axis=1)
    return in_order(distances, rows, k)


def in_order(distances: NDArray[np.int32], rows: NDArray[np.int64], k: int) -> Nearest:
    """The first k by distance, then by row."""
    # One key for both; a row takes at most 40 bits.
    order = np.argsort((distances.astype(np.int64) << 40) + rows, axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)


@lru_cache(maxsize=1)
def has_faiss() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="edgelm-index")


def _faiss_nearest(
    queries: NDArray[np.uint8], codes: NDArray[np.uint8], k: int
) -> Nearest:
    import faiss

    # OpenMP's setting belongs to the calling thread: ours scan alone, the user's is put back.
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        # hc (heaps), not mc (counters): 2 % to 14 % faster, and indifferent to k.
        distances, rows = faiss.knn_hamming(queries, codes, k, variant="hc")
    finally:
        faiss.omp_set_num_threads(before)
    return distances, rows


def _numpy_nearest(
    queries: NDArray[np.uint8], codes: NDArray[np.uint8], k: int
) -> Nearest:
    best: list[Nearest] = []
    for query in queries:
        distances = np.concatenate(
            [
                distances_to(query, codes[i : i + _BLOCK])
                for i in range(0, len(codes), _BLOCK)
            ]
        )
        # Distance and row in one key, so that equals are cut at the lower row.
        keys = (distances.astype(np.int64) << 40) + np.arange(len(codes))
        rows = np.argpartition(keys, k - 1)[:k]
        best.append((distances[rows], rows))
    return np.stack([d for d, _ in best]), np.stack([r for _, r in best])


def distances_to(
    query: NDArray[np.uint8], codes: NDArray[np.uint8]
) -> NDArray[np.int32]:
    """Hamming distances, int32 ``[n]``, of one query ``[bytes]`` to codes ``[n, bytes]``."""
    distances: NDArray[np.int32] = _BITS_OF_BYTE[codes ^ query].sum(1, dtype=np.int32)
    return distances
