"""One contender of the latency suite, in a process of its own.

Reads requests as JSON lines from stdin, answers each with a JSON line on stdout:
``{"texts": [...], "single": bool}`` gives ``runtime``, ``precision``, ``seconds``,
``memory_mib`` and with ``single`` ``latencies_ms``.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgelm.bundle import is_bundle
from edgelm.errors import EdgelmError
from edgelm.runtimes import Analyzer, Embedder, EntityRecognizer, Model, load


def open_any(reference: str, threads: int | None = None) -> Model:
    """Open a bundle in its runtime, or any other model in PyTorch.

    Args:
        reference: A bundle, a built-in name, a model folder or a hub id.
        threads: Threads of one inference; all cores if not given.
    """
    if is_bundle(reference):
        return load(reference, threads=threads)
    from edgelm.evaluate.reference import open_reference

    return open_reference(reference, threads=threads)


def runner(model: Model) -> Callable[[Sequence[str]], Any]:
    """What a model does with texts; pairs are made of neighbours."""
    if isinstance(model, Embedder):
        return model.encode
    if isinstance(model, EntityRecognizer):
        return model.extract
    if isinstance(model, Analyzer):
        return model.analyze
    if not model.takes_pairs:
        return model.score
    scorer = model
    return lambda texts: scorer.score(
        [(text, texts[i - 1]) for i, text in enumerate(texts)]
    )


def memory_mib() -> float:
    """Proportional set size of this process, MiB; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0.0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) / 1024 if match else 0.0


def answer(
    run: Callable[[Sequence[str]], Any], request: dict[str, Any]
) -> dict[str, Any]:
    """Do what one request asks for."""
    texts = request["texts"]
    latencies = []
    began = time.perf_counter()
    if request.get("single"):
        for text in texts:
            start = time.perf_counter()
            run([text])
            latencies.append((time.perf_counter() - start) * 1e3)
    else:
        run(texts)
    return {
        "seconds": time.perf_counter() - began,
        "latencies_ms": latencies,
        "memory_mib": memory_mib(),
    }


def main() -> None:
    """Answer requests until stdin ends."""
    reference = sys.argv[1]
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        model = open_any(reference, threads)
    except EdgelmError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    run = runner(model)
    about = {
        "runtime": model.engine.session.runtime,
        "precision": model.engine.manifest.precision,
    }
    for line in sys.stdin:
        print(json.dumps({**about, **answer(run, json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
