"""What the accuracy suite asks: a bundle, a model, a server or an index, behind one face."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import is_bundle
from edgelm.errors import InputError
from edgelm.evaluate.endpoint import Endpoint, is_endpoint
from edgelm.evaluate.identity import identity, of_folder
from edgelm.metrics import Span
from edgelm.runtimes import Analyzer, Embedder, Model, Scorer, load
from edgelm.runtimes.session import Arrays

if TYPE_CHECKING:
    from edgelm.evaluate.perplexity import Likelihood
    from edgelm.runtimes.index.encoding import Vectors

# Of a `Subject`, what says how it answers.
_ANSWERS = ("labels", "takes_pairs", "encode", "extract", "tags", "score")

Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """No progress."""


@dataclass(frozen=True)
class Subject:
    """Something that answers, by one function for each kind of answer that it gives.

    Attributes:
        name: What it was opened from.
        task: ``embedding``, ``ner``, ``scoring``, ``multi`` (several heads) or ``lm``.
        identity: What it is (`edgelm.evaluate.identity`).
        labels: In the order of its scores.
        takes_pairs: Whether what it scores is a pair of texts.
        encode: Texts, and ``query``, ``document`` or nothing, to float32 ``[n, dimension]``.
        extract: Texts to entities.
        tags: The labels of tokens that these are made of.
        score: Texts or pairs to float32 ``[n]`` or ``[n, labels]``.
        search: Texts and a number to ids of the nearest documents of an index, best first.
        likelihood: Texts to what a language model makes of them.
    """

    name: str
    task: str
    identity: Mapping[str, Any]
    labels: tuple[str, ...] = ()
    takes_pairs: bool = False
    encode: Callable[[Sequence[str], str], Vectors] | None = None
    extract: Callable[[Sequence[str]], list[set[Span]]] | None = None
    tags: tuple[str, ...] = ()
    score: Callable[[Sequence[Any]], NDArray[np.float32]] | None = None
    search: Callable[[Sequence[str], int], list[list[str]]] | None = None
    likelihood: Callable[[Sequence[str]], Likelihood] | None = None


@dataclass(frozen=True)
class Settings:
    """How subjects are opened.

    Attributes:
        threads: Threads of one inference; all cores if None.
        context: Of language models: longest window in tokens.
        stride: Of language models: tokens by which a window is moved.
    """

    threads: int | None = None
    context: int | None = None
    stride: int | None = None


def open_subject(
    reference: str, settings: Settings | None = None, progress: Progress = silent
) -> Subject:
    """Open whatever a reference names.

    Args:
        reference: A bundle, a built-in name, a model folder, a checkpoint, a hub id, or
            the address of a server (``http://...``; `Endpoint`).
        settings: How.
        progress: Called while it answers, with what it does, inputs done, and inputs in all.

    Raises:
        EdgelmError: It cannot be opened.
    """
    settings = settings or Settings()
    if is_endpoint(reference):
        return _of_endpoint(reference, progress)
    if is_bundle(reference):
        return of_model(load(reference, threads=settings.threads), reference, progress)
    import torch

    from edgelm.evaluate.reference import from_loaded
    from edgelm.models import load_model

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    loaded = load_model(reference)
    if loaded.task != "lm":
        return of_model(from_loaded(loaded), reference, progress)
    from edgelm.evaluate.perplexity import likelihood

    def of_texts(texts: Sequence[str]) -> Likelihood:
        return likelihood(
            loaded,
            texts,
            context=settings.context,
            stride=settings.stride,
            progress=lambda done, total: progress(f"{reference}: windows", done, total),
        )

    about = {
        "name": reference,
        "kind": "model",
        "task": "lm",
        "precision": "fp32",
        "source": {"name": loaded.name, "digest": loaded.source_digest},
        "steps": list(loaded.steps),
        **of_folder(reference, loaded.source_digest),
    }
    return Subject(reference, "lm", about, likelihood=of_texts)


def of_model(
    model: Model, name: str | None = None, progress: Progress = silent
) -> Subject:
    """An opened bundle or model; ``name`` is what it was opened from, if its identity is wanted."""
    manifest = model.engine.manifest
    about = {} if name is None else identity(name, manifest)
    shown = name or model.engine.name
    counted = _Counted(model.engine.session, shown, progress)
    if progress is not silent:
        model.engine.session = counted

    def counting(inputs: Sequence[Any]) -> None:
        counted.done, counted.total = 0, len(inputs)

    subject = Subject(shown, manifest.task, about)
    if isinstance(model, Embedder):
        embedder = model

        def encode(texts: Sequence[str], side: str) -> Vectors:
            counting(texts)
            return embedder.encode(texts, prompt=_prompt(embedder, side))

        return replace(subject, encode=encode)
    if isinstance(model, Scorer):
        scorer = model

        def score(inputs: Sequence[Any]) -> NDArray[np.float32]:
            counting(inputs)
            return scorer.score(inputs)

        return replace(
            subject, labels=model.labels, takes_pairs=model.takes_pairs, score=score
        )
    if isinstance(model, Analyzer):
        return _of_heads(model, subject)
    recognizer = model

    def extract(texts: Sequence[str]) -> list[set[Span]]:
        counting(texts)
        found = recognizer.extract(texts)
        return [{(e.start, e.end, e.label) for e in row} for row in found]

    return replace(subject, tags=tuple(recognizer.labels), extract=extract)


def _of_heads(model: Analyzer, subject: Subject) -> Subject:
    """Several heads: the first of each kind, and the encoder's own vectors."""
    faces = [of_model(head) for head in model.heads.values()]
    if model.embedder is not None:
        faces.append(of_model(model.embedder))
    for face in reversed(faces):  # so that the first one stays
        given = {k: v for k, v in vars(face).items() if k in _ANSWERS and v}
        subject = replace(subject, **given)
    return subject


def with_index(
    bundle: str,
    index: str,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Subject:
    """An index whose queries a bundle encodes; its documents are in it already.

    Raises:
        InputError: The bundle gives no vectors.
        BinaryIndexError: It is no index, or one that another encoder made.
    """
    from edgelm.runtimes.index import BinaryIndex
    from edgelm.runtimes.index.encoding import TextEncoder

    threads = (settings or Settings()).threads
    embedder = load(bundle, threads=threads) if is_bundle(bundle) else None
    if not isinstance(embedder, Embedder):
        raise InputError(
            f"{bundle} is no embedding bundle. An index is searched with the bundle that made it."
        )
    opened, encoder = BinaryIndex(index), TextEncoder(embedder)
    opened.check_encoder(encoder.info)

    def search(texts: Sequence[str], k: int) -> list[list[str]]:
        found = []
        for start in range(0, len(texts), 64):
            some = encoder.queries(texts[start : start + 64], truncate=True)
            rows = opened.search(
                some.rows,
                k,
                shortlist=some.codes,
                vectors=some.vectors if opened.manifest.vectors else None,
                threads=threads,
            )
            found += [[hit.id for hit in hits] for hits in rows]
            progress(f"{index}: queries", len(found), len(texts))
        return found

    about = {
        **identity(bundle, embedder.engine.manifest),
        "name": f"{index} by {bundle}",
        "kind": "index",
        "index": {
            "path": index,
            "documents": len(opened),
            "bits": opened.bits,
            "vectors": opened.manifest.vectors,
            "encoder": opened.manifest.encoder and opened.manifest.encoder.digest,
        },
    }
    return Subject(f"{index} by {bundle}", "embedding", about, search=search)


def _of_endpoint(reference: str, progress: Progress) -> Subject:
    endpoint = Endpoint(reference)

    def tell(total: int) -> Callable[[int], None]:
        return lambda done: progress(reference, done, total)

    about = {"name": reference, "kind": "endpoint", **endpoint.identity}
    subject = Subject(
        reference, endpoint.task, about, endpoint.labels, endpoint.takes_pairs
    )
    if endpoint.task == "embedding":
        return replace(
            subject, encode=lambda texts, side: endpoint.encode(texts, tell(len(texts)))
        )
    if endpoint.task == "ner":
        return replace(
            replace(subject, labels=(), tags=endpoint.labels),
            extract=lambda texts: [
                set(row) for row in endpoint.extract(texts, tell(len(texts)))
            ],
        )
    return replace(subject, score=lambda x: endpoint.score(x, tell(len(x))))


def _prompt(embedder: Embedder, side: str) -> str | None:
    """The prompt of a side of a search, by the names that models give to it."""
    names = {"query": ("query",), "document": ("document", "passage", "corpus")}
    return next((n for n in names.get(side, ()) if n in embedder.prompts), None)


class _Counted:
    """A session that tells how many inputs went through it; else as it was."""

    def __init__(self, session: Any, name: str, progress: Progress) -> None:
        self._session, self._name, self._progress = session, name, progress
        self.done, self.total = 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph once."""
        outputs: Arrays = self._session.run(feeds)
        self.done += len(feeds["input_ids"])
        self._progress(self._name, self.done, max(self.total, self.done))
        return outputs
