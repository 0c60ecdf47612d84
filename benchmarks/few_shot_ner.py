"""Entities by a few labelled sentences, on the domains of CrossNER: codes that vote, a linear probe, both.

    edgelm export minilm --target cpu --token-embeddings 4 -o bundle
    edgelm export minilm-ner --target cpu --token-embeddings 4 -o ner-bundle
    python benchmarks/few_shot_ner.py --data crossner --bundle bundle --bundle ner-bundle --ner ner-bundle -o few.json

DATA holds DOMAIN/train.jsonl and DOMAIN/test.jsonl (tokens and tags). An index is built of the training sentences of
a domain; nothing else is fitted, and the test sentences are looked at once. Entity F1, micro-averaged, boundaries and
type. In brackets the types are mapped to those of a NER bundle, as for its training (examples/adapters/ner.py), to
compare with its own labels; entities of types that have none there are left out, and so is what overlaps them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import edgelm
from edgelm.bundle import open_bundle
from edgelm.codes.words import LabelledWords, build_word_index
from edgelm.evaluate.accuracy import load_dataset
from edgelm.metrics import entity_f1
from edgelm.runtimes.engine import Engine, open_engine
from edgelm.runtimes.few_shot import (
    FewShotRecognizer,
    Voting,
    WordVectors,
    combine,
    decode,
    guesses,
    in_context,
    word_vectors,
)

DOMAINS = ("ai", "literature", "music", "politics", "science")
TYPES = {
    "PER": "person politician scientist writer musicalartist researcher",
    "LOC": "location country",
    "ORG": "organisation politicalparty university band",
    "MISC": "misc event election conference award album song book poem magazine academicjournal "
    "programlang product",
}
COARSE = {name: kind for kind, names in TYPES.items() for name in names.split()}
COARSE |= {kind: kind for kind in TYPES}
Rows = Sequence[Mapping[str, Any]]
Span = tuple[int, int, str]


def gold_of(rows: Rows) -> list[set[Span]]:
    return [{(e["start"], e["end"], e["label"]) for e in r["entities"]} for r in rows]


def coarse(spans: Sequence[set[Span]], gold: Sequence[set[Span]]) -> list[set[Span]]:
    mapped = []
    for its, due in zip(spans, gold, strict=True):
        hidden = [(a, b) for a, b, label in due if label not in COARSE]
        mapped.append(
            {
                (a, b, COARSE[label])
                for a, b, label in its
                if label in COARSE and not any(a < d and b > c for c, d in hidden)
            }
        )
    return mapped


def found_by(
    words: Sequence[WordVectors],
    labels: Sequence[str],
    probabilities: Callable[[Any], Any],
) -> list[set[Span]]:
    return [
        {
            (its.offsets[a][0], its.offsets[b - 1][1], label)
            for a, b, label in decode(probabilities(its.vectors), labels)
        }
        for its in words
    ]


def methods(
    engine: Engine, train: Rows, bits: int, folder: Path
) -> tuple[dict[str, Callable[[Any], Any]], Sequence[str], dict[str, Any]]:
    """Name to what gives label probabilities of a text's word vectors; and what it cost."""
    config = LabelledWords()
    config = replace(config, codes=replace(config.codes, bits=bits))
    votes_alone = replace(config, voting=replace(config.voting, probe=0.0))
    began = time.perf_counter()
    built = build_word_index(folder / "both", engine, train, config)
    seconds = time.perf_counter() - began
    build_word_index(folder / "votes", engine, train, votes_alone)
    both = FewShotRecognizer(engine, folder / "both")
    votes = FewShotRecognizer(engine, folder / "votes")
    model = both.model

    def probe(vectors: Any) -> Any:
        rows = in_context(vectors - model.centre, model.voting.context)
        outputs = rows @ model.probe[:-1] + model.probe[-1]
        guessed = guesses(outputs, model.voting)
        return combine(np.ones_like(guessed), guessed, Voting())

    size = sum(f.stat().st_size for f in (folder / "both").rglob("*") if f.is_file())
    about = {
        "sentences": built.sentences,
        "words": built.words,
        "MB": round(size / 1e6, 1),
        "build s": round(seconds, 1),
    }
    found = {"votes": votes.probabilities, "probe": probe, "both": both.probabilities}
    return found, model.labels, about


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option(
    "--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), required=True
)
@click.option(
    "--ner", type=click.Path(path_type=Path), help="NER bundle to compare with."
)
@click.option("--split", default="test", show_default=True)
@click.option("--bits", default=512, show_default=True)
@click.option("--domains", default=",".join(DOMAINS), show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    data: Path,
    bundles: tuple[Path, ...],
    ner: Path | None,
    split: str,
    bits: int,
    domains: str,
    output: Path | None,
) -> None:
    rows: list[dict[str, Any]] = []

    def add(
        encoder: str, method: str, domain: str, found: Any, gold: Any, **more: Any
    ) -> None:
        exact = None if method == "its own labels" else entity_f1(gold, found)["f1"]
        rough = entity_f1(coarse(gold, gold), coarse(found, gold))["f1"]
        rows.append(
            {
                "encoder": encoder,
                "method": method,
                "domain": domain,
                "f1": exact,
                "coarse": rough,
                **more,
            }
        )

    for domain in domains.split(","):
        train = load_dataset(data / domain / "train.jsonl").rows
        test = load_dataset(data / domain / f"{split}.jsonl").rows
        gold, texts = gold_of(test), [row["text"] for row in test]
        for path in bundles:
            engine = open_engine(open_bundle(path))
            with tempfile.TemporaryDirectory() as folder:
                by, labels, about = methods(engine, train, bits, Path(folder))
                shown = FewShotRecognizer(engine, Path(folder) / "both")
                words = word_vectors(shown.engine, texts)
                for method, probabilities in by.items():
                    found = found_by(words, labels, probabilities)
                    add(str(path.name), method, domain, found, gold, **about)
        if ner is not None:
            recognizer = edgelm.load(ner)
            assert isinstance(recognizer, edgelm.EntityRecognizer)
            spans = [
                {(e.start, e.end, e.label) for e in r}
                for r in recognizer.extract(texts)
            ]
            add(ner.name, "its own labels", domain, spans, gold)
        click.echo(f"{domain} done", err=True)
    table = Table(
        title=f"Entity F1, CrossNER {split} (in brackets: coarse types)", box=None
    )
    names = domains.split(",")
    for column in ("encoder", "method", *names, "mean"):
        table.add_column(column)
    for encoder, method in dict.fromkeys((r["encoder"], r["method"]) for r in rows):
        its = [r for r in rows if (r["encoder"], r["method"]) == (encoder, method)]
        exact = [r["f1"] for r in its]
        rough = [100 * r["coarse"] for r in its]
        cells = [
            f"({c:.1f})" if f is None else f"{100 * f:.1f} ({c:.1f})"
            for f, c in zip(exact, rough, strict=True)
        ]
        mean = f"({np.mean(rough):.1f})"
        if None not in exact:
            mean = f"{100 * np.mean(exact):.1f} {mean}"
        table.add_row(encoder, method, *cells, mean)
    Console(width=150).print(table)
    if output is not None:
        output.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
