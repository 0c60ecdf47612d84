"""The on-device library: bundles to entities, vectors and scores. Never imports torch.

>>> import edgelm
>>> embedder = edgelm.load("bundle/")
>>> vectors = embedder.encode(["A man is playing a flute."])  # float32 [1, 384]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgelm.bundle import Bundle, open_bundle
from edgelm.runtimes.analysis import Analyzer
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import Engine, open_engine
from edgelm.runtimes.ner import Entity, EntityRecognizer
from edgelm.runtimes.ranking import Ranked, combine, rank
from edgelm.runtimes.scoring import Label, Scorer
from edgelm.runtimes.workers import choose_workers

if TYPE_CHECKING:
    from edgelm.runtimes.index import BinaryIndex

__all__ = [
    "Analyzer",
    "BinaryIndex",
    "Embedder",
    "Entity",
    "EntityRecognizer",
    "Label",
    "Ranked",
    "Scorer",
    "combine",
    "load",
    "rank",
]

Model = Embedder | EntityRecognizer | Scorer | Analyzer

TASKS: dict[str, type[Model]] = {
    "embedding": Embedder,
    "ner": EntityRecognizer,
    "scoring": Scorer,
    "multi": Analyzer,
}


def load(
    bundle: str | Path | Bundle,
    *,
    threads: int | None = None,
    workers: int | Literal["auto"] = 1,
    provider: str | None = None,
    trusted_keys: Sequence[str | Path | bytes] | None = None,
    build: bool | Callable[[str], None] = False,
) -> Model:
    """Open a bundle for its task.

    Args:
        bundle: A bundle's folder, its ``.tar.zst``, or a bundle opened already.
        threads: Threads of one inference; the cores, shared among the workers, if not given.
        workers: Batches that run at once. One, with all cores, answers soonest;
            as many as there are cores usually gives most texts a second; ``auto``
            measures it once for this machine and bundle (`edgelm.runtimes.workers`).
        provider: Execution provider of ONNX Runtime, or ``OpenVINO``; the one of the
            bundle's target if not given.
        trusted_keys: Ed25519 public keys (files, or PEM as bytes), one of which must have
            signed the bundle; extra ``sign``. If not given, nothing is asked of it.
        build: Where the bundle runs in TensorRT and no engine is kept that fits this device, build
            one, which takes minutes (as `edgelm build` does); a function is told what is
            being done. Without, that is an error.

    Returns:
        An `Embedder`, an `EntityRecognizer`, a `Scorer`, or an `Analyzer` where the bundle has several heads.

    Raises:
        InputError: ``threads`` or ``workers`` is less than 1.
        BundleError: The bundle is damaged, incomplete or too new.
        SignatureError: None of the trusted keys signed it as it is.
        SessionError: The runtime cannot be opened as asked.
        MissingExtraError: The runtime is not installed.
    """
    if not isinstance(bundle, Bundle):
        opened = open_bundle(bundle, trusted_keys=trusted_keys)
    elif trusted_keys is None:
        opened = bundle
    else:
        opened = open_bundle(bundle.archive or bundle.path, trusted_keys=trusted_keys)
    if workers == "auto":
        if build:  # one engine for all that are tried
            open_engine(opened, threads=threads, provider=provider, build=build)
        workers = choose_workers(opened, threads=threads, provider=provider)
    return wrap(
        open_engine(
            opened, threads=threads, workers=workers, provider=provider, build=build
        )
    )


def wrap(engine: Engine) -> Model:
    """Give an opened engine the face of its task."""
    return TASKS[engine.manifest.task](engine)


def __getattr__(name: str) -> Any:
    """`BinaryIndex` is imported when it is first used: most programs start without it."""
    if name == "BinaryIndex":
        from edgelm.runtimes.index import BinaryIndex

        return BinaryIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
