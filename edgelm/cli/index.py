"""Commands of an index: build, add, delete, search, compact, info."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm import schema
from edgelm.cli.console import OUTPUT, emit, progress_bar, say, show_table
from edgelm.cli.run import THREADS, WORKERS
from edgelm.errors import InputError

if TYPE_CHECKING:
    from edgelm.runtimes.index.building import Added, Source
    from edgelm.runtimes.index.encoding import Encoder, TextEncoder

INDEX = click.argument("index", type=click.Path(path_type=Path))
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
DATA = click.argument("data", type=click.Path(path_type=Path, allow_dash=True))
FORMAT = click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "text", "jsonl"]),
    default="auto",
    show_default=True,
    help="Format of the data; auto goes by the file's name and takes stdin for text.",
)
TEXTS = click.option(
    "--texts/--no-texts",
    default=True,
    show_default=True,
    help="Store the documents' texts, so that searches return them.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.group()
def index() -> None:
    """Search texts by binary codes: a few bytes each, scanned in milliseconds.

    \b
    edgelm index build bundle corpus.jsonl -o index
    edgelm index search index bundle "who wrote the first program"
    """


@index.command()
@BUNDLE
@DATA
@click.option("-o", "--output", type=OUTPUT, required=True, help="The index to make.")
@click.option(
    "--vectors",
    type=click.Choice(["int8", "float16", "none"]),
    default="int8",
    show_default=True,
    help="How to store the vectors that rank the nearest codes; none stores only codes.",
)
@TEXTS
@FORMAT
@WORKERS
@THREADS
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Encode on a Ray cluster: host:port, auto, or local, which starts one here for the build.",
)
@click.option("--force", is_flag=True, help="Replace an index that is there already.")
@JSON
def build(
    bundle: Path,
    data: Path,
    output: Path,
    vectors: Any,
    texts: bool,
    form: str,
    workers: int,
    threads: int | None,
    address: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Encode the documents of DATA with BUNDLE: a text a line, or JSON lines with text and id.

    What an interruption leaves is taken up by the same command.

    \b
    edgelm index build bundle corpus.jsonl -o index
    """
    from edgelm.runtimes.index.building import build_index

    encoder = _encoder(bundle, threads, workers)
    with (
        _source(data, form) as source,
        _progress(data) as progress,
        _on(address, bundle, encoder) as by,
    ):
        added = build_index(
            output,
            by,
            source,
            vectors=None if vectors == "none" else vectors,
            texts=texts,
            force=force,
            progress=progress,
        )
    _report(output, added, as_json)


