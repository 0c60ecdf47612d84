"""The bundles that are served, by name and by task."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgelm
from edgelm.errors import InputError
from edgelm.manifest import Manifest
from edgelm.runtimes import Model
from edgelm.runtimes.analysis import Analyzer
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.index import BinaryIndex
from edgelm.runtimes.index.encoding import TextEncoder
from edgelm.runtimes.ner import EntityRecognizer
from edgelm.runtimes.scoring import Scorer
from edgelm.runtimes.service.replies import Refusal
from edgelm.runtimes.sharing import SharedEngine, share

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GIVES: dict[type[Model], str] = {
    Embedder: "vectors",
    EntityRecognizer: "entities",
    Scorer: "scores",
    Analyzer: "the answers of several heads",
}


@dataclass
class Served:
    """A shared model under its name.

    Attributes:
        name: What a request's ``model`` says.
        model: The shared model.
        since: When it was opened, Unix time.
        seconds: How long its latest requests took.
    """

    name: str
    model: Model
    since: int = field(default_factory=lambda: int(time.time()))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    @cached_property
    def heads(self) -> tuple[Served, ...]:
        """Its heads, each called ``NAME/HEAD`` and with the queue of the whole; none where it has one."""
        if not isinstance(self.model, Analyzer):
            return ()
        models: dict[str, Model] = dict(self.model.heads)
        if self.model.embedder is not None:
            models["embedding"] = self.model.embedder
        return tuple(
            Served(f"{self.name}/{head}", model, self.since, self.seconds)
            for head, model in models.items()
        )

    @property
    def engine(self) -> SharedEngine:
        """Its engine."""
        assert isinstance(self.model.engine, SharedEngine)
        return self.model.engine

    @property
    def manifest(self) -> Manifest:
        """What is known of it."""
        return self.engine.manifest

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer without truncation."""
        from tokenizers import Tokenizer

        whole = Tokenizer.from_str(self.engine.tokenizer.to_str())
        whole.no_truncation()
        return whole


class Search:
    """An index and the encoder of its queries.

    Attributes:
        encoder: Of queries.
        served: The model that it is.
        latest: The index as it was when it was opened last.
    """

    def __init__(
        self, index: BinaryIndex, encoder: TextEncoder, served: Served
    ) -> None:
        """Take an opened index that the encoder made."""
        self.encoder, self.served = encoder, served
        self.latest = index
        self._lock = threading.Lock()

    def index(self) -> BinaryIndex:
        """The index as it is now, for one request: others change it, and later requests get another object.

        Raises:
            BinaryIndexError: It was replaced by one of another encoder, or is damaged.
        """
        with self._lock:
            if not self.latest.is_current():
                fresh = BinaryIndex(self.latest.path)
                fresh.check_encoder(self.encoder.info)
                self.latest = fresh
            return self.latest


class Models:
    """What is served.

    Attributes:
        all: Every model, in the order of the command line.
        search: What `/search` uses, if there is an index.
    """

    def __init__(self, served: Sequence[Served], index: Path | None = None) -> None:
        """Take shared models, and an index that one of them encoded.

        Raises:
            InputError: Two have one name, or none made the codes of the index.
            BinaryIndexError: The index is damaged or too new.
        """
        self.all = tuple(served)
        own = {one.name for one in served}
        self._by_name = {o.name: o for one in served for o in (one, *one.heads)}
        if len(own) < len(self.all):
            names = ", ".join(one.name for one in served)
            raise InputError(
                f"Every bundle needs a name of its own. Got {names}; write NAME=PATH."
            )
        self.search = None if index is None else self._open(index)

    def pick(self, name: str | None, *kinds: type[Model]) -> Served:
        """The model that a request means: the one it names or a head of it, else the first that fits.

        Raises:
            Refusal: There is no such model, or it is for another task.
        """
        names = ", ".join(one.name for one in self.all)
        if name is not None and name not in self._by_name:
            raise Refusal(
                f"There is no model {name[:100]!r} here. There are: {names}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        offered = [self._by_name[name]] if name is not None else self.all
        for whole in offered:
            for one in (whole, *whole.heads):
                if not kinds or isinstance(one.model, kinds):
                    return one
        wanted = " or ".join(_GIVES[kind] for kind in kinds)
        raise Refusal(
            f"This route needs a bundle that gives {wanted}; {name or 'this server'} has none. "
            f"Served: {', '.join(f'{one.name} ({one.manifest.task})' for one in self.all)}.",
            param="model",
        )

    def _open(self, path: Path) -> Search:
        index = BinaryIndex(path)
        made_by = index.manifest.encoder
        for one in self._by_name.values():
            if isinstance(one.model, Embedder):
                encoder = TextEncoder(one.model)
                if made_by is not None and encoder.info.digest == made_by.digest:
                    return Search(index, encoder, one)
        maker = made_by.name if made_by else "an encoder that it does not name"
        raise InputError(
            f"The index {path} was made by {maker}, and no bundle served here is that encoder. Serve it too."
        )


def open_models(
    bundles: Sequence[str],
    *,
    max_batch_tokens: int | None,
    max_queue: int,
    **options: Any,
) -> list[Served]:
    """Open bundles, each a path or ``NAME=PATH``; the name of a path is its last part.

    Args:
        bundles: The bundles.
        max_batch_tokens: As for `share`.
        max_queue: As for `share`.
        options: As for `edgelm.load`.

    Raises:
        EdgelmError: As `edgelm.load`.
    """
    served = []
    for bundle in bundles:
        name, equals, path = bundle.partition("=")
        if not equals or "/" in name:
            path = bundle
            name = Path(path).resolve().name.removesuffix(".tar.zst")
        model = edgelm.load(path, **options)
        shared: Model = share(  # type: ignore[type-var]
            model, max_batch_tokens=max_batch_tokens, max_queue=max_queue
        )
        served.append(Served(name, shared))
    return served


def model_type(manifest: Manifest) -> Mapping[str, Any]:
    """What text-embeddings-inference calls ``model_type``."""
    if manifest.task == "embedding" and manifest.embedding is not None:
        return {"embedding": {"pooling": manifest.embedding.pooling}}
    heads = manifest.heads.values()
    scorings = (manifest.scoring, *(head.scoring for head in heads))
    recognizers = (manifest.ner, *(head.ner for head in heads))
    info = next((i for i in (*scorings, *recognizers) if i is not None), None)
    labels = dict(enumerate(info.labels if info else ()))
    ids = {
        "id2label": {str(i): label for i, label in labels.items()},
        "label2id": {label: i for i, label in labels.items()},
    }
    pair = manifest.scoring is not None and manifest.scoring.inputs == "pair"
    return {"reranker" if pair else "classifier": ids}
