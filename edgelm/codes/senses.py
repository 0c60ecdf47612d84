"""Word vectors with several senses: a word's sense is picked by its context.

Grzegorczyk and Kurdziel, Disambiguated skip-gram model (EMNLP 2018): a softmax over
a word's senses, given its context, and a skip-gram that predicts the context from the
sense, trained together through Gumbel-softmax samples. docs/paragraph-vectors.md lists
what is done otherwise here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgelm.errors import ConfigError, InputError

# How fast the running mean of a word's contexts follows: without this mean, what all
# contexts of a word share decides, and one sense takes them all.
_PACE = 0.02


@dataclass(frozen=True)
class Senses:
    """How to train.

    Attributes:
        senses: Of each word; 1 is a plain skip-gram.
        dimension: Of all vectors.
        window: Words to each side that are the context.
        negatives: How much drawn words weigh next to one word of the context.
        drawn: Words drawn for each batch, as negatives for all of it.
        frequent: Share of the words from which a word is subsampled as a centre.
        temperature: Of the Gumbel-softmax.
        epochs: Passes over the text.
        batch: Centres in a step.
        rate: Of Adam; it falls to 0 linearly.
        seed: Of all that is drawn.
    """

    version: ClassVar[int] = 1

    senses: int = 2
    dimension: int = 64
    window: int = 5
    negatives: float = 5.0
    drawn: int = 256
    frequent: float = 1e-4
    temperature: float = 0.5
    epochs: int = 5
    batch: int = 2048
    rate: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is not above 0.
        """
        for name in ("senses", "dimension", "window", "drawn", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"The '{name}' parameter of Senses must be at least 1. Got {getattr(self, name)} instead."
                )
        for name in ("negatives", "frequent", "temperature", "rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"The '{name}' parameter of Senses must be above 0. Got {getattr(self, name)} instead."
                )


@dataclass(frozen=True)
class SenseVectors:
    """Vectors of a text's words.

    Attributes:
        senses: float32 ``[words, senses, dim]``: predict contexts.
        keys: float32 ``[words, senses, dim]``: a sense's score is its dot product with
            the mean of the context's cues, less what is usual for the word.
        usual: float32 ``[words, dim]``.
        cues: float32 ``[words + 1, dim]``; the last row is 0, for no word.
        contexts: float32 ``[words, dim]``: are predicted.
        window: Words to each side.
    """

    senses: Tensor
    keys: Tensor
    usual: Tensor
    cues: Tensor
    contexts: Tensor
    window: int

    def scores(
        self, text: NDArray[np.int64], places: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Log-probability of each sense of the words at some places.

        Args:
            text: int64 ``[n]``, words by number.
            places: int64 ``[m]``.

        Returns:
            float32 ``[m, senses]``.
        """
        around = torch.from_numpy(context(text, places, self.window, len(self.senses)))
        centres = torch.from_numpy(text[places])
        unusual = cue_means(self.cues, around) - self.usual[centres]
        logits = torch.einsum("nkd,nd->nk", self.keys[centres], unusual)
        scores: NDArray[np.float32] = functional.log_softmax(logits, -1).numpy()
        return scores


def context(
    text: NDArray[np.int64], places: NDArray[np.int64], window: int, none: int
) -> NDArray[np.int64]:
    """Words around places, int64 ``[places, 2 * window]``; beyond the ends it is ``none``."""
    padded = np.pad(text, window, constant_values=none)
    steps = np.r_[-window:0, 1 : window + 1]
    found: NDArray[np.int64] = padded[places[:, None] + window + steps]
    return found


def cue_means(cues: Tensor, around: Tensor) -> Tensor:
    """Means of the cues of contexts.

    Args:
        cues: float ``[words + 1, dim]``.
        around: int64 ``[n, 2 * window]``, with ``words`` for no word.

    Returns:
        float ``[n, dim]``.
    """
    none = len(cues) - 1
    there = (around < none).sum(dim=1, keepdim=True).clamp(min=1)
    sums = functional.embedding_bag(around, cues, mode="sum", padding_idx=none)
    return sums / there


def train_senses(text: NDArray[np.int64], words: int, config: Senses) -> SenseVectors:
    """Train on a text.

    The loss of a centre is that of a skip-gram with negative sampling (Mikolov et al.,
    2013) for the whole context at once, with the sense
    ``sum_k y_k v_k``, ``y`` a Gumbel-softmax sample.

    Args:
        text: int64 ``[n]``, words by number, below ``words``.
        words: How many words there are.
        config: How.

    Raises:
        InputError: The text has fewer than two words.
    """
    if len(text) < 2:
        raise InputError(
            f"Senses are learned from words in context. Got {len(text)} words."
        )
    draw = torch.Generator().manual_seed(config.seed)
    chance = np.random.default_rng(config.seed)
    shares = np.bincount(text, minlength=words) / len(text)
    kept = np.minimum(1, np.sqrt(config.frequent / np.maximum(shares, 1e-12)))
    noise = torch.from_numpy(shares**0.75).float()
    size = config.dimension

    def table(*shape: int) -> Tensor:
        start: Tensor = torch.randn(*shape, generator=draw) / size**0.5
        start.requires_grad_()
        return start

    senses = table(words, config.senses, size)
    keys, cues = table(words, config.senses, size), table(words + 1, size)
    contexts = torch.zeros(words, size, requires_grad=True)
    usual = torch.zeros(words, size)
    optimizer = torch.optim.Adam([senses, keys, cues, contexts], config.rate)
    for epoch in range(config.epochs):
        places = np.flatnonzero(chance.random(len(text)) < kept[text])
        places = chance.permutation(places)
        for first in range(0, len(places), config.batch):
            done = (epoch + first / len(places)) / config.epochs
            optimizer.param_groups[0]["lr"] = config.rate * (1 - done)
            chosen = places[first : first + config.batch]
            around = torch.from_numpy(context(text, chosen, config.window, words))
            centres = torch.from_numpy(text[chosen])
            means = cue_means(cues, around)
            unusual = means - usual[centres]
            logits = torch.einsum("nkd,nd->nk", _of(centres, keys), unusual)
            usual.index_add_(0, centres, _PACE * unusual.detach())
            picked = gumbel_softmax(logits, config.temperature, draw)
            vectors = torch.einsum("nk,nkd->nd", picked, _of(centres, senses))
            drawn = torch.multinomial(noise, config.drawn, True, generator=draw)
            there = around < words
            near = functional.embedding(around.clamp(max=words - 1), contexts)
            hits = torch.einsum("nd,ncd->nc", vectors, near)
            misses = functional.softplus(vectors @ contexts[drawn].T).mean(dim=1)
            loss = (functional.softplus(-hits) * there).sum()
            loss = loss + config.negatives * (misses * there.sum(dim=1)).sum()
            optimizer.zero_grad()
            (loss / len(chosen)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    senses, keys, cues, contexts = (
        part.detach() for part in (senses, keys, cues, contexts)
    )
    cues[-1] = 0
    return SenseVectors(senses, keys, usual, cues, contexts, config.window)


def _of(words: Tensor, table: Tensor) -> Tensor:
    """Rows of a table of three dimensions; the gradient is quicker than indexing's."""
    flat = functional.embedding(words, table.flatten(1))
    return flat.view(len(words), *table.shape[1:])


def gumbel_softmax(logits: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """A relaxed sample of a categorical distribution (Jang, Gu and Poole, 2017), shape of ``logits``."""
    uniform = torch.rand(logits.shape, generator=draw).clamp(1e-9, 1 - 1e-7)
    return torch.softmax((logits - torch.log(-torch.log(uniform))) / temperature, -1)
