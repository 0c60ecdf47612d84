"""What a graph computes, as modules of PyTorch."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from edgelm.bundle import TOKENS
from edgelm.embeddings import EmbeddingGraph, with_tokens
from edgelm.errors import ExportError
from edgelm.manifest import EmbeddingInfo, Graph, Tensor
from edgelm.models import LoadedModel

OUTPUTS = {"embedding": "sentence_embedding", "ner": "logits", "scoring": "logits"}


class LogitsGraph(nn.Module):
    """Token ids to the logits of a classification model, and to a layer's vectors where they are wanted."""

    def __init__(self, model: nn.Module, layer: int | None = None) -> None:
        """Wrap a token or sequence classification model of transformers."""
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 ``[batch, sequence]``, to logits.

        With ``layer`` also its vectors, float32 ``[batch, sequence, width]``.
        """
        kwargs = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=self.layer is not None,
            **kwargs,
        )
        return with_tokens(output.logits, output, self.layer)


def wrap(loaded: LoadedModel, *, layer: int | None = None) -> nn.Module:
    """The module that the graph computes, in float32.

    Args:
        loaded: The model.
        layer: Give the tokens' vectors after this layer too: -1 the last, 0 the
            embedding table's.

    Raises:
        ExportError: There are no bundles for the task, no vectors of its tokens, or
            no such layer.
    """
    if loaded.task not in OUTPUTS:
        raise ExportError(
            f"There are no bundles for the task {loaded.task} yet; edgelm exports {', '.join(OUTPUTS)}."
        )
    if layer is not None:
        _check_layer(loaded, layer)
    model: nn.Module = loaded.model
    model.float().eval()
    if isinstance(loaded.info, EmbeddingInfo):
        return EmbeddingGraph(model, loaded.info, loaded.behind, layer).eval()
    return LogitsGraph(model, layer).eval()


def _check_layer(loaded: LoadedModel, layer: int) -> None:
    if loaded.task == "scoring":
        raise ExportError(
            f"{loaded.name} scores texts; vectors of tokens are given by graphs of embedding and ner models."
        )
    layers = int(loaded.model.config.get_text_config().num_hidden_layers)
    if not -layers - 1 <= layer <= layers:
        raise ExportError(
            f"{loaded.name} has {layers} layers. Give --token-embeddings one from 0 to {layers}, or last."
        )


def interface(loaded: LoadedModel, *, tokens: bool = False) -> Graph:
    """Names and shapes that the graph of a model shall have; it has no file yet.

    Args:
        loaded: The model.
        tokens: The graph gives vectors of the tokens too.
    """
    names = ["input_ids", "attention_mask"]
    config = loaded.model.config
    takes = inspect.signature(loaded.model.forward).parameters
    if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in takes:
        names.append("token_type_ids")
    inputs = tuple(Tensor(name, "int64", ("batch", "sequence")) for name in names)
    if isinstance(loaded.info, EmbeddingInfo):
        shape: tuple[int | str, ...] = ("batch", loaded.info.dimension)
    else:
        labels = len(loaded.info.labels) if loaded.info else 0
        middle = ("sequence",) if loaded.task == "ner" else ()
        shape = ("batch", *middle, labels)
    outputs = [Tensor(OUTPUTS[loaded.task], "float32", shape)]
    if tokens:
        width = int(config.get_text_config().hidden_size)
        outputs.append(Tensor(TOKENS, "float32", ("batch", "sequence", width)))
    return Graph("", 0, inputs, tuple(outputs))