@index.command()
@INDEX
@BUNDLE
@DATA
@TEXTS
@click.option(
    "--replace", is_flag=True, help="Replace documents that have the same id."
)
@FORMAT
@WORKERS
@THREADS
@JSON
def add(
    index: Path,
    bundle: Path,
    data: Path,
    texts: bool,
    replace: bool,
    form: str,
    workers: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Add the documents of DATA to INDEX; BUNDLE must be the one that made it.

    \b
    edgelm index add index bundle more.jsonl
    """
    from edgelm.runtimes.index import BinaryIndex
    from edgelm.runtimes.index.building import add_documents

    opened = BinaryIndex(index)
    encoder = _encoder(bundle, threads, workers)
    with _source(data, form) as source, _progress(data) as progress:
        added = add_documents(
            opened, encoder, source, texts=texts, replace=replace, progress=progress
        )
    _report(index, added, as_json)


@index.command()
@INDEX
@click.argument("ids", nargs=-1)
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read ids from a file, one a line; - is stdin.",
)
def delete(index: Path, ids: tuple[str, ...], source: Path | None) -> None:
    """Delete documents from INDEX by their IDS: all of them or none.

    \b
    edgelm index delete index 4983 5836
    """
    from edgelm.runtimes.index import BinaryIndex

    if bool(ids) == (source is not None):
        raise click.UsageError("Give ids or --input, one of them.")
    opened = BinaryIndex(index)
    opened.delete(list(ids) if source is None else list(_texts(source)))
    say(f"{index} holds {len(opened)} documents")


@index.command()
@INDEX
@BUNDLE
@click.argument("queries", nargs=-1)
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read queries from a file, one a line; - is stdin.",
)
@click.option("-k", default=10, show_default=True, help="Number of documents to find.")
@click.option(
    "--candidates",
    type=click.IntRange(1),
    help="Per document to find: how many of the nearest codes are ranked by the float query.",
)
@click.option(
    "--oversample",
    type=click.IntRange(1),
    help="Per document to find: how many of the best of these are ranked by their stored vectors.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Scan all codes, even in a large index with inverted lists.",
)
@click.option(
    "--truncate", is_flag=True, help="Cut queries that are longer than the model takes."
)
@THREADS
def search(
    index: Path,
    bundle: Path,
    queries: tuple[str, ...],
    source: Path | None,
    k: int,
    candidates: int | None,
    oversample: int | None,
    exact: bool,
    truncate: bool,
    threads: int | None,
) -> None:
    """Find the documents of INDEX nearest to QUERIES; a JSON line each on stdout.

    \b
    edgelm index search index bundle "who wrote the first program" -k 3
    """
    from edgelm.runtimes.index import BinaryIndex
    from edgelm.runtimes.index.building import batched
    from edgelm.runtimes.index.search import CANDIDATES, OVERSAMPLE

    if bool(queries) == (source is not None):
        raise click.UsageError("Give queries or --input, one of them.")
    opened = BinaryIndex(index)
    encoder = _encoder(bundle, threads, 1)
    opened.check_encoder(encoder.info)
    for texts in batched(queries if source is None else _texts(source), 64):
        encoded = encoder.queries(texts, truncate=truncate)
        found = opened.search(
            encoded.rows,
            k,
            shortlist=encoded.codes,
            vectors=encoded.vectors if opened.manifest.vectors else None,
            candidates=candidates or CANDIDATES,
            oversample=oversample or OVERSAMPLE,
            exact=exact,
            threads=threads,
        )
        for text, hits in zip(texts, found, strict=True):
            emit({"query": text, "hits": [schema.plain(hit) for hit in hits]})


@index.command()
@INDEX
@click.option(
    "--lists",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Make inverted lists: faster and not exact; auto goes by the number of documents.",
)
def compact(index: Path, lists: Any) -> None:
    """Write the files of INDEX anew, without what was deleted.

    \b
    edgelm index compact index
    """
    from edgelm.runtimes.index import BinaryIndex

    opened = BinaryIndex(index)
    opened.compact(lists)
    say(f"{index} holds {len(opened)} documents; {_approximate(opened.manifest)}")


@index.command()
@INDEX
@click.option(
    "--verify", is_flag=True, help="Read all of it and compare the checksums."
)
@JSON
def info(index: Path, verify: bool, as_json: bool) -> None:
    """Say what INDEX holds and which encoder made it.

    \b
    edgelm index info index --verify
    """
    from edgelm.runtimes.index import BinaryIndex

    opened = BinaryIndex(index)
    if verify:
        opened.verify()
    about = schema.plain(opened.manifest)
    files = {name: state["size"] for name, state in about.pop("files").items()}
    about = {
        "kind": "index",
        "documents": len(opened),
        "deleted": about.pop("rows") - len(opened),
        **about,
        "files": files,
        "verified": verify,
    }
    if as_json:
        emit(about)
        return
    show_table(str(index), ("", ""), list(about.items()))


def _approximate(manifest: Any) -> str:
    about = manifest.approximate
    if about is None:
        return "every search scans all codes"
    return f"a search scans {about.probes} of {about.lists} lists, which hold {about.recall:.1%} of the ten nearest"


def _encoder(bundle: Path, threads: int | None, workers: int) -> TextEncoder:
    import edgelm
    from edgelm.runtimes.index.encoding import TextEncoder

    embedder = edgelm.load(bundle, threads=threads, workers=workers)
    if not isinstance(embedder, edgelm.Embedder):
        raise InputError(f"{bundle} gives no vectors. Use an embedding bundle.")
    return TextEncoder(embedder)


@contextmanager
def _on(address: str | None, bundle: Path, encoder: TextEncoder) -> Iterator[Encoder]:
    """The encoder itself, or a Ray cluster that does its work."""
    if address is None:
        yield encoder
        return
    from edgelm.bundle import open_bundle
    from edgelm.runtimes.index.cluster import connect

    with connect(address, open_bundle(bundle), encoder) as cluster:
        yield cluster


@contextmanager
def _source(data: Path, form: str) -> Iterator[Source]:
    from edgelm.lines import open_binary
    from edgelm.runtimes.index.building import Source

    suffixes = [s for s in data.suffixes if s not in (".gz", ".zst")]
    as_json = form == "jsonl" or (
        form == "auto" and suffixes[-1:] in ([".jsonl"], [".ndjson"])
    )
    if str(data) == "-":
        yield Source("stdin", sys.stdin.buffer, as_json)
        return
    with open_binary(data) as lines:
        yield Source(str(data), lines, as_json)


@contextmanager
def _progress(data: Path) -> Iterator[Callable[[int], None]]:
    total = None
    if data.is_file() and data.suffix not in (".gz", ".zst"):
        with data.open("rb") as stream:
            total = sum(
                block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b"")
            )
    with progress_bar(f"encoding {data.name}") as update:
        yield lambda lines: update(f"encoding {data.name}", lines, total)


def _texts(source: Path) -> Iterator[str]:
    """Lines of a file that are not empty."""
    from edgelm.lines import numbered_lines, open_binary

    name = "stdin" if str(source) == "-" else str(source)
    stream = sys.stdin.buffer if str(source) == "-" else open_binary(source)
    with stream:
        for _, line in numbered_lines(stream, name):
            if text := line.strip():
                yield text


def _report(index: Path, added: Added, as_json: bool) -> None:
    if as_json:
        emit({"index": str(index), **schema.plain(added)})
    say(
        f"{index}: {added.documents} documents"
        + (f", {added.truncated} cut to what the model takes" * bool(added.truncated))
        + (f", taken up after line {added.resumed}" * bool(added.resumed))
    )


COMMANDS = {"index": index}
