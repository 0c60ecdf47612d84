"""Train Binary Paragraph Vectors: codes of texts from their words alone.

Grzegorczyk and Kurdziel, Binary Paragraph Vectors (2nd Workshop on Representation
Learning for NLP, 2017), the model PV-DBOW: a text's row of numbers goes through a
sigmoid, is rounded, and predicts each term of the text. docs/paragraph-vectors.md
lists what is done otherwise here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgelm.errors import ConfigError, InputError
from edgelm.runtimes.paragraph import (
    Counts,
    ParagraphCoder,
    Vocabulary,
    neighbours,
    split_words,
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ParagraphVectors:
    """How to train.

    Attributes:
        bits: Length of a code; a multiple of 8.
        dimension: Of real vectors that a projection makes the codes of (Real-Binary);
            0: codes alone.
        min_texts: A term in fewer texts is not known.
        max_terms: At most so many terms, the most frequent ones; pairs have at most half of them.
        pairs: Whether pairs of neighbouring words are terms.
        frequent: Share of all words from which a term counts less, by
            ``sqrt(frequent / share)``: subsampling (Mikolov et al., 2013), in expectation.
        ridge: Precision of the Gaussian prior on term vectors: ``ridge * |vectors|^2``
            beside the negative log-likelihood of all texts.
        epochs: Passes over the texts.
        batch: Texts in a step.
        rate: Of term vectors (Adam).
        text_rate: Of the texts' rows (Adam).
        samples: Estimate the softmax's denominator from so many drawn terms; 0: exactly, from all.
        steps: Steps of descent for the code of an unseen text.
        seed: Of all that is drawn.
    """

    version: ClassVar[int] = 1

    bits: int = 128
    dimension: int = 0
    min_texts: int = 5
    max_terms: int = 10000
    pairs: bool = True
    frequent: float = 1e-5
    ridge: float = 16.0
    epochs: int = 15
    batch: int = 128
    rate: float = 0.005
    text_rate: float = 0.3
    samples: int = 0
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, fits, due in (
            ("bits", is_width(self.bits), "a multiple of 8 from 8 to 1024"),
            ("dimension", self.dimension >= 0, "at least 0"),
            ("min_texts", self.min_texts >= 1, "at least 1"),
            ("max_terms", self.max_terms >= 2, "at least 2"),
            ("frequent", self.frequent > 0, "above 0"),
            ("ridge", self.ridge >= 0, "at least 0"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("rate", self.rate > 0, "above 0"),
            ("text_rate", self.text_rate > 0, "above 0"),
            ("samples", self.samples >= 0, "at least 0"),
            ("steps", self.steps >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not fits:
                raise ConfigError(
                    f"The '{name}' parameter of ParagraphVectors must be {due}. Got {getattr(self, name)} instead."
                )


def is_width(bits: int) -> bool:
    """Whether codes may have this many bits."""
    return 8 <= bits <= 1024 and bits % 8 == 0


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        coder: For other texts.
        kept: int64 ``[n]``, the texts that were trained on: those with a known term.
        rows: float32 ``[n, dim]``, their real vectors.
        codes: uint8 ``[n, bits // 8]``, their codes.
        losses: Mean negative log-likelihood of a text in each epoch, in nats.
    """

    coder: ParagraphCoder
    kept: NDArray[np.int64]
    rows: NDArray[np.float32]
    codes: NDArray[np.uint8]
    losses: tuple[float, ...]


