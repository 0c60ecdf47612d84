"""Is there a definition in a sentence, and of what: both from one pass, and what a second bundle would cost.

    edgelm export minilm --target cpu --token-embeddings last -o bundle
    python benchmarks/definitions.py bundle wikitext2

The folder holds WikiText-2. The first sentence of an article is a definition where it names the article's title,
the term, before an "is", "are", "was" or "were"; of each such article so many further sentences are none, those that
name the title or a word of it first. Heads are fitted to the articles of `train.txt`, penalties chosen on these,
folds by article, and judged on those of `valid.txt` and `test.txt`.

With a bundle that has a head already, for example `minilm-ner` exported with `--token-embeddings last`, only the score
of sentences is fitted and stands beside it. The times are of the new bundle and of one bundle for each head, taking
turns sentence by sentence.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

import edgelm
from edgelm.bundle import MANIFEST, open_bundle
from edgelm.heads import fit_heads
from edgelm.metrics import entity_f1

Rows = list[dict[str, Any]]
_COPULA = re.compile(r" (is|are|was|were) ")


def clean(text: str) -> str:
    """WikiText's marks as what they stand for; its unknown words as the tokenizer's."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    return text.replace("<unk>", "[UNK]").strip()


def articles(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Titles and sentences."""
    title, sentences = "", list[str]()
    for line in path.read_text(encoding="utf-8").split("\n"):
        heading = re.fullmatch(r" (=(?: =)*) (.+?) \1 ", line)
        if heading is None:
            sentences += re.split(r"(?<= [.!?]) ", clean(line)) if line.strip() else []
        elif heading[1] == "=":
            if title and sentences:
                yield title, sentences
            title, sentences = clean(heading[2]), []
    if title and sentences:
        yield title, sentences


def labelled(path: Path, negatives: int, seed: int) -> Rows:
    """Sentences with a label and their terms."""
    draw, rows = np.random.default_rng(seed), []
    for title, (first, *rest) in articles(path):
        start = first.lower().find(title.lower())
        verb = _COPULA.search(first, start + len(title)) if start >= 0 else None
        if verb is None or start > 30:
            continue
        term = {"start": start, "end": start + len(title), "label": "TERM"}
        rows.append({"text": first, "label": True, "entities": [term], "title": title})
        words = {w for w in title.lower().split() if len(w) > 3}
        rest = [s for s in rest if len(s.split()) > 4]
        order = draw.permutation(len(rest)).tolist()
        order.sort(key=lambda i: not words & set(rest[i].lower().split()))
        rows += [
            {"text": rest[i], "label": False, "entities": [], "title": title}
            for i in order[:negatives]
        ]
    return rows


def without_entities(rows: Rows) -> Rows:
    return [{k: v for k, v in row.items() if k != "entities"} for row in rows]


def judge(model: edgelm.Analyzer, rows: Rows) -> None:
    """F1 of sentences at 0.5, and of terms where the bundle finds them."""
    answers = model.analyze([row["text"] for row in rows])
    due = np.array([row["label"] for row in rows])
    scores = np.array([answer["definition"] for answer in answers])
    found = scores > 0.5
    right = int((found & due).sum())
    above = np.mean(scores[due][:, None] > scores[~due][None, :])
    click.echo(
        f"{len(rows)} sentences of other articles, {due.sum()} of them definitions: "
        f"precision {right / max(1, found.sum()):.3f}, recall {right / due.sum():.3f}, "
        f"F1 {2 * right / (found.sum() + due.sum()):.3f} "
        f"(all called definitions: {2 * due.mean() / (1 + due.mean()):.3f}), "
        f"area under the curve {above:.3f}"
    )
    recognizer = model.heads["entities"]
    assert isinstance(recognizer, edgelm.EntityRecognizer)
    if recognizer.types != ("TERM",):
        return
    gold = [{(e["start"], e["end"], e["label"]) for e in r["entities"]} for r in rows]
    for name, chosen in {
        "every sentence": found | True,
        "called definitions": found,
    }.items():
        terms = [
            {(e.start, e.end, e.label) for e in answer["entities"]} if one else set()  # type: ignore[union-attr]
            for answer, one in zip(answers, chosen, strict=True)
        ]
        scored = entity_f1(gold, terms)
        click.echo(
            f"terms, exact, of {name}: "
            + ", ".join(f"{k} {scored[k]:.3f}" for k in ("precision", "recall", "f1"))
        )


def cost(both: edgelm.Analyzer, singles: list[Any], texts: list[str]) -> None:
    """Median seconds of one bundle and of one for each head, in turns."""
    asked = [
        s.extract if isinstance(s, edgelm.EntityRecognizer) else s.score
        for s in singles
    ]
    one, other = [], []
    for text in [*texts[:20], *texts]:
        began = time.perf_counter()
        both.analyze([text])
        middle = time.perf_counter()
        for ask in asked:
            ask([text])
        one.append(middle - began)
        other.append(time.perf_counter() - middle)
    first, second = np.array(one[20:]), np.array(other[20:])
    click.echo(
        f"one pass {1e3 * np.median(first):.2f} ms a sentence, {len(singles)} bundles "
        f"{1e3 * np.median(second):.2f} ms: "
        f"ratio {np.median(second / first):.2f} (median over {len(texts)} sentences)"
    )


def size(path: Path) -> str:
    return f"{open_bundle(path).size_bytes / 1e6:.1f} MB"


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--negatives", default=3, show_default=True, help="Other sentences of an article."
)
@click.option(
    "--articles", "limit", type=int, help="Of the training file; all if not given."
)
@click.option("--seed", default=0, show_default=True)
def main(
    bundle: Path, folder: Path, negatives: int, limit: int | None, seed: int
) -> None:
    train = labelled(folder / "train.txt", negatives, seed)
    if limit is not None:
        kept = set(list(dict.fromkeys(row["title"] for row in train))[:limit])
        train = [row for row in train if row["title"] in kept]
    held = (folder / "valid.txt", folder / "test.txt")
    test = [row for path in held for row in labelled(path, negatives, seed)]
    had = json.loads((bundle / MANIFEST).read_text())["task"] == "ner"
    options: dict[str, Any] = {"group": "title", "seed": seed}
    with tempfile.TemporaryDirectory() as work:
        both, alone, terms = (Path(work) / name for name in ("both", "alone", "terms"))
        began = time.perf_counter()
        rows = without_entities(train) if had else train
        reports = fit_heads(bundle, rows, both, name="definition", **options)
        click.echo(f"fitted in {time.perf_counter() - began:.0f} s")
        for name, report in reports.items():
            click.echo(
                f"{name}: {report.rows} rows, penalty {report.penalty:g}, held out {report.measures}, "
                f"without a model {report.baseline}"
            )
        model = edgelm.load(both)
        assert isinstance(model, edgelm.Analyzer)
        judge(model, test)
        # The same heads, each in a bundle of its own.
        fit_heads(
            bundle,
            without_entities(train[:200]),
            alone,
            name="definition" if had else None,
            **options,
        )
        singles = [edgelm.load(alone)]
        click.echo(f"sizes: {bundle.name} {size(bundle)}, with the heads {size(both)}")
        if had:
            assert isinstance(singles[0], edgelm.Analyzer)
            singles = [singles[0].heads["definition"], edgelm.load(bundle)]  # type: ignore[list-item]
        else:
            marked = [{k: v for k, v in r.items() if k != "label"} for r in train[:40]]
            fit_heads(bundle, marked, terms, **options)
            singles.append(edgelm.load(terms))
        cost(model, singles, [row["text"] for row in test])


if __name__ == "__main__":
    main()
