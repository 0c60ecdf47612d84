"""One contender of the latency suite, in a process of its own.

Reads requests as JSON lines from stdin, answers each with a JSON line on stdout. What a
request holds says what is done:

- ``texts``: all at once; ``seconds``, and ``latencies_ms`` of the calls.
- with ``single``: one by one. With ``batch``: that many at a time. With ``threads``: one by
  one, by that many threads that share the model.
- with ``warm``: one by one until it is steady; ``warm_up`` tells.
- with ``tokens``: nothing is run; the answer's ``texts`` are made of these and have that many tokens.
- ``describe``: nothing is run; the answer says what the model is.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from edgelm.bundle import is_bundle
from edgelm.errors import EdgelmError
from edgelm.evaluate.identity import identity
from edgelm.evaluate.steady import warm_up
from edgelm.runtimes import Analyzer, Embedder, EntityRecognizer, Model, Scorer, load
from edgelm.schema import plain


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


def memory_mib(pid: int | Literal["self"] = "self") -> float:
    """Proportional set size of a process, MiB; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0.0
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) / 1024 if match else 0.0


def answer(
    run: Callable[[Sequence[str]], Any], request: dict[str, Any]
) -> dict[str, Any]:
    """Do what one request asks for."""
    texts = request["texts"]
    size = 1 if {"single", "threads"} & set(request) else request.get("batch")
    batches = [texts[i : i + size] for i in range(0, len(texts), size)] if size else [texts]  # fmt: skip

    def timed(batch: Sequence[str]) -> float:
        start = time.perf_counter()
        run(batch)
        return (time.perf_counter() - start) * 1e3

    if request.get("warm"):
        found = warm_up(lambda i: timed([texts[i % len(texts)]]))
        return {"warm_up": plain(found)}
    began = time.perf_counter()
    if threads := request.get("threads"):
        with ThreadPoolExecutor(threads) as pool:
            latencies = list(pool.map(timed, batches))
    else:
        latencies = [timed(batch) for batch in batches]
    return {
        "seconds": time.perf_counter() - began,
        "latencies_ms": latencies,
        "memory_mib": memory_mib(),
    }


def texts_of(
    texts: Sequence[str], tokens: int, count: int, length: Callable[[str], int]
) -> list[str]:
    """Texts of a number of tokens, made of the words of others; one word's tokens may be missing.

    Args:
        texts: Where the words come from.
        tokens: How many tokens each shall have, special tokens included.
        count: How many texts.
        length: Tokens of a text.
    """
    words = " ".join(texts).split() or ["a"]
    made = []
    for i in range(count):
        start = i * len(words) // count
        ring = [words[(start + k) % len(words)] for k in range(tokens)]
        # The most words that fit; tokens never become fewer with more words.
        least, most = 1, len(ring)
        while least < most:
            middle = (least + most + 1) // 2
            fits = length(" ".join(ring[:middle])) <= tokens
            least, most = (middle, most) if fits else (least, middle - 1)
        made.append(" ".join(ring[:least]))
    return made


def _describe(model: Model, reference: str) -> dict[str, Any]:
    manifest = model.engine.manifest
    return {
        "runtime": model.engine.session.runtime,
        "precision": manifest.precision,
        "max_length": manifest.tokenizer.max_length,
        "identity": identity(reference, manifest),
    }


def _lengthened(model: Model, request: dict[str, Any]) -> dict[str, Any]:
    """Texts so long that an input has the tokens that are asked for; of a pair each has half."""
    pairs = isinstance(model, Scorer) and model.takes_pairs
    tokens = request["tokens"] // 2 if pairs else request["tokens"]
    found = texts_of(
        request["texts"],
        tokens,
        request["count"],
        lambda text: len(model.engine.tokenizer.encode(text)),
    )
    return {"texts": found}


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
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("describe"):
            reply = _describe(model, reference)
        elif "tokens" in request:
            reply = _lengthened(model, request)
        else:
            reply = answer(run, request)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
