"""From labelled sentences to the index that `edgelm.runtimes.few_shot` searches; with numpy alone."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgelm.atomic import check_free, new_folder
from edgelm.codes.config import BinaryCodes
from edgelm.codes.fitting import fit
from edgelm.errors import ConfigError, InputError
from edgelm.metrics import entity_f1
from edgelm.runtimes.codes import Floats, asymmetric_scores
from edgelm.runtimes.engine import Engine
from edgelm.runtimes.few_shot import (
    WORDS,
    Doubles,
    Voting,
    WordModel,
    WordVectors,
    combine,
    decode,
    dump_words,
    encoder_info,
    guesses,
    in_context,
    votes,
    word_vectors,
)
from edgelm.runtimes.index import BinaryIndex
from edgelm.runtimes.index.manifest import MANIFEST, sync_folder
from edgelm.runtimes.labels import spans, word_labels

# What is tried where the voting is chosen.
NEIGHBOURS, TEMPERATURES, OUTSIDE = (60, 20, 5), (0.1, 0.05), (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class LabelledWords:
    """An index of labelled words.

    Attributes:
        codes: What codes to make of words in context.
        ridge: Of the linear probe, added to the Gram matrix of rows of length 1.
        voting: How labels come about when it is searched.
        choose: Choose neighbours, temperature and the weight of ``O`` by leaving out each
            labelled sentence in turn, instead of taking those of ``voting``.
    """

    version: ClassVar[int] = 1

    codes: BinaryCodes = field(
        default_factory=lambda: BinaryCodes(bits=512, iterations=15)
    )
    ridge: float = 0.1
    voting: Voting = field(default_factory=Voting)
    choose: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        if not self.ridge > 0:
            raise ConfigError(
                f"The 'ridge' parameter of LabelledWords must be above 0. Got {self.ridge} instead."
            )


@dataclass(frozen=True)
class Built:
    """What is in an index of words.

    Attributes:
        sentences: Labelled sentences.
        words: Their words.
        entities: Their entities.
        types: The entities' types.
        voting: How labels come about.
        held_out_f1: Entity F1, 0..1, of each sentence by all others, with that voting;
            optimistic where it was chosen by it. None where nothing was chosen.
    """

    sentences: int
    words: int
    entities: int
    types: tuple[str, ...]
    voting: Voting
    held_out_f1: float | None


def build_word_index(
    output: Path,
    engine: Engine,
    rows: Sequence[Mapping[str, Any]],
    config: LabelledWords | None = None,
    *,
    force: bool = False,
) -> Built:
    """Make an index of the words of labelled sentences.

    Args:
        output: The folder to make.
        engine: An opened bundle whose graph gives vectors of tokens.
        rows: ``text`` and ``entities`` (``start``, ``end``, ``label``) of each sentence.
        config: What to make.
        force: Replace an index that is there already.

    Raises:
        InputError: There is no sentence or no entity, or one that does not fit its text.
        BundleError: The bundle's graph gives no vectors of tokens.
        CompressionError: There are too few different words.
        OutputExistsError: ``output`` is there already.
    """
    config = config or LabelledWords()
    check_free(output, marker=MANIFEST, force=force)
    words = word_vectors(engine, [str(row["text"]) for row in rows])
    labels = [
        label
        for i, (row, its) in enumerate(zip(rows, words, strict=True), 1)
        for label in word_labels(row, its.offsets, f"sentence {i}")
    ]
    types = tuple(sorted({label[2:] for label in labels if label != "O"}))
    if not types:
        raise InputError("There is no entity in the labelled sentences. Label some.")
    names = ("O", *(f"{part}-{kind}" for kind in types for part in "BI"))
    model, vectors, held_out = _fit(words, names, labels, config)
    ids = [
        f"{i}.{k}" for i, its in enumerate(words, 1) for k in range(len(its.offsets))
    ]
    with tempfile.TemporaryDirectory(
        dir=output.parent, prefix=f".{output.name}."
    ) as work:
        _write(Path(work) / "index", engine, model, vectors, ids, labels)
        with new_folder(output, marker=MANIFEST, force=force) as final:
            final.rmdir()
            os.rename(Path(work) / "index", final)
    sync_folder(output.parent)
    entities = sum(len(row["entities"]) for row in rows)
    return Built(len(rows), len(ids), entities, types, model.voting, held_out)


def _fit(
    words: Sequence[WordVectors],
    names: tuple[str, ...],
    labels: Sequence[str],
    config: LabelledWords,
) -> tuple[WordModel, Floats, float | None]:
    """The model, the rows of all words in context, and the F1 of what was chosen."""
    centre = np.concatenate([its.vectors for its in words]).mean(axis=0)
    rows = np.concatenate(
        [in_context(its.vectors - centre, config.voting.context) for its in words]
    )
    coder = fit(rows, config.codes)
    number = np.array([names.index(label) for label in labels])
    wide = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    gram = wide.T @ wide
    gram[np.diag_indices_from(gram)] += config.ridge
    inverse = np.linalg.inv(gram)
    due = np.eye(len(names))[number]
    probe = inverse @ (wide.T @ due)
    model = WordModel(names, centre, coder, probe.astype(np.float32), config.voting)
    if not config.choose or len(words) < 2:
        return model, rows, None
    bounds = np.cumsum([0, *(len(its.offsets) for its in words)])
    sentences = [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]
    outputs = _left_out(wide, inverse, due, wide @ probe, sentences)
    voting, f1 = _choose(model, rows, number, outputs, sentences)
    return replace(model, voting=voting), rows, f1


def _left_out(
    wide: Doubles,
    inverse: Doubles,
    due: Doubles,
    outputs: Doubles,
    sentences: Sequence[slice],
) -> Doubles:
    """What the probe would give for each sentence had it not been fitted to it.

    Exact, by the block of the hat matrix: ``y - (I - H)^-1 (y - y')``.
    """
    found = np.empty_like(outputs)
    for its in sentences:
        hat = wide[its] @ inverse @ wide[its].T
        rest = np.linalg.solve(np.eye(len(hat)) - hat, due[its] - outputs[its])
        found[its] = due[its] - rest
    return found


def _choose(
    model: WordModel,
    rows: Floats,
    number: NDArray[np.int64],
    outputs: Doubles,
    sentences: Sequence[slice],
) -> tuple[Voting, float]:
    """The voting with the best entity F1 where each sentence is labelled by all others."""
    most = max(NEIGHBOURS)
    near = np.empty((len(rows), min(most, len(rows))), np.int64)
    scores = np.empty(near.shape, np.float32)
    codes = model.coder.encode(rows)
    factors = model.coder.factors(rows, codes)
    for its in sentences:
        found = asymmetric_scores(model.coder.project(rows[its]), codes, factors)
        found[:, its] = -np.inf
        near[its] = np.argsort(-found, axis=1, kind="stable")[:, : near.shape[1]]
        scores[its] = np.take_along_axis(found, near[its], axis=1)
    gold = [spans([model.labels[k] for k in number[its]]) for its in sentences]
    best = model.voting, -1.0
    for k, temperature in itertools.product(NEIGHBOURS, TEMPERATURES):
        voting = replace(model.voting, neighbours=k, temperature=temperature)
        cast = votes(number[near[:, :k]], scores[:, :k], len(model.labels), voting)
        guessed = guesses(outputs, voting)
        for outside in OUTSIDE:
            tried = replace(voting, outside=outside)
            both = combine(cast, guessed, tried)
            predicted = [decode(both[its], model.labels) for its in sentences]
            f1 = entity_f1(gold, predicted)["f1"]
            if f1 > best[1]:
                best = tried, f1
    return best


def _write(
    path: Path,
    engine: Engine,
    model: WordModel,
    rows: Floats,
    ids: Sequence[str],
    labels: Sequence[str],
) -> None:
    index = BinaryIndex.create(
        path, model.coder.bits, encoder=encoder_info(engine.manifest), factors=True
    )
    codes = model.coder.encode(rows)
    with index.writer() as writer:
        factors = model.coder.factors(rows, codes)
        writer.add(ids, codes, texts=labels, factors=factors)
        fresh = path / f"{WORDS}.new"
        fresh.write_bytes(dump_words(model))
        writer.attach(WORDS, fresh)
