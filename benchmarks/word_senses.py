"""Senses of pseudo-words: pairs of words become one, and which it was is to be found from the context.

    python benchmarks/word_senses.py --text wikitext2/train.txt -o word-senses.json

Pairs are drawn from words of middle frequency, two of about the same frequency each. Judged on all
occurrences, a mean over pseudo-words of: accuracy under the best assignment of senses to words, adjusted Rand
index, V-measure, each x 100. Against one sense for all, and k-means of the mean vector of the context, by a
plain skip-gram. Needs scikit-learn.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, v_measure_score

from edgelm.calibration import read_texts
from edgelm.codes.senses import Senses, SenseVectors, context, train_senses
from edgelm.runtimes.paragraph import split_words

Words = NDArray[np.int64]


def accuracy(truth: Words, found: Words) -> float:
    """Share that agrees under the best assignment of what was found to the truth."""
    table = np.zeros((truth.max() + 1, found.max() + 1))
    np.add.at(table, (truth, found), 1)
    return float(table[linear_sum_assignment(-table)].sum() / len(truth))


def judge(
    text: Words, original: Words, pseudo: Words, pick: Callable[[Words], Words]
) -> dict[str, float]:
    """Measures of senses picked at the places of each pseudo-word."""
    rows = []
    for word in pseudo:
        places = np.flatnonzero(text == word)
        truth = (original[places] != word).astype(np.int64)
        found = pick(places)
        rows.append(
            (
                accuracy(truth, found),
                adjusted_rand_score(truth, found),
                v_measure_score(truth, found),
            )
        )
    names = ("accuracy", "ari", "v-measure")
    means = 100 * np.mean(rows, axis=0)
    return {
        name: round(float(mean), 2) for name, mean in zip(names, means, strict=True)
    }


def clusters(vectors: SenseVectors, text: Words) -> Callable[[Words], Words]:
    """Two clusters of mean context vectors."""

    def pick(places: Words) -> Words:
        padded = torch.cat(
            [vectors.senses[:, 0], torch.zeros(1, vectors.cues.shape[1])]
        )
        around = context(text, places, vectors.window, len(vectors.senses))
        means = padded[torch.from_numpy(around)].sum(dim=1).numpy()
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
        labels: Words = KMeans(2, n_init=5, random_state=0).fit_predict(means)
        return labels.astype(np.int64)

    return pick


def likeliest(vectors: SenseVectors, text: Words) -> Callable[[Words], Words]:
    """The sense of the highest probability."""
    return lambda places: vectors.scores(text, places).argmax(axis=1)


@click.command()
@click.option("--text", "path", type=click.Path(path_type=Path), required=True)
@click.option("--pairs", default=50, show_default=True, help="Pseudo-words.")
@click.option("--vocabulary", default=8000, show_default=True)
@click.option("--lines", default=20000, show_default=True, help="Of the text, at most.")
@click.option("--epochs", default=5, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    path: Path, pairs: int, vocabulary: int, lines: int, epochs: int, output: Path
) -> None:
    """Measure; print the table, write JSON."""
    split = (split_words(line) for line in islice(read_texts(path), lines))
    words = [word for line in split for word in line if word != "unk"]
    often = Counter(words).most_common(vocabulary)
    number = {word: i for i, (word, _) in enumerate(often)}
    original = np.array([number[word] for word in words if word in number])
    counts = np.bincount(original)
    middle = np.flatnonzero((counts >= 100) & (counts <= 1000))
    chosen = np.random.default_rng(0).choice(middle, 2 * pairs, replace=False)
    left, right = np.sort(chosen).reshape(-1, 2).T
    text = original.copy()
    for one, other in zip(left, right, strict=True):
        text[text == other] = one
    rows: dict[str, Any] = {}
    rows["one sense"] = judge(text, original, left, np.zeros_like)
    for senses in (1, 2):
        began = time.perf_counter()
        config = Senses(senses=senses, epochs=epochs)
        vectors = train_senses(text, len(often), config)
        seconds = round(time.perf_counter() - began, 1)
        if senses == 1:
            name, pick = "skip-gram, k-means of contexts", clusters(vectors, text)
        else:
            name, pick = "disambiguated skip-gram", likeliest(vectors, text)
        rows[name] = {**judge(text, original, left, pick), "train_s": seconds}
    about = {"tokens": len(text), "words": len(often), "pseudo-words": pairs}
    output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    click.echo("| | accuracy | ARI | V-measure |\n|---|---|---|---|")
    for name, row in rows.items():
        click.echo(
            f"| {name} | {row['accuracy']:.1f} | {row['ari']:.1f} | {row['v-measure']:.1f} |"
        )


if __name__ == "__main__":
    main()
