"""Search by 256-bit codes, side by side: edgelm's index, faiss, usearch and numpy, in turns.

    python benchmarks/retrieval.py scan --rows 1000000,10000000 -o scan.json
    python benchmarks/retrieval.py lists --rows 1000000,10000000 -o lists.json

scan: exact search of random codes, for which time does not depend on what they are. edgelm is timed with its
ids and texts looked up, from files; faiss (IndexBinaryFlat) and usearch (exact) from memory; numpy counts
bits in blocks. Contenders take turns within one run, ratios are of the same turn.

lists: clustered codes (random ones have no neighbourhoods to find) in faiss's IVF, as the index makes it, and HNSW.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from edgelm.runtimes.index import BinaryIndex

BITS, K, BATCH = 256, 10, 64
STEP = 1 << 17
Contenders = dict[str, Callable[[Any], Any]]


def make_index(path: Path, codes: Any) -> BinaryIndex:
    """An index of codes with their numbers as ids."""
    index = BinaryIndex.create(path, BITS)
    with index.writer() as writer:
        for begin in range(0, len(codes), STEP):
            part = codes[begin : begin + STEP]
            ids = [str(i) for i in range(begin, begin + len(part))]
            writer.add(ids, part)
    index.refresh()
    return index


def in_turns(contenders: Contenders, queries: Any, turns: int) -> dict[str, Any]:
    """Milliseconds a query, and ratios to faiss (or the first) of the same turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for search in contenders.values():
        search(queries)
    for turn in range(turns):
        order = list(contenders)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            began = time.perf_counter()
            contenders[name](queries)
            times[name].append((time.perf_counter() - began) * 1e3 / len(queries))
    base = times[next(iter(contenders))]
    return {
        name: {
            "ms": round(median(each), 4),
            "fastest_ms": round(min(each), 4),
            "ratio": round(median(t / b for t, b in zip(each, base, strict=True)), 3),
        }
        for name, each in times.items()
    }


