"""Commands of codes from raw text, without a transformer: train, encode."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgelm.cli.console import OUTPUT, emit, progress_bar, say

TEXTS = click.argument("texts", type=click.Path(path_type=Path))


@click.group()
def codes() -> None:
    """Binary codes of texts by their words alone: Binary Paragraph Vectors.

    \b
    edgelm codes train corpus.jsonl -o words --bits 128
    edgelm codes encode words corpus.jsonl -o codes.npy
    """


@codes.command()
@TEXTS
@click.option("-o", "--output", type=OUTPUT, required=True, help="The model to make.")
@click.option(
    "--bits", type=int, default=128, show_default=True, help="Length of a code."
)
@click.option(
    "--dimension",
    type=int,
    default=0,
    show_default=True,
    help="Also learn real vectors of this length (Real-Binary), which order what the codes find; 0: only codes.",
)
@click.option(
    "--min-texts",
    type=int,
    default=5,
    show_default=True,
    help="Least number of texts that must hold a word, or a pair of words, for it to count.",
)
@click.option("--epochs", type=int, default=15, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace a model that is there already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
def train(
    texts: Path,
    output: Path,
    bits: int,
    dimension: int,
    min_texts: int,
    epochs: int,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Train on TEXTS: .txt, a text a line, or .jsonl with the field text.

    \b
    edgelm codes train corpus.jsonl -o words --bits 128
    """
    from edgelm.atomic import check_free, new_folder
    from edgelm.calibration import read_texts, text_digest
    from edgelm.errors import require
    from edgelm.runtimes.paragraph import ABOUT, save_paragraph_coder

    require("torch", "compress")
    from edgelm.codes.paragraph import ParagraphVectors
    from edgelm.codes.paragraph import train as fit

    config = ParagraphVectors(
        bits=bits, dimension=dimension, min_texts=min_texts, epochs=epochs, seed=seed
    )
    check_free(output, marker=ABOUT, force=force)
    rows = [text for text in read_texts(texts) if text.strip()]
    with progress_bar("counting words") as update:
        trained = fit(rows, config, update)
    with new_folder(output, marker=ABOUT, force=force) as folder:
        save_paragraph_coder(trained.coder, folder)
    left_out = len(rows) - len(trained.kept)
    if as_json:
        emit(
            {
                "model": str(output),
                "digest": trained.coder.digest,
                "texts": len(trained.kept),
                "left_out": left_out,
                "terms": len(trained.coder.vocabulary),
                "loss": trained.losses[-1],
                "text_digest": text_digest(rows),
                "config": asdict(config),
            }
        )
    say(
        f"{output}: codes of {bits} bits, trained on {len(trained.kept)} texts, "
        f"{len(trained.coder.vocabulary)} words and pairs of words"
    )
    if left_out:
        say(
            f"{left_out} texts were left out: they have no word that is in {min_texts} texts"
        )


@codes.command()
@click.argument("model", type=click.Path(path_type=Path))
@TEXTS
@click.option(
    "-o", "--output", type=OUTPUT, required=True, help="Codes: .npy, uint8 [n, bits/8]."
)
@click.option(
    "--vectors",
    type=OUTPUT,
    help="Also write real vectors: .npy, float32 [n, dimension].",
)
@click.option("--force", is_flag=True, help="Replace files that are there already.")
def encode(
    model: Path, texts: Path, output: Path, vectors: Path | None, force: bool
) -> None:
    """Codes of TEXTS, a row each in the same order, by MODEL of `edgelm codes train`.

    \b
    edgelm codes encode words corpus.jsonl -o codes.npy
    """
    import numpy as np

    from edgelm.atomic import new_file
    from edgelm.calibration import read_texts
    from edgelm.errors import InputError
    from edgelm.runtimes.paragraph import load_paragraph_coder

    coder = load_paragraph_coder(model)
    rows = list(read_texts(texts))
    if not rows:
        raise InputError(f"{texts} holds no text.")
    found, reals = coder.encode_with_vectors(rows)
    for path, array in ((output, found), (vectors, reals)):
        if path is not None:
            with new_file(path, force=force) as work, work.open("wb") as stream:
                np.save(stream, array)
    say(f"{output}: {len(found)} codes of {coder.bits} bits")


COMMANDS = {"codes": codes}
