"""Where a bundle's time goes: by group of operators, and against this machine's matrix products alone."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tokenizers import Encoding

from edgelm.bundle import Bundle, is_bundle, open_bundle
from edgelm.errors import InputError, require
from edgelm.evaluate.ceiling import gemm_ceilings
from edgelm.evaluate.contender import runner
from edgelm.evaluate.operators import GROUPS, OTHER, Product
from edgelm.evaluate.recording import Recorder, check_calls, open_recorder
from edgelm.runtimes import wrap
from edgelm.runtimes.engine import Engine, open_engine
from edgelm.runtimes.session import Arrays

TOKENISE = "tokenise"
UNACCOUNTED = "unaccounted"


def profile(
    reference: str, texts: Sequence[str], *, rounds: int = 3, threads: int | None = None
) -> dict[str, Any]:
    """Say where the time goes for texts in one call, with one worker.

    Args:
        reference: A bundle.
        texts: What to run; where the task scores pairs, each is paired with the next.
        rounds: Turns, after one that warms up; the one of median time is shown.
        threads: Of one inference; all cores if not given.

    Returns:
        Plain data. ``groups``: ms a text and share of the wall clock of each group of
        operators (`edgelm.evaluate.operators`), of tokenising, and of what no clock
        covered: batching, and the runtime between its operators. ``other``: the operators
        of that group. ``products``: the weighted products' 10^9 operations a second beside
        those of the same shapes alone.

    Raises:
        InputError: What was named is not a bundle, or there is no text.
        MissingExtraError: What reads graphs is not installed.
        SessionError: The runtime did not record all of it.
    """
    bundle = check_profiled(reference)
    if not texts:
        raise InputError("There are no texts to profile with.")
    graph = bundle.file(bundle.manifest.graph.file)
    with tempfile.TemporaryDirectory() as work:
        session = _Counting(open_recorder(bundle, graph, Path(work), threads))
        opened = open_engine(bundle, threads=threads)
        engine = _Timed(opened.name, opened.manifest, opened.tokenizer, session)
        engine.coder, engine.head = opened.coder, opened.head
        engine.heads = opened.heads
        run = runner(wrap(engine))
        run(texts)
        turns = []
        for _ in range(rounds):
            first, engine.seconds = len(session.rows), 0.0
            began = time.perf_counter()
            run(texts)
            wall = time.perf_counter() - began
            turns.append((wall, engine.seconds, first, len(session.rows)))
        recording = session.recorder.finish()
    check_calls(recording, len(session.rows))
    wall, tokenising, first, last = sorted(turns)[len(turns) // 2]
    took: dict[str, float] = defaultdict(float)
    for call in recording.calls[first:last]:
        for name, each in call.items():
            took[name] += each
    ms = dict.fromkeys((TOKENISE, *GROUPS, OTHER, UNACCOUNTED), 0.0)
    ms[TOKENISE] = tokenising * 1e3
    groups = recording.operators.groups
    for name, each in took.items():
        ms[groups.get(name, OTHER)] += each
    ms[UNACCOUNTED] = wall * 1e3 - sum(ms.values())
    other = [name for name in took if groups.get(name, OTHER) == OTHER]
    rows = session.rows[first:last]
    products = {
        name: found
        for name, found in recording.operators.products.items()
        if name in took
    }
    return {
        "runtime": session.runtime,
        "texts": len(texts),
        "turns": rounds,
        "threads": threads,
        "wall_ms": wall * 1e3,
        "texts_per_s": len(texts) / wall,
        "groups": [
            {"name": n, "ms_a_text": t / len(texts), "share": t / wall / 1e3}
            for n, t in ms.items()
        ],
        "other": [
            {
                "node": name,
                "operator": recording.operators.kinds.get(name, ""),
                "share": took[name] / wall / 1e3,
            }
            for name in sorted(other, key=lambda n: -took[n])
        ],
        "products": _compare(bundle, products, took, rows, len(texts), threads),
    }


def check_profiled(reference: str) -> Bundle:
    """Open what shall be profiled.

    Raises:
        InputError: It is not a bundle.
        MissingExtraError: What reads graphs is not installed.
    """
    require("onnx", "export")
    if not is_bundle(reference):
        raise InputError(
            f"--profile looks into a bundle's runtime; {reference} is no bundle. Make one with edgelm export."
        )
    return open_bundle(reference)


def _compare(
    bundle: Bundle,
    products: Mapping[str, tuple[Product, ...]],
    took: Mapping[str, float],
    rows: Sequence[int],
    texts: int,
    threads: int | None,
) -> dict[str, Any] | None:
    """The weighted products as they ran, beside the same shapes alone; None without any."""
    every = [p for found in products.values() for p in found]
    seconds = sum(took[name] for name in products) / 1e3
    if seconds <= 0:
        return None
    shapes = sorted({(p.inputs, p.outputs) for p in every})
    usual = round(sum(rows) / len(rows))
    ceilings = gemm_ceilings(bundle, shapes, usual, threads)

    def operations(product: Product) -> int:
        return 2 * sum(rows) * product.inputs * product.outputs

    def mixed(whole: bool | None) -> float:
        """Of all products together: as they are, or all of integers, or of float."""
        kinds = [
            p if whole is None else Product(p.inputs, p.outputs, whole) for p in every
        ]
        return total / sum(operations(p) / ceilings[p] for p in kinds)

    total = sum(map(operations, every))
    reached, ceiling = total / seconds / 1e9, mixed(None)
    return {
        "gop_a_text": total / texts / 1e9,
        "rows_a_call": usual,
        "gops": reached,
        "ceiling_gops": ceiling,
        "share_of_ceiling": reached / ceiling,
        "int8_ceiling_gops": mixed(True),
        "float_ceiling_gops": mixed(False),
        "texts_per_s_at_ceiling": texts * ceiling / (total / 1e9),
        "shapes": [
            {
                "inputs": inputs,
                "outputs": outputs,
                "count": sum((p.inputs, p.outputs) == (inputs, outputs) for p in every),
                "int8_gops": ceilings[Product(inputs, outputs, True)],
                "float_gops": ceilings[Product(inputs, outputs, False)],
            }
            for inputs, outputs in shapes
        ],
    }


class _Timed(Engine):
    """An engine that adds up the seconds its tokenizer takes."""

    seconds = 0.0

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[Encoding]:
        began = time.perf_counter()
        try:
            return super().tokenize(texts, pairs)
        finally:
            self.seconds += time.perf_counter() - began


class _Counting:
    """A session that keeps how many rows, padding included, each call had."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.rows: list[int] = []
        self.provider = recorder.provider
        self.runtime = recorder.runtime
        self.batch_tokens = recorder.batch_tokens
        self.length_step = recorder.length_step

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self.rows.append(int(feeds["input_ids"].size))
        return self.recorder.run(feeds)
