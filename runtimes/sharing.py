"""One model for many callers: the inputs of all of them run in common batches.

>>> model = share(edgelm.load("bundle"))  # any number of threads may use it
>>> with calling(Call(timeout_s=1.0)):
...     vectors = model.encode(["A man is playing a flute."])
>>> vectors = await in_thread(Call(), model.encode, ["A man is playing a flute."])
>>> close(model)  # answers what it accepted
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from edgelm.errors import InputError
from edgelm.runtimes.analysis import Analyzer
from edgelm.runtimes.batching import Batcher
from edgelm.runtimes.calls import Call, calling, current, in_thread
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import Engine, Row
from edgelm.runtimes.ner import EntityRecognizer
from edgelm.runtimes.scoring import Scorer

if TYPE_CHECKING:
    from tokenizers import Encoding

__all__ = ["Call", "SharedEngine", "calling", "close", "in_thread", "share"]

M = TypeVar("M", Embedder, EntityRecognizer, Scorer, Analyzer)

MAX_QUEUE = 1024


@dataclass(frozen=True)
class Asked:
    """An input and the outputs of the graph that its caller wants; callers of one batch may want others."""

    encoding: Encoding
    outputs: tuple[str, ...]

    def __len__(self) -> int:
        """Its tokens."""
        return len(self.encoding)


class SharedEngine(Engine):
    """An engine whose inputs go through a `Batcher`.

    Attributes:
        batcher: The queue.
    """

    def __init__(
        self, engine: Engine, *, max_batch_tokens: int | None, max_queue: int
    ) -> None:
        """Take an opened engine; `share` does it."""
        self.__dict__.update(engine.__dict__)
        self.batcher = Batcher(
            self._run_asked,
            max_tokens=max_batch_tokens or _batch_tokens(engine),
            max_queue=max_queue,
            workers=engine.workers,
        )

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[Encoding]:
        """As `Engine.tokenize`; a call may refuse texts that would be cut."""
        began = time.monotonic()
        encodings = super().tokenize(texts, pairs)
        call = current()
        if call is not None:
            call.tokenize_s += time.monotonic() - began
            if not call.cut:
                self._refuse_long(encodings)
        return encodings

    def run_outputs(
        self, encodings: Sequence[Encoding], outputs: tuple[str, ...]
    ) -> list[tuple[Row, ...]]:
        """As `Engine.run_outputs`, in common batches; errors are those of `Batcher.run`."""
        self.check_outputs(outputs)
        return self.batcher.run([Asked(e, outputs) for e in encodings], current())

    def _run_asked(self, asked: Sequence[Asked]) -> list[tuple[Row, ...]]:
        return self.run_batch([a.encoding for a in asked], [a.outputs for a in asked])

    def _refuse_long(self, encodings: Sequence[Encoding]) -> None:
        for i, encoding in enumerate(encodings):
            if encoding.overflowing:
                limit = self.manifest.tokenizer.max_length
                raise InputError(
                    f"Input {i} is longer than the {limit} tokens that the model takes. "
                    "Shorten it, or let it be cut with truncate."
                )


def _batch_tokens(engine: Engine) -> int:
    """What suits a graph: every input alone where its neighbours would matter."""
    dynamic = "DynamicQuantizeLinear" in engine.manifest.graph.operators
    return 1 if dynamic else engine.session.batch_tokens


def share(
    model: M, *, max_batch_tokens: int | None = None, max_queue: int = MAX_QUEUE
) -> M:
    """Make a model that any number of threads use at once, in common batches.

    Results do not depend on what else is in a batch: to 1e-5 in float32. A graph in dynamic int8
    takes the ranges of activations over a whole batch, so there neighbours do matter, about as
    much as int8 itself; such a graph therefore runs every input alone unless told otherwise, and
    the same text gives the same bits always.

    Args:
        model: What `edgelm.load` gave; it can still be used by itself. As many batches run at once
            as it has workers.
        max_batch_tokens: Limit of rows times longest row; what suits the graph and the
            runtime if not given; 1 runs every input alone.
        max_queue: Inputs that may wait.

    Returns:
        A model of the same kind. `close` ends its threads.

    Raises:
        InputError: A number is less than 1.
    """
    engine = SharedEngine(
        model.engine, max_batch_tokens=max_batch_tokens, max_queue=max_queue
    )
    return type(model)(engine)


def close(model: Embedder | EntityRecognizer | Scorer | Analyzer) -> None:
    """Close a shared model: it takes no more inputs and answers those that it has taken."""
    if isinstance(model.engine, SharedEngine):
        model.engine.batcher.close()
