"""Embeddings of a loaded model, in PyTorch: what codes are fitted to, and what a graph computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgelm.manifest import EmbeddingInfo

if TYPE_CHECKING:
    from edgelm.calibration import Batch
    from edgelm.models import LoadedModel


class EmbeddingGraph(nn.Module):
    """Token ids to pooled vectors, and to those of the tokens where they are wanted."""

    def __init__(
        self,
        model: nn.Module,
        info: EmbeddingInfo,
        behind: nn.Module | None = None,
        layer: int | None = None,
    ) -> None:
        """Wrap a base model of transformers.

        Args:
            model: The model.
            info: How token vectors become one.
            behind: From pooled vectors to embeddings, but for their normalisation.
            layer: Give the tokens' vectors after this layer too: -1 the last, 0 the
                embedding table's.
        """
        super().__init__()
        self.model = model
        self.info = info
        self.behind = behind
        self.layer = layer

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 ``[batch, sequence]``, to float32 ``[batch, dimension]``.

        With ``layer`` also its vectors, ``[batch, sequence, dimension]``.
        """
        kwargs = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=self.layer is not None,
            **kwargs,
        )
        pooled = pool(output.last_hidden_state, attention_mask, self.info, self.behind)
        return with_tokens(pooled, output, self.layer)


def with_tokens(
    result: torch.Tensor, output: Any, layer: int | None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What a graph gives: its result, and where a layer is named its hidden states."""
    return result if layer is None else (result, output.hidden_states[layer])


def pool(
    hidden: torch.Tensor,
    mask: torch.Tensor,
    info: EmbeddingInfo,
    behind: nn.Module | None = None,
) -> torch.Tensor:
    """Token vectors to an embedding, as in sentence-transformers.

    Args:
        hidden: ``[batch, sequence, width]``.
        mask: int64 ``[batch, sequence]``; 0 for padding, which is on the right.
        info: How they are pooled; vectors of several ways, joined by ``+``, stand one
            behind the other.
        behind: What pooled vectors go through, before they are normalised.

    Returns:
        ``[batch, dimension]``.
    """
    parts = [_pooled(hidden, mask, way) for way in info.pooling.split("+")]
    pooled = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if behind is not None:
        pooled = behind(pooled)
    return nn.functional.normalize(pooled, dim=-1) if info.normalize else pooled


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, way: str) -> torch.Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if way == "cls":
        return hidden[:, 0]
    if way == "max":
        return hidden.masked_fill(weights == 0, -1e9).amax(dim=1)
    position = torch.arange(mask.shape[1], device=mask.device)
    if way == "last":
        last = mask.sum(dim=1, keepdim=True) - 1
        chosen = (position == last).unsqueeze(-1).to(hidden.dtype)
        return (hidden * chosen).sum(dim=1)
    if way == "weightedmean":
        weights = weights * (position + 1).unsqueeze(-1).to(hidden.dtype)
    count = weights.sum(dim=1).clamp(min=1e-9)
    if way == "mean_sqrt_len":
        count = count.sqrt()
    return (hidden * weights).sum(dim=1) / count


def embed(loaded: LoadedModel, batch: Batch) -> NDArray[np.float32]:
    """Embeddings of a batch of tokens.

    Args:
        loaded: An embedding model; it is converted to float32 in place.
        batch: The tokens.

    Returns:
        float32 ``[texts, dimension]``.
    """
    assert isinstance(loaded.info, EmbeddingInfo)
    model: nn.Module = loaded.model
    graph = EmbeddingGraph(model.float().eval(), loaded.info, loaded.behind)
    with torch.inference_mode():
        vectors: NDArray[np.float32] = graph(
            batch.input_ids, batch.attention_mask, batch.token_type_ids
        ).numpy()
    return vectors
