"""Disambiguated skip-gram: a word of two topics has two senses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgelm.codes.senses import (
    Senses,
    context,
    cue_means,
    gumbel_softmax,
    train_senses,
)
from edgelm.errors import ConfigError, InputError

WORDS = 21
# Word 20 is in both topics; the others are in one.
SMALL = Senses(
    dimension=16, window=2, frequent=1.0, epochs=12, batch=256, drawn=32, rate=0.02
)


def two_topics() -> tuple[np.ndarray, np.ndarray]:
    """A text of runs of each topic, and the topic of each word."""
    draw = np.random.default_rng(0)
    topics = np.repeat(draw.integers(0, 2, 300), 15)
    text = draw.integers(0, 10, len(topics)) + 10 * topics
    text[draw.random(len(text)) < 0.15] = 20
    return text, topics


def test_senses_are_topics() -> None:
    text, topics = two_topics()
    vectors = train_senses(text, WORDS, SMALL)
    places = np.flatnonzero(text == 20)
    found = vectors.scores(text, places).argmax(axis=1)
    agreement = (found == topics[places]).mean()
    assert max(agreement, 1 - agreement) > 0.85


def test_training_is_the_same_for_a_seed() -> None:
    text, _ = two_topics()
    config = Senses(dimension=8, epochs=1, drawn=8)
    one, other = (train_senses(text, WORDS, config) for _ in range(2))
    assert torch.equal(one.senses, other.senses)
    assert torch.equal(one.keys, other.keys)


def test_means_pass_over_missing_words() -> None:
    text = np.array([0, 1, 2, 3, 1])
    around = context(text, np.array([0, 2, 4]), 2, 4)
    assert around.tolist() == [[4, 4, 1, 2], [0, 1, 3, 1], [2, 3, 4, 4]]
    cues = torch.randn(5, 5)
    found = cue_means(cues, torch.from_numpy(around))
    for i, row in enumerate(around.tolist()):
        mean = torch.stack([cues[w] for w in row if w != 4]).mean(dim=0)
        torch.testing.assert_close(found[i], mean)


def test_samples_follow_the_softmax() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0]).expand(20000, 3)
    picked = gumbel_softmax(logits, 0.1, draw)
    torch.testing.assert_close(picked.sum(dim=1), torch.ones(20000))
    shares = torch.bincount(picked.argmax(dim=1), minlength=3) / 20000
    torch.testing.assert_close(shares, torch.softmax(logits[0], 0), atol=0.015, rtol=0)


def test_one_sense_and_bad_input() -> None:
    text, _ = two_topics()
    vectors = train_senses(text, WORDS, Senses(senses=1, dimension=4, epochs=1))
    assert np.array_equal(vectors.scores(text, np.arange(5)), np.zeros((5, 1)))
    with pytest.raises(InputError, match="Got 1 words"):
        train_senses(text[:1], WORDS, SMALL)
    with pytest.raises(ConfigError, match="senses"):
        Senses(senses=0)
    with pytest.raises(ConfigError, match="temperature"):
        Senses(temperature=0)
