"""Few-shot entity recognition: the words of a text are compared with those of a few labelled sentences.

The labelled words are a `BinaryIndex`: a code each, and its label as the text that is kept with it. What makes
codes of words lies beside them, as the attached file ``words``. `edgelm.codes.words` makes such an index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgelm import schema
from edgelm.bundle import TOKENS
from edgelm.errors import BinaryIndexError
from edgelm.manifest import Manifest
from edgelm.runtimes.codes import Coder, Floats
from edgelm.runtimes.engine import Engine, check_texts
from edgelm.runtimes.index import BinaryIndex, EncoderInfo
from edgelm.runtimes.labels import best_path, softmax, spans, transitions
from edgelm.runtimes.ner import Entity, average, entity
from edgelm.runtimes.windows import Text, Tokens, read_tokens, without_space

WORDS = "words"
FORMAT, FORMAT_VERSION = "edgelm-words", "1"
_ARRAYS = ("centre", "mean", "encoder", "decoder", "probe")
# Codes a neighbour that are compared with the float query.
_CANDIDATES = 8

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Voting:
    """How labels come about.

    Attributes:
        neighbours: Labelled words that vote on a word.
        temperature: A neighbour's vote is ``exp(score / temperature)``.
        context: Weight of the words to the left and right in a word's vector.
        outside: What the probability of ``O`` is multiplied by: below 1 finds more entities.
        probe: Weight of the linear probe's log-probabilities beside the votes'; 0
            leaves the probe out.
        sharpness: What the probe's outputs are multiplied by before the softmax.
        floor: Share of a vote that goes to all labels alike.
    """

    neighbours: int = 60
    temperature: float = 0.1
    context: float = 0.8
    outside: float = 1.0
    probe: float = 1.0
    sharpness: float = 10.0
    floor: float = 0.01


@dataclass(frozen=True)
class WordModel:
    """What makes codes and guesses of word vectors.

    Attributes:
        labels: ``O`` first, then ``B-x`` and ``I-x`` of each type.
        centre: float32 ``[width]``, taken from a word's vector.
        coder: Codes of words in context, of dimension ``3 * width``.
        probe: float32 ``[3 * width + 1, labels]``: ridge regression on the labels, the
            constant last.
        voting: How labels come about.
    """

    labels: tuple[str, ...]
    centre: Floats
    coder: Coder
    probe: Floats
    voting: Voting


@dataclass(frozen=True)
class WordVectors:
    """A text's words.

    Attributes:
        offsets: Start and end of each word in the text, ``[words, 2]``.
        vectors: float32 ``[words, width]``: the mean of a word's tokens.
    """

    offsets: NDArray[np.int64]
    vectors: Floats


class FewShotRecognizer:
    """Finds the entities whose kind a few labelled sentences show.

    Attributes:
        engine: The opened bundle.
        labels: Labels of a word.
        index: The labelled words.
    """

    def __init__(self, engine: Engine, path: str | Path) -> None:
        """Open an index of labelled words.

        Args:
            engine: The bundle that it was made with, opened.
            path: The index.

        Raises:
            BinaryIndexError: It is no such index, damaged, too new, or of another bundle.
            BundleError: The bundle's graph gives no vectors of tokens.
        """
        engine.check_outputs((TOKENS,))
        self.engine = engine
        self.index = BinaryIndex(path)
        self.index.check_encoder(encoder_info(engine.manifest))
        self.index.verify()  # some megabytes at most
        self.model = load_words(self.index)
        self.labels = self.model.labels
        self._scheme = transitions(self.labels)
        number = {label: i for i, label in enumerate(self.labels)}
        try:
            self._label_of = np.array([number[t] for t in self.index.texts()], np.int64)
        except KeyError as error:
            raise BinaryIndexError(
                f"{path} holds the label {error}, which its file {WORDS} does not have. Build the index again."
            ) from error

    def extract(self, texts: Sequence[str]) -> list[list[Entity]]:
        """Find the entities of each text.

        Args:
            texts: The texts; long ones are read in windows, nothing is cut.

        Returns:
            For each text its entities, by position; offsets count code points, a score is
            the mean probability of its words' labels.

        Raises:
            InputError: Something among the texts is not a string.
        """
        words = word_vectors(self.engine, texts)
        return [
            self._entities(text, its.offsets, self.probabilities(its.vectors))
            for text, its in zip(texts, words, strict=True)
        ]

    def probabilities(self, vectors: Floats) -> Doubles:
        """Label probabilities of a text's words.

        Args:
            vectors: float32 ``[words, width]``.

        Returns:
            ``[words, labels]``, as `combine` makes them of votes and guesses.
        """
        model, voting = self.model, self.model.voting
        if not len(vectors):
            return np.zeros((0, len(self.labels)))
        rows = in_context(vectors - model.centre, voting.context)
        near, scores = self.index.search_rows(
            model.coder.project(rows),
            voting.neighbours,
            shortlist=model.coder.encode_queries(rows),
            candidates=_CANDIDATES,
            threads=1,
        )
        return combine(
            votes(self._label_of[near], scores, len(self.labels), voting),
            guesses(rows @ model.probe[:-1] + model.probe[-1], voting),
            voting,
        )

    def _entities(
        self, text: str, places: NDArray[np.int64], probabilities: Doubles
    ) -> list[Entity]:
        path = best_path(probabilities, self._scheme)
        scores = probabilities[np.arange(len(path)), path]
        return [
            entity(text, places[a:b], scores[a:b], label)
            for a, b, label in spans([self.labels[k] for k in path])
        ]


def votes(
    labels: NDArray[np.int64], scores: Floats, count: int, voting: Voting
) -> Doubles:
    """Shares of the neighbours' votes.

    Args:
        labels: ``[words, neighbours]``, numbers of labels.
        scores: ``[words, neighbours]``, larger is nearer.
        count: How many labels there are.
        voting: ``temperature`` and ``floor``.

    Returns:
        ``[words, count]``; each row's sum is 1, and nothing in it is 0.
    """
    weights = softmax(scores.astype(np.float64) / voting.temperature)
    found = np.zeros((len(labels), count))
    lines = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
    np.add.at(found, (lines, labels), weights)
    shares: Doubles = (1 - voting.floor) * found + voting.floor / count
    return shares


def guesses(outputs: NDArray[np.floating], voting: Voting) -> Doubles:
    """Label probabilities, ``[words, labels]``, of the linear probe's outputs."""
    found = softmax(voting.sharpness * outputs.astype(np.float64))
    shares: Doubles = (1 - voting.floor) * found + voting.floor / outputs.shape[1]
    return shares


