"""Attention in the operators that every runtime knows and fuses.

Transformers' own implementations, traced, bring along what is only there for training and for special
masks: a gathered Boolean mask, checks for rows without any token, a key transposed in three steps.
OpenVINO and TensorRT find no attention in that, and run it piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    eager_mask,
)

NAME = "edgelm"
# What is added to the score of a padding token: far below any score, and within float16.
MASKED = -3e4


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, as transformers calls it.

    Args:
        module: The attention layer.
        query: ``[batch, heads, sequence, width]``.
        key: As the query, perhaps with fewer heads.
        value: As the key.
        attention_mask: What is added to the scores, ``[batch, 1, 1 or sequence, sequence]``.
        scaling: Factor of the scores; 1 / sqrt(width) if not given.
        position_bias: What is added beside it, ``[1, heads, sequence, sequence]``.
        **kwargs: What only training or other implementations need.

    Returns:
        ``[batch, sequence, heads, width]``, and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(2, 3))
    if factor != 1.0:
        scores = scores * factor
    for added in (position_bias, attention_mask):
        if added is not None:
            scores = scores + added
    return torch.matmul(torch.softmax(scores, -1), value).transpose(1, 2), None


def additive_mask(
    *,
    mask_function: Any = bidirectional_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What is added to the scores: one mask for the padding, one for what the layer does not see.

    Arguments are those of `transformers.masking_utils.eager_mask`, which makes the second.

    Returns:
        ``[batch, 1, 1, sequence]`` where only padding is masked, else ``[batch, 1, sequence, sequence]``.
    """
    padding = None
    if attention_mask is not None:
        padding = (1.0 - attention_mask[:, None, None, :].to(dtype)) * MASKED
    if mask_function is bidirectional_mask_function:
        return padding
    seen = eager_mask(
        mask_function=mask_function, attention_mask=None, dtype=dtype, **kwargs
    ).clamp(min=MASKED)
    return seen if padding is None else seen + padding


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model use these for a while; what its architecture does not ask for stays its own."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, additive_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