def resident_mib(kind: str) -> float:
    """RssAnon or RssFile of this process."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(kind):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(kind)


def numpy_scan(codes: Any) -> Callable[[Any], Any]:
    words = codes.view(np.uint64)

    def search(queries: Any) -> None:
        for query in queries.view(np.uint64):
            distances = np.empty(len(words), np.uint16)
            for begin in range(0, len(words), STEP):
                block = words[begin : begin + STEP] ^ query
                np.bitwise_count(block).sum(
                    1, np.uint16, distances[begin : begin + STEP]
                )
            np.argpartition(distances, K)[:K]

    return search


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=140).print(table)


def finish(output: Path | None, title: str, rows: list[dict[str, Any]]) -> None:
    show(title, rows)
    about = {
        "cores": os.cpu_count(),
        "faiss": faiss.__version__,
        "numpy": np.__version__,
    }
    if output is not None:
        output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")


ROWS = click.option("--rows", default="1000000,10000000", show_default=True)
OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path))
TURNS = click.option("--turns", default=7, show_default=True)


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@ROWS
@TURNS
@click.option("--usearch-limit", default=1_000_000, show_default=True, help="Rows.")
@OUTPUT
def scan(rows: str, turns: int, usearch_limit: int, output: Path | None) -> None:
    """Exact search of random codes."""
    found: list[dict[str, Any]] = []
    for n in map(int, rows.split(",")):
        found += scan_codes(n, turns, with_usearch=n <= usearch_limit)
    finish(output, "Exact search; times are of a query", found)


def scan_codes(n: int, turns: int, *, with_usearch: bool) -> list[dict[str, Any]]:
    from usearch.index import MetricKind, ScalarKind
    from usearch.index import search as usearch_search

    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (n, BITS // 8), np.uint8)
    queries = random.integers(0, 256, (BATCH, BITS // 8), np.uint8)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_index(Path(folder) / "index", codes)
        anonymous = resident_mib("RssAnon")
        began = time.perf_counter()
        index = BinaryIndex(Path(folder) / "index")
        opened_ms = round((time.perf_counter() - began) * 1e3, 2)
        index.search(queries[:1])
        own = round(resident_mib("RssAnon") - anonymous, 1)
        anonymous = resident_mib("RssAnon")
        flat = faiss.IndexBinaryFlat(BITS)
        flat.add(codes)
        flat_mib = round(resident_mib("RssAnon") - anonymous, 1)
        for threads, batch in ((1, 1), (1, BATCH), (2, 1), (2, BATCH)):
            faiss.omp_set_num_threads(threads)
            contenders: Contenders = {
                "faiss IndexBinaryFlat": lambda q: flat.search(q, K),
                "edgelm": partial(index.search, k=K, threads=threads),
            }
            if (threads, batch) == (1, 1):
                contenders["numpy"] = numpy_scan(codes)
            if with_usearch:
                contenders["usearch exact"] = partial(
                    lambda threads, q: usearch_search(
                        codes,
                        q,
                        K,
                        MetricKind.Hamming,
                        exact=True,
                        threads=threads,
                        dtype=ScalarKind.B1,
                    ),
                    threads,
                )
            times = turns if batch > 1 else 3 * turns
            measured = in_turns(contenders, queries[:batch], times)
            memory = {"edgelm": own, "faiss IndexBinaryFlat": flat_mib}
            for name, values in measured.items():
                found.append(
                    {
                        "codes": n,
                        "queries": batch,
                        "threads": threads,
                        "engine": name,
                        **values,
                        "own MiB": memory.get(name, ""),
                        "open ms": opened_ms if name == "edgelm" else "",
                    }
                )
    return found


@main.command()
@ROWS
@TURNS
@click.option("--hnsw-limit", default=1_000_000, show_default=True, help="Rows.")
@click.option(
    "--flips",
    default=0.15,
    show_default=True,
    help="Share of bits that differ from a centre's.",
)
@OUTPUT
def lists(
    rows: str, turns: int, hnsw_limit: int, flips: float, output: Path | None
) -> None:
    """Approximate search of clustered codes, one thread."""
    found: list[dict[str, Any]] = []
    for n in map(int, rows.split(",")):
        found += search_lists(n, turns, flips, with_hnsw=n <= hnsw_limit)
    finish(output, "Clustered codes, one query, one thread", found)


def search_lists(
    n: int, turns: int, flips: float, *, with_hnsw: bool
) -> list[dict[str, Any]]:
    faiss.omp_set_num_threads(1)
    codes, queries = clustered(n, flips)
    with tempfile.TemporaryDirectory() as folder:
        index = make_index(Path(folder) / "index", codes)
        began = time.perf_counter()
        index.make_lists(always=True)
        made = {"lists": round(time.perf_counter() - began, 1)}
        about = index.manifest.approximate
        contenders: Contenders = {
            "exact": partial(index.search, k=K, exact=True, threads=1),
            "lists": partial(index.search, k=K, threads=1),
        }
        _, exact = index.search_rows(queries, K, exact=True)
        _, scores = index.search_rows(queries, K)
        recall = {"lists": float((scores >= exact[:, -1:]).mean())}
        if with_hnsw:
            hnsw = faiss.IndexBinaryHNSW(BITS, 16)
            began = time.perf_counter()
            hnsw.add(codes)
            made["HNSW"] = round(time.perf_counter() - began, 1)
            hnsw.hnsw.efSearch = 64
            distances, _ = hnsw.search(queries, K)
            recall["HNSW"] = float((BITS - distances >= exact[:, -1:]).mean())
            contenders["HNSW"] = lambda q: hnsw.search(q, K)
        measured = in_turns(contenders, queries[:1], 3 * turns)
    probes = f"{about.probes}/{about.lists}" if about else "none made"
    return [
        {
            "codes": n,
            "flips": flips,
            "engine": name,
            **values,
            "recall": round(recall.get(name, 1.0), 4),
            "made s": made.get(name, ""),
            "probes": probes if name == "lists" else "",
        }
        for name, values in measured.items()
    ]


def clustered(n: int, flips: float) -> tuple[Any, Any]:
    """Codes around n / 200 centres, a share of the bits flipped; queries alike."""
    random = np.random.default_rng(0)
    centres = random.integers(0, 2, (max(2, n // 200), BITS), np.uint8)

    def near(count: int) -> Any:
        chosen = centres[random.integers(0, len(centres), count)]
        return np.packbits(
            chosen ^ (random.random(chosen.shape, np.float32) < flips), 1
        )

    codes = np.concatenate([near(min(STEP, n - i)) for i in range(0, n, STEP)])
    return codes, near(BATCH)


if __name__ == "__main__":
    main()
