"""How many batches should run at once here: measured once for a machine and a bundle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from edgelm.archive import cache_folder
from edgelm.bundle import MANIFEST, Bundle, file_digest
from edgelm.errors import require
from edgelm.golden import GoldenExample, load_golden
from edgelm.runtimes.engine import (
    TENSORRT,
    Engine,
    chosen_provider,
    cores,
    open_engine,
)
from edgelm.runtimes.openvino import PROVIDER

_ROUNDS = 3
# Texts of a turn for each worker: with fewer there is nothing to share out.
_TEXTS = 32


def choose_workers(
    bundle: Bundle, *, threads: int | None = None, provider: str | None = None
) -> int:
    """The number of workers that gives most texts a second here.

    One worker is measured against two, the better one against four, and so on up to the
    cores, taking turns on the golden texts, until more do not help. The answer is kept in
    the user's cache, by bundle, CPU, cores, runtime and its version; one that cannot be
    read is measured anew, one that cannot be written is not kept.

    Args:
        bundle: The bundle.
        threads: As for `edgelm.load`.
        provider: As for `edgelm.load`.

    Raises:
        EdgelmError: Whatever opening the bundle refuses.
    """
    most = cores()
    if most == 1:
        return 1
    path = _remembered(bundle, threads, provider)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["workers"]
        if type(known) is int and 1 <= known <= most:
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    best = _climb(bundle, most, threads, provider)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            whole = Path(work) / path.name
            whole.write_text(json.dumps({"workers": best}) + "\n", encoding="utf-8")
            os.replace(whole, path)
    return best


def _climb(bundle: Bundle, most: int, threads: int | None, provider: str | None) -> int:
    examples = load_golden(bundle)
    if not examples:
        return most
    best = open_engine(bundle, threads=threads, provider=provider)
    for count in _counts(most):
        more = open_engine(bundle, threads=threads, workers=count, provider=provider)
        wanted = _TEXTS * count
        texts = (examples * -(-wanted // len(examples)))[:wanted]
        for engine in (best, more):
            _seconds(engine, texts)
        turns = [(_seconds(best, texts), _seconds(more, texts)) for _ in range(_ROUNDS)]
        if median(one / other for one, other in turns) <= 1:
            break
        best = more
    return best.workers


def _counts(most: int) -> Iterator[int]:
    """2, 4, 8, ... and the cores themselves."""
    count = 2
    while count < most:
        yield count
        count *= 2
    yield most


def _seconds(engine: Engine, examples: list[GoldenExample]) -> float:
    paired = examples[0].pair is not None
    pairs = [example.pair or "" for example in examples] if paired else None
    began = time.perf_counter()
    engine.run(engine.tokenize([example.text for example in examples], pairs))
    return time.perf_counter() - began


def _remembered(bundle: Bundle, threads: int | None, provider: str | None) -> Path:
    chosen = chosen_provider(bundle, provider)
    modules = {PROVIDER: ("openvino", "openvino"), TENSORRT: ("tensorrt", "tensorrt")}
    module, extra = modules.get(chosen, ("onnxruntime", "ort"))
    key = [
        file_digest(bundle.path / MANIFEST),
        cpu_name(),
        cores(),
        chosen,
        require(module, extra).__version__,
        threads,
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_folder() / "workers" / f"{digest}.json"


def cpu_name() -> str:
    """The CPU's model, for people and to tell machines apart."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
