"""What a graph computes, as modules of PyTorch."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from edgelm.bundle import EmbeddingInfo, Graph, Tensor
from edgelm.embeddings import EmbeddingGraph
from edgelm.errors import ExportError
from edgelm.models import LoadedModel

OUTPUTS = {"embedding": "sentence_embedding", "ner": "logits", "scoring": "logits"}


class LogitsGraph(nn.Module):
    """Token ids to the logits of a classification model."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a token or sequence classification model of transformers."""
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids, int64 ``[batch, sequence]``, to logits."""
        kwargs = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **kwargs
        ).logits
        return logits


def wrap(loaded: LoadedModel) -> nn.Module:
    """The module that the graph computes, in float32.

    Raises:
        ExportError: There are no bundles for the task.
    """
    if loaded.task not in OUTPUTS:
        raise ExportError(
            f"There are no bundles for the task {loaded.task} yet; edgelm exports {', '.join(OUTPUTS)}."
        )
    model: nn.Module = loaded.model
    model.float().eval()
    if isinstance(loaded.info, EmbeddingInfo):
        return EmbeddingGraph(model, loaded.info).eval()
    return LogitsGraph(model).eval()


def interface(loaded: LoadedModel) -> Graph:
    """Names and shapes that the graph of a model shall have; it has no file yet."""
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
    return Graph("", 0, inputs, (Tensor(OUTPUTS[loaded.task], "float32", shape),))
