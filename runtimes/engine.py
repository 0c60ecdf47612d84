"""From texts to rows of the graph's output: what all tasks share."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import POOLED, TOKENS, Bundle
from edgelm.errors import BundleError, InputError, SessionError, require
from edgelm.manifest import CodesInfo, Manifest
from edgelm.runtimes.codes import Coder, load_coder
from edgelm.runtimes.heads import Head, open_heads
from edgelm.runtimes.openvino import PROVIDER, OpenVinoSession
from edgelm.runtimes.quantization import Ranges
from edgelm.runtimes.session import OnnxSession, Session
from edgelm.targets import load_target
from edgelm.targets.board import version_numbers

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# As edgelm.runtimes.tensorrt.session calls itself; TensorRT's own modules are loaded only
# where an engine is opened.
TENSORRT = "TensorRT"
# What runs a bundle for TensorRT where it is not installed, best first; never a CPU unasked.
_OTHERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
# The oldest ONNX Runtime that reads tables of 4 bits as export writes them: 1.22.1 refuses the attribute
# `bits` of GatherBlockQuantized, 1.23.0 takes it (github.com/microsoft/onnxruntime/pull/25214).
_LEAST_FOR_4_BITS = "1.23"
Row = NDArray[np.float32]


class Engine:
    """A tokenizer and a graph, opened.

    Attributes:
        name: What it was opened from, for messages.
        manifest: What is known of the model.
        session: What runs the graph.
        tokenizer: Its tokenizer. It cuts a long text into windows: the first is
            the truncated text, the others are its ``overflowing``.
        coder: What makes binary codes of its embeddings, where there is one.
        head: What is applied to the graph's output, where the graph has none for its task.
        heads: The same of the named heads of a bundle that has several, but for those in the graph.
        ranges: Of the values of its embeddings, where they were measured.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        tokenizer: Tokenizer,
        session: Session,
        workers: int = 1,
        coder: Coder | None = None,
        head: Head | None = None,
        ranges: Ranges | None = None,
        heads: Mapping[str, Head] | None = None,
    ) -> None:
        """Put a tokenizer and a session together; `open_engine` does it for a bundle.

        Args:
            name: What they were opened from.
            manifest: What is known of the model.
            tokenizer: Its tokenizer; padding and truncation are set here.
            session: What runs the graph.
            workers: Batches that run at once.
            coder: What makes binary codes of its embeddings.
            head: What is applied to the graph's output.
            ranges: Of the values of its embeddings.
            heads: The named heads outside of the graph.
        """
        self.coder = coder
        self.head = head
        self.heads = dict(heads or {})
        self.ranges = ranges
        self.workers = workers
        self.name = name
        self.manifest = manifest
        self.session = session
        self.tokenizer = tokenizer
        longest = manifest.tokenizer.max_length
        # Only token labels need what lies behind the first window.
        tasks = {manifest.task, *(head.task for head in manifest.heads.values())}
        stride = longest // 4 if "ner" in tasks else 0
        # Windows are read from the left; else the file says which side of a text is cut.
        side = "right" if stride else (tokenizer.truncation or {}).get("direction")
        tokenizer.no_padding()
        tokenizer.enable_truncation(longest, stride=stride, direction=side or "right")
        self._inputs = [tensor.name for tensor in manifest.graph.inputs]
        outputs = manifest.graph.outputs
        self._per_token = {t.name: "sequence" in t.shape for t in outputs}
        self._first = outputs[0].name

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> list[Encoding]:
        """Turn texts into tokens.

        Args:
            texts: The texts.
            pairs: The second text of each pair, where the model takes pairs.

        Returns:
            The encoding of each text, in order. A text that is longer than the
            model takes is cut; the rest is in ``overflowing``.

        Raises:
            InputError: Something among the texts is not a string.
        """
        check_texts(texts)
        if pairs is None:
            return self.tokenizer.encode_batch(list(texts))
        check_texts(pairs)
        return self.tokenizer.encode_batch(list(zip(texts, pairs, strict=True)))

    @property
    def source(self) -> str:
        """The output that the task's labels come from: the graph's own logits, or what the head reads."""
        if self.head is None:
            return self._first
        return TOKENS if self.head.features == "token" else POOLED

    def run(
        self, encodings: Sequence[Encoding], output: str | None = None
    ) -> list[Row]:
        """Run the graph on any number of inputs.

        Args:
            encodings: Inputs of at most ``max_length`` tokens; batches are made of
                inputs of like length.
            output: Which of the graph's outputs; the first if not given.

        Returns:
            For each input, in order, its row of the output. A row with a
            sequence axis is cut to the input's own length.

        Raises:
            BundleError: The graph has no such output.
        """
        return [row for (row,) in self.run_outputs(encodings, (output or self._first,))]

    def run_outputs(
        self, encodings: Sequence[Encoding], outputs: tuple[str, ...]
    ) -> list[tuple[Row, ...]]:
        """As `run`, for several outputs of one pass: for each input its row of each of them."""
        self.check_outputs(outputs)
        rows: list[tuple[Row, ...]] = [()] * len(encodings)

        def run(batch: list[int]) -> None:
            found = self.run_batch(
                [encodings[i] for i in batch], [outputs] * len(batch)
            )
            for row, i in zip(found, batch, strict=True):
                rows[i] = row

        lengths = [len(encoding) for encoding in encodings]
        todo = list(batches(lengths, self.session.batch_tokens))
        if self.workers == 1 or len(todo) == 1:
            for batch in todo:
                run(batch)
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                list(pool.map(run, todo))  # raises what a worker raised
        return rows

    def run_batch(
        self, encodings: Sequence[Encoding], outputs: Sequence[tuple[str, ...]]
    ) -> list[tuple[Row, ...]]:
        """Run the graph once, on one padded batch; each input may want other outputs."""
        found = self.session.run(self._collate(encodings))
        return [
            tuple(self._row(found, name, i, len(encoding)) for name in names)
            for i, (encoding, names) in enumerate(zip(encodings, outputs, strict=True))
        ]

    def check_outputs(self, outputs: Sequence[str]) -> None:
        """Raise `BundleError` unless there are all of these outputs."""
        for name in outputs:
            pooled = name == POOLED and TOKENS in self._per_token
            if name not in self._per_token and not pooled:
                raise BundleError(
                    f"The graph of {self.name} has no output {name}; it has {', '.join(self._per_token)}. "
                    "Export the bundle again with this output."
                )

    def _row(
        self, found: Mapping[str, NDArray[Any]], name: str, i: int, length: int
    ) -> Row:
        if name not in self._per_token:  # only the vectors of tokens: their mean
            mean: Row = found[TOKENS][i][:length].mean(axis=0)
            return mean
        row: Row = found[name][i]
        return row[:length] if self._per_token[name] else row

    def _collate(self, encodings: Sequence[Encoding]) -> dict[str, NDArray[Any]]:
        info = self.manifest.tokenizer
        longest = max(len(encoding) for encoding in encodings)
        if len(encodings) == 1:
            step = self.session.length_step
            longest = max(longest, min(-(-longest // step) * step, info.max_length))
        shape = (len(encodings), longest)
        feeds = {
            "input_ids": np.full(shape, info.pad_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.full(shape, info.pad_type_id, np.int64),
        }
        for row, encoding in enumerate(encodings):
            length = len(encoding)
            feeds["input_ids"][row, :length] = encoding.ids
            feeds["attention_mask"][row, :length] = 1
            feeds["token_type_ids"][row, :length] = encoding.type_ids
        return {name: feeds[name] for name in self._inputs}


def open_engine(
    bundle: Bundle,
    *,
    threads: int | None = None,
    workers: int = 1,
    provider: str | None = None,
    session: Session | None = None,
    build: bool | Callable[[str], None] = False,
) -> Engine:
    """Open a bundle. Arguments and errors are those of `edgelm.load`.

    A ``session`` that runs its graph already is used as it is.
    """
    manifest = bundle.manifest
    tokenizer = open_tokenizer(bundle)
    if workers < 1 or (threads is not None and threads < 1):
        raise InputError(
            f"Threads and workers must be at least 1. Got {threads} threads and {workers} workers instead."
        )
    # Alone, a runtime knows best: its own choice counts physical cores.
    each = max(1, cores() // workers) if threads is None and workers > 1 else threads
    if session is None:
        session = _open_session(
            bundle, chosen_provider(bundle, provider), each, workers, build
        )
    coder = None if manifest.codes is None else _open_coder(bundle, manifest.codes)
    head, heads = open_heads(bundle)
    ranges = None
    if manifest.embedding is not None and manifest.embedding.ranges is not None:
        info = manifest.embedding
        ranges = Ranges.load(bundle.file(str(info.ranges)), info.dimension)
    return Engine(
        bundle.name, manifest, tokenizer, session, workers, coder, head, ranges, heads
    )


def _open_session(
    bundle: Bundle,
    provider: str,
    threads: int | None,
    workers: int,
    build: bool | Callable[[str], None],
) -> Session:
    manifest = bundle.manifest
    if provider == TENSORRT:
        from edgelm.runtimes.tensorrt.builder import open_session

        return open_session(bundle, workers, build=build)
    graph = bundle.file(manifest.graph.file)
    if provider == PROVIDER:
        exact = manifest.precision == "fp32"
        return OpenVinoSession(graph, threads=threads, workers=workers, exact=exact)
    if provider == "CPUExecutionProvider" and manifest.precision == "bf16":
        raise SessionError(
            f"{bundle.name} computes in bf16, and ONNX Runtime has no bf16 products for CPUs. "
            f"Run it on {load_target(manifest.target).title}, or export it with --precision fp16."
        )
    check_onnxruntime(manifest, require("onnxruntime", "ort").__version__)
    exact = manifest.precision == "fp32"
    return OnnxSession(graph, provider, threads, exact=exact)


def check_onnxruntime(manifest: Manifest, version: str) -> None:
    """Refuse a version of ONNX Runtime that does not read the graph's table of 4 bits.

    Raises:
        SessionError: It is too old; the least version is named.
    """
    if "GatherBlockQuantized" not in manifest.graph.operators:
        return
    if version_numbers(version) < version_numbers(_LEAST_FOR_4_BITS):
        raise SessionError(
            f"The embedding table of this bundle has 4 bits, which ONNX Runtime reads from {_LEAST_FOR_4_BITS} on; "
            f"this is {version}. Update it, or export the bundle with --embedding-bits 8."
        )


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """A bundle's tokenizer.

    Raises:
        BundleError: It cannot be read.
    """
    from tokenizers import Tokenizer

    path = bundle.file(bundle.manifest.tokenizer.file)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise BundleError(f"{path} cannot be read: {error}") from error


def _open_coder(bundle: Bundle, info: CodesInfo) -> Coder:
    coder = load_coder(bundle.file(info.file))
    due = bundle.manifest.embedding
    if coder.digest != info.digest or due is None or coder.dimension != due.dimension:
        raise BundleError(
            f"The coder of {bundle.name} is not the one that its manifest describes. Export the bundle again."
        )
    return coder


def cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group inputs of like length.

    Args:
        lengths: Tokens of each input.
        max_tokens: Limit of rows times longest row; one long input is a batch of its own.

    Yields:
        Indices into ``lengths``, longest inputs first so that memory peaks at once.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def check_texts(texts: object) -> None:
    """Raise `InputError` unless ``texts`` is a sequence of strings that are Unicode."""
    if isinstance(texts, str):
        raise InputError(
            "Texts must be a list of strings. Got one string; write [text] instead."
        )
    if not isinstance(texts, Sequence) or isinstance(texts, (bytes, bytearray)):
        raise InputError(
            f"Texts must be a list of strings. Got {type(texts).__name__} instead."
        )
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"Text {i} must be a string. Got {type(text).__name__} instead."
            )
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"Text {i} holds half of a surrogate pair at position {error.start}, which is no character. "
                    "Remove it."
                ) from error


def chosen_provider(bundle: Bundle, asked: str | None) -> str:
    """What runs a bundle: what was asked for, else its target's; ONNX Runtime on its GPU for want of TensorRT."""
    if asked is not None:
        return asked
    target = load_target(bundle.manifest.target)
    if target.runtime == "none":
        raise SessionError(
            f"edgelm has no runtime for {target.title}: its ONNX graph is for other tools there. "
            "To run it on a CPU here, add --provider CPUExecutionProvider."
        )
    if target.runtime == "tensorrt":
        if importlib.util.find_spec("tensorrt") is not None:
            return TENSORRT
        if importlib.util.find_spec("onnxruntime") is not None:
            there = require("onnxruntime", "ort").get_available_providers()
            for other in _OTHERS:
                if other in there:
                    return other
        what = f"The bundle {bundle.name} is for {target.title}: its engine is built on the device."
        if bundle.manifest.precision != "bf16":
            what += " To run its ONNX graph on this CPU, add --provider CPUExecutionProvider."
        raise SessionError(what)
    return target.provider
