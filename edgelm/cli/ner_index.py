"""Commands of an index of labelled words: build."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm import schema
from edgelm.cli.console import OUTPUT, emit, say
from edgelm.cli.run import PROVIDER, THREADS


@click.group(name="ner-index")
def ner_index() -> None:
    """Find entities as a few labelled sentences show them, without training.

    \b
    edgelm export minilm --target cpu --token-embeddings 4 -o bundle
    edgelm ner-index build labelled.jsonl --bundle bundle -o words
    edgelm run bundle --ner-index words "Ada Lovelace wrote in London."
    """


@ner_index.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    required=True,
    help="Bundle of an embedding or NER model, exported with --token-embeddings.",
)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The index to make.")
@click.option("--bits", default=512, show_default=True, help="Length of a word's code.")
@click.option(
    "--probe/--no-probe",
    default=True,
    show_default=True,
    help="Let a linear probe of the same sentences vote with the nearest words.",
)
@PROVIDER
@THREADS
@click.option("--force", is_flag=True, help="Replace an index that is there already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
def build(
    data: Path,
    bundle: Path,
    output: Path,
    bits: int,
    probe: bool,
    provider: str | None,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Index the words of DATA: JSON lines with text and entities, or tokens and tags.

    \b
    edgelm ner-index build labelled.jsonl --bundle bundle -o words
    """
    from dataclasses import replace

    from edgelm.bundle import open_bundle
    from edgelm.codes.words import LabelledWords, build_word_index
    from edgelm.errors import InputError
    from edgelm.evaluate.accuracy import load_dataset
    from edgelm.runtimes.engine import open_engine

    config = LabelledWords()
    config = replace(
        config,
        codes=replace(config.codes, bits=bits),
        voting=replace(config.voting, probe=config.voting.probe * probe),
    )
    labelled = load_dataset(data)
    if labelled.kind != "ner":
        raise InputError(
            f"{data} is {labelled.kind} data. Give text and entities, or tokens and tags."
        )
    engine = open_engine(open_bundle(bundle), threads=threads, provider=provider)
    built = build_word_index(output, engine, labelled.rows, config, force=force)
    if as_json:
        emit({"index": str(output), **schema.plain(built)})
    say(
        f"{output}: {built.words} words of {built.sentences} sentences, "
        f"{built.entities} entities of the types {', '.join(built.types)}"
    )


COMMANDS = {"ner-index": ner_index}
