"""Documents into an index: streamed, with bounded memory, and resumable."""

from __future__ import annotations

import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edgelm.atomic import check_free, new_folder
from edgelm.errors import InputError
from edgelm.lines import decode, parse_json
from edgelm.runtimes.index.binary_index import BinaryIndex
from edgelm.runtimes.index.encoding import Encoder
from edgelm.runtimes.index.manifest import MANIFEST, Progress, VectorType
from edgelm.runtimes.index.writer import Writer

# Lines that are encoded and written at once.
BATCH = 1024


@dataclass(frozen=True)
class Source:
    """Lines of documents.

    Attributes:
        name: For messages.
        lines: The lines, with their ends.
        as_json: Whether a line is a JSON object (``text``; ``id`` or ``_id``;
            ``title``) or a text. Without an id, a document's id is its line's number.
    """

    name: str
    lines: Iterable[bytes]
    as_json: bool


@dataclass(frozen=True)
class Added:
    """What became of the documents.

    Attributes:
        documents: How many were added, before an interruption included.
        truncated: How many of those added now were longer than the model takes.
        resumed: How many lines an interrupted build had taken in before.
    """

    documents: int
    truncated: int
    resumed: int = 0


def build_index(
    output: Path,
    encoder: Encoder,
    source: Source,
    *,
    vectors: VectorType | None = "int8",
    texts: bool = True,
    force: bool = False,
    progress: Callable[[int], None] = lambda lines: None,
) -> Added:
    """Encode documents and make an index of them.

    The index grows beside its place, as ``.NAME.partial``, and is moved there when
    it is complete. After an interruption the same call goes on behind the last batch.

    Args:
        output: The folder to make.
        encoder: What makes the codes.
        source: The documents.
        vectors: How to store the vectors, to rescore with; None for codes alone.
        texts: Keep the documents' texts.
        force: Replace an index that is there already.
        progress: Called after each batch with the number of lines so far.

    Raises:
        InputError: A document cannot be used, there is none, or an interrupted
            build was of other documents or settings.
        OutputExistsError: ``output`` is there already.
        BinaryIndexError: The index cannot be written; what was is kept.
    """
    check_free(output, marker=MANIFEST, force=force)
    partial = output.parent / f".{output.name}.partial"
    if not (partial / MANIFEST).is_file():
        dimension = encoder.dimension if vectors else 0
        BinaryIndex.create(
            partial,
            encoder.bits,
            encoder=encoder.info,
            vectors=vectors,
            dimension=dimension,
            factors=True,
        )
    index = BinaryIndex(partial)
    with index.writer() as writer:
        manifest, lines = writer.manifest, iter(source.lines)
        done = manifest.progress or Progress()
        if (
            (manifest.encoder, manifest.vectors) != (encoder.info, vectors)
            or manifest.bits != encoder.bits
            or _crc(islice(lines, done.lines)) != done.crc32
        ):
            raise InputError(
                f"{partial} is of a build that was interrupted, with other documents or settings. "
                "Repeat that one, or remove the folder."
            )
        truncated = _add(writer, index, encoder, source, lines, done, texts, progress)
        documents = writer.manifest.rows
    if not documents:
        shutil.rmtree(partial)
        raise InputError(f"{source.name} holds no documents.")
    index.make_lists()
    with new_folder(output, marker=MANIFEST, force=force) as work:
        work.rmdir()
        os.rename(partial, work)
    return Added(documents, truncated, done.lines)


def add_documents(
    index: BinaryIndex,
    encoder: Encoder,
    source: Source,
    *,
    texts: bool = True,
    replace: bool = False,
    progress: Callable[[int], None] = lambda lines: None,
) -> Added:
    """Encode documents and add them, a batch at a time.

    Args:
        index: The index; it must be the encoder's.
        encoder: What makes the codes.
        source: The documents.
        texts: Keep the documents' texts.
        replace: Take the place of documents that have the same id, instead of refusing them.
        progress: Called after each batch with the number of lines so far.

    Raises:
        InputError: A document cannot be used, or there is none; the batches before it are kept.
        BinaryIndexError: The index is of another encoder, or cannot be written.
    """
    index.check_encoder(encoder.info)
    with index.writer() as writer:
        before = writer.manifest.rows
        truncated = _add(
            writer,
            index,
            encoder,
            source,
            iter(source.lines),
            None,
            texts,
            progress,
            replace,
        )
        documents = writer.manifest.rows - before
    if not documents:
        raise InputError(f"{source.name} holds no documents.")
    index.refresh()
    return Added(documents, truncated)


def _add(
    writer: Writer,
    index: BinaryIndex,
    encoder: Encoder,
    source: Source,
    lines: Iterator[bytes],
    done: Progress | None,
    keep_texts: bool,
    progress: Callable[[int], None],
    replace: bool = False,
) -> int:
    """Add batch after batch; how many documents were cut."""
    truncated = 0
    done_lines, crc = (done.lines, done.crc32) if done else (0, 0)
    progress(done_lines)
    taken: deque[_Batch] = deque()

    def texts() -> Iterator[list[str]]:
        for batch in _batches(source, lines, done_lines, crc):
            taken.append(batch)
            yield [text for _, text in batch.documents]

    for encoded in encoder.stream(texts()):
        batch = taken.popleft()
        truncated += int(encoded.truncated.sum())
        has_vectors = index.manifest.vectors is not None
        try:
            writer.add(
                [name for name, _ in batch.documents],
                encoded.codes,
                texts=[text for _, text in batch.documents] if keep_texts else None,
                factors=encoded.factors if index.manifest.factors else None,
                vectors=index.pack(encoded.vectors) if has_vectors else None,
                replace_existing=replace,
                progress=Progress(batch.end, batch.crc32) if done else None,
            )
        except InputError as error:
            where = f"{source.name}, lines {batch.begin + 1} to {batch.end}"
            raise InputError(f"{where}: {error}") from error
        progress(batch.end)
    return truncated


@dataclass(frozen=True)
class _Batch:
    """Documents of some lines, id and text of each; and the CRC-32 of all lines so far."""

    documents: list[tuple[str, str]]
    begin: int
    end: int
    crc32: int


def _batches(
    source: Source, lines: Iterator[bytes], first: int, crc: int
) -> Iterator[_Batch]:
    """Batches that hold documents."""
    while batch := list(islice(lines, BATCH)):
        documents = list(_documents(source, batch, first))
        begin, first, crc = first, first + len(batch), _crc(batch, crc)
        if documents:
            yield _Batch(documents, begin, first, crc)


def _documents(
    source: Source, lines: list[bytes], before: int
) -> Iterator[tuple[str, str]]:
    """Id and text of every line that is not empty."""
    for number, line in enumerate(lines, before + 1):
        where = f"{source.name}, line {number}"
        text = decode(line, where).strip()
        if text:
            row = parse_json(text, where) if source.as_json else {"text": text}
            yield _document(row, str(number), where)


def _document(row: object, number: str, where: str) -> tuple[str, str]:
    fields = row if isinstance(row, dict) else {}
    text, title = fields.get("text"), fields.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        raise InputError(f"{where}: there is no string field text.")
    name = fields.get("id", fields.get("_id", number))
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: the id is neither a string nor a whole number.")
    return name, f"{title} {text}" if title else text


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of at most so many items."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _crc(lines: Iterable[bytes], crc: int = 0) -> int:
    for line in lines:
        crc = zlib.crc32(line, crc)
    return crc