def build_vocabulary(texts: Sequence[str], config: ParagraphVectors) -> Vocabulary:
    """Choose the terms: words, then pairs of them, that enough texts have.

    Raises:
        InputError: No word is in ``min_texts`` texts.
    """
    found: Counter[str] = Counter()
    for text in texts:
        found.update(set(split_words(text)))
    words = [word for word, count in found.items() if count >= config.min_texts]
    words.sort(key=lambda word: (-found[word], word))
    room = config.max_terms // 2 if config.pairs else config.max_terms
    words = words[: config.max_terms]
    none = np.zeros((0, 2), np.int32)
    if not words:
        raise InputError(
            f"No word is in {config.min_texts} of the {len(texts)} texts. Give more text, or a lower min_texts."
        )
    if not config.pairs:
        return Vocabulary(tuple(words), none)
    ids, text_of, _ = Vocabulary(tuple(words), none).numbered(texts)
    where, keys = neighbours(ids, text_of, len(words))
    once = np.unique(np.stack([keys, text_of[where]], axis=1), axis=0)
    pairs, counts = np.unique(once[:, 0], return_counts=True)
    often = np.flatnonzero(counts >= config.min_texts)
    often = often[np.argsort(-counts[often], kind="stable")][:room]
    kept = words[: config.max_terms - len(often)]
    left, right = np.divmod(np.sort(pairs[often]), len(words))
    known = (left < len(kept)) & (right < len(kept))
    numbers = np.stack([left[known], right[known]], axis=1).astype(np.int32)
    return Vocabulary(tuple(kept), numbers)


class Rounding(torch.autograd.Function):
    """Bits of ``sigmoid(h)``, with the sigmoid's gradient (straight-through)."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        """Round ``sigmoid(inner)`` to 0 or 1; 1 where inner is 0."""
        ctx.save_for_backward(torch.sigmoid(inner))
        return (inner >= 0).to(inner.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Gradient as if nothing had been rounded."""
        (soft,) = ctx.saved_tensors
        result: Tensor = grads[0] * soft * (1 - soft)
        return result


def train(
    texts: Sequence[str], config: ParagraphVectors, progress: Progress | None = None
) -> Trained:
    """Train on texts.

    The same texts and config give the same result on the same machine.

    Args:
        texts: Documents; one without a known term is left out.
        config: How.
        progress: Called with what is done, how far and of how much.

    Raises:
        InputError: No texts, or no word that ``min_texts`` of them have.
    """
    if not texts:
        raise InputError("There is no text to train on. Give some hundreds or more.")
    vocabulary = build_vocabulary(texts, config)
    counts = vocabulary.counts(texts)
    kept = np.flatnonzero(np.diff(counts.starts))
    counts = counts.rows(kept)
    weights = term_weights(counts, vocabulary, config.frequent)
    weighted = Counts(
        counts.starts, counts.terms, counts.values * weights[counts.terms]
    )
    parts, losses = _fit(weighted, len(vocabulary), config, progress)
    through = parts.get("projection")
    inner = parts["rows"] if through is None else parts["rows"] @ through
    coder = ParagraphCoder(
        vocabulary=vocabulary,
        vectors=parts["vectors"].numpy(),
        bias=parts["bias"].numpy(),
        weights=weights,
        projection=None if through is None else through.numpy(),
        steps=config.steps,
        rate=0.3,
    )
    codes = np.packbits((inner >= 0).numpy(), axis=1)
    return Trained(coder, kept, parts["rows"].numpy(), codes, tuple(losses))


def term_weights(
    counts: Counts, vocabulary: Vocabulary, frequent: float
) -> NDArray[np.float32]:
    """How much an occurrence of each term counts, float32 ``[terms]`` in (0, 1].

    A pair counts the product of its words' weights: pairs such as "of the" are rare
    next to their words, and say as little.
    """
    words = len(vocabulary.words)
    totals = np.bincount(counts.terms, counts.values, len(vocabulary))[:words]
    shares = np.maximum(totals / totals.sum(), np.finfo(np.float64).tiny)
    alone = np.minimum(1, np.sqrt(frequent / shares))
    pairs = alone[vocabulary.pairs].prod(axis=1)
    return np.concatenate([alone, pairs]).astype(np.float32)