def combine(votes: Doubles, guesses: Doubles, voting: Voting) -> Doubles:
    """The votes, times the guesses to the power of the probe's weight; ``O`` times ``outside``."""
    found = np.log(votes) + voting.probe * np.log(guesses)
    found[:, 0] += np.log(voting.outside)
    return softmax(found)


def decode(probabilities: Doubles, labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """The best spans that the labels allow: ``(begin, end, type)``, half-open, in words."""
    path = best_path(probabilities, transitions(labels))
    return spans([labels[k] for k in path])


def in_context(centred: Floats, weight: float) -> Floats:
    """Words with their neighbours.

    Args:
        centred: float32 ``[words, width]``, of one text, less the centre.
        weight: Of the word to the left and the one to the right.

    Returns:
        float32 ``[words, 3 * width]``, of length 1: a word's direction, then its
        neighbours' times the weight; nothing where there is none.
    """
    unit = _unit(centred)
    nothing = np.zeros_like(unit[:1])
    left = np.concatenate([nothing, unit[:-1]])
    right = np.concatenate([unit[1:], nothing])
    return _unit(np.concatenate([unit, weight * left, weight * right], axis=1))


def word_vectors(engine: Engine, texts: Sequence[str]) -> list[WordVectors]:
    """Words of texts, as the tokenizer parts them, and their vectors.

    Args:
        engine: Of a bundle whose graph gives vectors of tokens.
        texts: The texts.

    Raises:
        InputError: Something among the texts is not a string.
    """
    check_texts(texts)
    given = [Text(text) for text in texts]
    return [
        _words(text.text, tokens)
        for text, tokens in zip(given, read_tokens(engine, given, TOKENS), strict=True)
    ]


def _words(text: str, tokens: Tokens) -> WordVectors:
    starts = tokens.word_starts()
    if not len(starts):
        return WordVectors(np.zeros((0, 2), np.int64), tokens.rows)
    places = tokens.places(starts)
    places[:, 0] = [without_space(text, a, b) for a, b in places.tolist()]
    return WordVectors(places, average(tokens.rows, starts).astype(np.float32))


def encoder_info(manifest: Manifest) -> EncoderInfo:
    """What ties an index of words to a bundle: its graph and tokenizer."""
    parts = [
        manifest.files[manifest.graph.file].sha256,
        manifest.files[manifest.tokenizer.file].sha256,
        str(manifest.tokenizer.max_length),
        TOKENS,
    ]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return EncoderInfo(manifest.model.name, digest)


def dump_words(model: WordModel) -> bytes:
    """The attached file: safetensors."""
    coder = model.coder
    arrays = (model.centre, coder.mean, coder.encoder, coder.decoder, model.probe)
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "labels": json.dumps(model.labels, ensure_ascii=False),
        "voting": json.dumps(schema.plain(model.voting)),
        "sweeps": str(coder.sweeps),
    }
    named = zip(_ARRAYS, arrays, strict=True)
    return save({k: np.ascontiguousarray(v, np.float32) for k, v in named}, about)


def load_words(index: BinaryIndex) -> WordModel:
    """Read the attached file of a verified index.

    Raises:
        BinaryIndexError: There is none, or this edgelm cannot read it.
    """
    try:
        with safe_open(index.path_of(WORDS), framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError as error:
        raise BinaryIndexError(
            f"{index.path} is no index of words. Make one with: edgelm ner-index build FILE -o INDEX --bundle BUNDLE"
        ) from error
    except (OSError, SafetensorError) as error:
        raise BinaryIndexError(
            f"{index.path} cannot be read as an index of words: {error}."
        ) from error
    if about.get("format") != FORMAT or about.get("version") != FORMAT_VERSION:
        raise BinaryIndexError(
            f"The words of {index.path} have version {about.get('version')}; this edgelm reads version "
            f"{FORMAT_VERSION}. Update edgelm, or build the index again."
        )
    centre, mean, encoder, decoder, probe = (arrays[name] for name in _ARRAYS)
    where = f"{index.path}: voting"
    voting = schema.build(Voting, json.loads(about["voting"]), where, BinaryIndexError)
    coder = Coder(mean, encoder, decoder, int(about["sweeps"]))
    labels = tuple(json.loads(about["labels"]))
    return WordModel(labels, centre, coder, probe, voting)


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = rows / np.maximum(lengths, np.float32(1e-12))
    return unit
