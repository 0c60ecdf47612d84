"""The command run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from edgelm.cli.console import emit, say
from edgelm.cli.inputs import arguments, lines, parse_json, parse_text
from edgelm.cli.sign import TRUSTED_KEY
from edgelm.errors import InputError
from edgelm.lines import decode

PROVIDER = click.option(
    "--provider",
    help="Execution provider of ONNX Runtime, or OpenVINO.  [default: the target's]",
)
THREADS = click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads for one inference.  [default: all cores]",
)


class _Workers(click.IntRange):
    """A number, or the word auto."""

    name = "N|auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


WORKERS = click.option(
    "--workers",
    type=_Workers(1),
    default=1,
    show_default=True,
    help="Batches that run at once. As many as there are cores usually gives the most texts a second; "
    "auto measures it once for this machine and bundle.",
)
BUILD = click.option(
    "--build",
    is_flag=True,
    help="If the bundle needs a TensorRT engine and none fits this device, build one first; takes minutes.",
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Read texts from a file: one text per line, or JSON lines (.jsonl). - is stdin.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "text", "jsonl"]),
    default="auto",
    show_default=True,
    help="Format of the input; auto goes by the file's name and takes stdin for text.",
)
@click.option(
    "--output",
    type=click.Choice(
        ["vectors", "int8", "uint8", "binary", "codes", "query-codes", "queries"]
    ),
    default="vectors",
    show_default=True,
    help="Embedding bundles: float vectors; a byte (int8, uint8) or a bit (binary, in hex) for each number; "
    "packed binary codes (hex) of documents or of queries; or float query rows to score against codes.",
)
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    help="Embedding bundles: keep only the first N dimensions (Matryoshka).",
)
@click.option(
    "--long-texts",
    type=click.Choice(["truncate", "error", "windows"]),
    default="truncate",
    show_default=True,
    help="Embedding bundles: what to do with texts that are longer than the model takes.",
)
@click.option(
    "--strategy",
    type=click.Choice(["none", "simple", "first", "average", "max"]),
    default="first",
    show_default=True,
    help="Entity bundles: label tokens one by one (none) or merged (simple), or whole words by their first "
    "token, their average or their surest token (max).",
)
@click.option(
    "--unconstrained",
    is_flag=True,
    help="Entity bundles: take each token's best label, even where the scheme (BIO and so on) forbids the sequence.",
)
@click.option(
    "--units",
    type=click.Choice(["code-points", "utf-8", "utf-16"]),
    default="code-points",
    show_default=True,
    help="Entity bundles: what start and end count.",
)
@click.option(
    "--watch",
    is_flag=True,
    help="Answer each line of stdin as soon as it comes, for logs; Ctrl-C ends it quietly.",
)
@click.option(
    "--ner-index",
    type=click.Path(path_type=Path),
    help="Find entities with this index of labelled words (`edgelm ner-index build`).",
)
@PROVIDER
@BUILD
@THREADS
@WORKERS
@TRUSTED_KEY
def run(
    bundle: Path,
    texts: tuple[str, ...],
    source: Path | None,
    form: str,
    output: Any,
    ner_index: Path | None,
    dimensions: int | None,
    long_texts: Any,
    strategy: Any,
    unconstrained: bool,
    units: Any,
    watch: bool,
    provider: str | None,
    build: bool,
    threads: int | None,
    workers: int | Literal["auto"],
    trusted_keys: tuple[Path, ...],
) -> None:
    """Run BUNDLE on TEXTS, a file or stdin; a JSON line each on stdout.

    A bundle that scores pairs takes its TEXTS two at a time, lines with a tab
    between the two, or JSON lines with text1 and text2.

    \b
    edgelm run bundle "A man is playing a flute."
    edgelm run bundle --input texts.txt
    tail -f app.log | edgelm run bundle --watch
    """
    import edgelm
    from edgelm.runtimes import Analyzer, Embedder, EntityRecognizer, Model, Scorer
    from edgelm.runtimes.few_shot import FewShotRecognizer

    if texts and source is not None:
        raise click.UsageError("Give texts or --input, not both.")
    if not texts and source is None:
        if sys.stdin.isatty():
            raise click.UsageError("Give texts, or --input FILE (- for stdin).")
        source = Path("-")
    if watch and str(source) != "-":
        raise click.UsageError("--watch reads stdin; give no texts and no file.")
    loaded = edgelm.load(
        bundle,
        threads=threads,
        workers=workers,
        provider=provider,
        build=build and say,
        trusted_keys=trusted_keys or None,
    )
    model: Model | FewShotRecognizer = loaded
    if ner_index is not None:
        model = FewShotRecognizer(loaded.engine, ner_index)
    encoding = output != "vectors" or dimensions is not None or long_texts != "truncate"
    if encoding and not isinstance(model, Embedder):
        raise click.UsageError(
            "--output, --dimensions and --long-texts are for bundles of embedding models."
        )
    labelling = strategy != "first" or unconstrained or units != "code-points"
    if labelling and not isinstance(model, (EntityRecognizer, Analyzer)):
        raise click.UsageError(
            "--strategy, --unconstrained and --units are for bundles that find entities."
        )
    pairs = isinstance(model, Scorer) and model.takes_pairs

    def answer(rows: Sequence[Any]) -> Iterator[dict[str, Any]]:
        if isinstance(model, Embedder):
            found, cut = model.encode_with_truncation(
                rows, output=output, dimensions=dimensions, long_texts=long_texts
            )
            for text, row, long in zip(rows, found, cut, strict=True):
                yield {"text": text, **_embedding(row, output), "truncated": bool(long)}
        elif isinstance(model, FewShotRecognizer):
            for text, entities in zip(rows, model.extract(rows), strict=True):
                yield {"text": text, "entities": [asdict(e) for e in entities]}
        elif isinstance(model, EntityRecognizer):
            all_entities = model.extract(
                rows, strategy=strategy, constrained=not unconstrained, units=units
            )
            for text, entities in zip(rows, all_entities, strict=True):
                yield {"text": text, "entities": [asdict(e) for e in entities]}
        elif isinstance(model, Analyzer):
            answers, cut = model.analyze_with_truncation(
                rows, strategy=strategy, constrained=not unconstrained, units=units
            )
            for text, by_head, long in zip(rows, answers, cut, strict=True):
                told = {name: _answer(one) for name, one in by_head.items()}
                yield {"text": text, **told, "truncated": bool(long)}
        else:
            scores, cut = model.score_with_truncation(rows)
            for row, score, long in zip(rows, scores, cut, strict=True):
                yield {
                    **_inputs(row),
                    **_scores(model, score),
                    "truncated": bool(long),
                }

    if watch:
        _watch(answer, form, pairs)
        return
    chunks = arguments(texts, pairs) if source is None else lines(source, form, pairs)
    for rows in chunks:
        for line in answer(rows):
            emit(line)


def _watch(
    answer: Callable[[Sequence[Any]], Iterator[dict[str, Any]]], form: str, pairs: bool
) -> None:
    """Answer lines as they come, each alone; a line that cannot be used is said to be so, and passed over."""
    parse = parse_json if form == "jsonl" else parse_text
    # Ctrl-C is how a watch ends. As an exception of its own kind it may come up anywhere: a signal that
    # arrives just before a read is seen behind it.
    before = signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
            where = f"stdin, line {number}"
            try:
                row = parse(decode(line, where).rstrip("\r\n"), pairs, where)
                rows = list(answer([row]))
            except InputError as error:
                rows = [{"line": number, "error": str(error)}]
            for found in rows:
                emit(found)
    finally:
        signal.signal(signal.SIGINT, before)


def _embedding(row: Any, output: str) -> dict[str, Any]:
    if output in ("int8", "uint8"):
        return {"embedding": row.tolist()}
    if row.dtype == "uint8":
        return {"code": row.tobytes().hex()}
    return {"embedding": [round(float(x), 7) for x in row]}


def _answer(answer: Any) -> Any:
    """What a head of several says, for JSON."""
    if isinstance(answer, list):
        return [asdict(entity) for entity in answer]
    if isinstance(answer, dict):
        return {label: round(score, 7) for label, score in answer.items()}
    return round(answer, 7)


def _inputs(row: Any) -> dict[str, str]:
    return {"text": row} if isinstance(row, str) else {"text1": row[0], "text2": row[1]}


def _scores(model: Any, score: Any) -> dict[str, Any]:
    if len(model.labels) == 1:
        return {"score": round(float(score), 7)}
    return {
        "scores": {
            k: round(float(v), 7) for k, v in zip(model.labels, score, strict=True)
        }
    }


COMMANDS = {"run": run}