def _fit(
    counts: Counts, terms: int, config: ParagraphVectors, progress: Progress | None
) -> tuple[dict[str, Tensor], list[float]]:
    """Descend; gives the parameters by name and the loss of each epoch."""
    draw = torch.Generator().manual_seed(config.seed)
    shares = np.bincount(counts.terms, counts.values, terms)
    shares = np.maximum(shares, 1e-6) / shares.sum()
    width = config.dimension or config.bits
    parts = {
        "vectors": 0.01 * torch.randn(terms, config.bits, generator=draw),
        "bias": torch.from_numpy(np.log(shares)).float(),
        "rows": 0.1 * torch.randn(len(counts), width, generator=draw),
    }
    if config.dimension:
        start = torch.randn(width, config.bits, generator=draw)
        parts["projection"] = start / width**0.5
    for part in parts.values():
        part.requires_grad_()
    shared = [part for name, part in parts.items() if name != "rows"]
    steps = config.epochs * -(-len(counts) // config.batch)
    # A row has a gradient once an epoch: only rows of the batch are moved.
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Adam(shared, config.rate),
        torch.optim.SparseAdam([parts["rows"]], config.text_rate),
    )
    slopes = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, steps)
        for optimizer in optimizers
    ]
    noise = torch.from_numpy(shares**0.75).float()
    losses = []
    for epoch in range(config.epochs):
        total = 0.0
        for chosen in _batches(len(counts), config.batch, draw):
            rows = functional.embedding(chosen, parts["rows"], sparse=True)
            inner = rows @ parts["projection"] if config.dimension else rows
            bits = Rounding.apply(inner)  # type: ignore[no-untyped-call]
            few = counts.rows(chosen.numpy())
            vectors, bias = parts["vectors"], parts["bias"]
            drawn = None
            if config.samples:
                places = torch.multinomial(noise, config.samples, True, generator=draw)
                drawn = places, noise[places] / noise.sum()
            loss = negative_log_likelihood(bits, vectors, bias, few, drawn)
            total += loss.item()
            prior = config.ridge * len(chosen) / len(counts) * vectors.square().sum()
            for optimizer in optimizers:
                optimizer.zero_grad()
            ((loss + prior) / len(chosen)).backward()  # type: ignore[no-untyped-call]
            for optimizer, slope in zip(optimizers, slopes, strict=True):
                optimizer.step()
                slope.step()
        losses.append(total / len(counts))
        if progress is not None:
            progress(f"loss {losses[-1]:.1f}", epoch + 1, config.epochs)
    return {name: part.detach() for name, part in parts.items()}, losses


def _batches(count: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    yield from torch.split(torch.randperm(count, generator=draw), size)


def negative_log_likelihood(
    bits: Tensor,
    vectors: Tensor,
    bias: Tensor,
    counts: Counts,
    drawn: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Of the terms of texts, by a softmax over all terms.

    As a sum over a text's terms is linear in its bits, terms are summed first, and the
    one matrix product is that of the denominators.

    Args:
        bits: float ``[n, bits]``.
        vectors: float ``[terms, bits]``.
        bias: float ``[terms]``.
        counts: Weighted occurrences in the n texts.
        drawn: Numbers of drawn terms and the probability of each, ``[samples]``: the
            denominators are estimated by importance sampling.

    Returns:
        The sum over texts, in nats.
    """
    terms, values = torch.from_numpy(counts.terms), torch.from_numpy(counts.values)
    text_of = torch.from_numpy(
        np.repeat(np.arange(len(counts)), np.diff(counts.starts))
    )
    sums = functional.embedding_bag(
        terms,
        vectors,
        torch.from_numpy(counts.starts[:-1]),
        mode="sum",
        per_sample_weights=values,
    )
    totals = torch.zeros(len(counts)).index_add(0, text_of, values)
    if drawn is None:
        logits = bits @ vectors.T + bias
    else:
        places, probability = drawn
        corrected = bias[places] - torch.log(len(places) * probability)
        logits = bits @ vectors[places].T + corrected
    loss = totals @ torch.logsumexp(logits, dim=1) - (bits * sums).sum()
    return loss - values @ bias[terms]
