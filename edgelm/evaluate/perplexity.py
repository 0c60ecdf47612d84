"""Perplexity of language models, by windows that overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.models import LoadedModel

# Logits that are in memory at once: 256 MiB in float32.
_LOGITS = 1 << 26


@dataclass(frozen=True)
class Likelihood:
    """How likely a model found texts.

    Attributes:
        texts: What each window scored, decoded.
        rows: Which text each window is of, int64 ``[windows]``.
        losses: Sum of the negative log-likelihoods of its tokens, nats, float64 ``[windows]``.
        tokens: How many it scored, int64 ``[windows]``.
    """

    texts: list[str]
    rows: NDArray[np.int64]
    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class _Window:
    """Tokens ``start`` to ``end`` of a text, of which those from ``first`` are scored."""

    row: int
    start: int
    first: int
    end: int


def windows(length: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows ``(start, first, end)`` over a text; tokens ``first`` to ``end`` are scored in it.

    Every token but the first of the text is scored once, with the tokens of its window
    before it as context: at least ``size - stride`` of them behind the first window.

    Args:
        length: Tokens of the text.
        size: Longest window.
        stride: Tokens by which a window is moved; at most ``size``.
    """
    found = []
    end = min(size, length)
    if length > 1:
        found.append((0, 1, end))
    while end < length:
        first, end = end, min(end + stride, length)
        found.append((max(0, end - size), first, end))
    return found


def likelihood(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Likelihood:
    """Score texts with a language model.

    Args:
        loaded: A language model.
        texts: Each is scored by itself.
        context: Longest window in tokens; what the model takes, at most 1024, if not given.
        stride: Tokens by which a window is moved; half of the context if not given.
            Shorter is slower, and nearer to what each token's full context would give.
        progress: Called with windows done and windows in all.

    Raises:
        InputError: No text has two tokens, or ``context`` or ``stride`` is out of range.
    """
    size = min(loaded.max_length, 1024) if context is None else context
    step = max(1, size // 2) if stride is None else stride
    if not 2 <= size <= loaded.max_length:
        raise InputError(
            f"The context must be from 2 to the {loaded.max_length} tokens that {loaded.name} takes. Got {size}."
        )
    if not 1 <= step < size:
        raise InputError(
            f"The stride must be from 1 to below the context, {size} tokens. Got {step}."
        )
    backend = loaded.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    ids = [encoding.ids for encoding in backend.encode_batch(list(texts))]
    todo = [
        _Window(row, *window)
        for row, text in enumerate(ids)
        for window in windows(len(text), size, step)
    ]
    if not todo:
        raise InputError("There is no text of two tokens or more to score.")
    losses = np.zeros(len(todo))
    order = sorted(range(len(todo)), key=lambda i: todo[i].end - todo[i].start)
    vocabulary = int(loaded.model.config.vocab_size)
    done = 0
    while done < len(order):
        length = todo[order[done]].end - todo[order[done]].start
        most = max(1, _LOGITS // (vocabulary * length))
        batch = [
            i
            for i in order[done : done + most]
            if todo[i].end - todo[i].start == length
        ]
        losses[batch] = _losses(loaded, ids, [todo[i] for i in batch])
        done += len(batch)
        progress(done, len(order))
    return Likelihood(
        [backend.decode(ids[w.row][w.first : w.end]) for w in todo],
        np.array([w.row for w in todo], np.int64),
        losses,
        np.array([w.end - w.first for w in todo], np.int64),
    )


def _losses(
    loaded: LoadedModel, ids: Sequence[Sequence[int]], batch: Sequence[_Window]
) -> list[float]:
    """Sum of the losses of each window's tokens; all windows of one length."""
    rows = torch.tensor([ids[w.row][w.start : w.end] for w in batch])
    with torch.inference_mode():
        logits = loaded.model(input_ids=rows).logits.float()
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        ).view(len(batch), -1)
    found = [
        float(loss[w.first - w.start - 1 :].sum(dtype=torch.float64))
        for w, loss in zip(batch, each, strict=True)
    ]
    if not all(map(math.isfinite, found)):
        raise InputError(f"{loaded.name} gives a likelihood that is no number.")
    return found
