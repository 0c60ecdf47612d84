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
# The optional second output of graphs that read tokens.
TOKENS = "token_embeddings"


class LogitsGraph(nn.Module):
    """Token ids to the logits of a classification model, and to its last layer where that is wanted."""

    def __init__(self, model: nn.Module, tokens: bool = False) -> None:
        """Wrap a token or sequence classification model of transformers."""
        super().__init__()
        self.model = model
        self.tokens = tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 ``[batch, sequence]``, to logits.

        With ``tokens`` also the last layer, float32 ``[batch, sequence, width]``.
        """
        kwargs = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=self.tokens,
            **kwargs,
        )
        logits: torch.Tensor = output.logits
        return (logits, output.hidden_states[-1]) if self.tokens else logits


def wrap(loaded: LoadedModel, *, tokens: bool = False) -> nn.Module:
    """The module that the graph computes, in float32.

    Args:
        loaded: The model.
        tokens: Give vectors of the tokens too.

    Raises:
        ExportError: There are no bundles for the task, or no vectors of its tokens.
    """
    if loaded.task not in OUTPUTS:
        raise ExportError(
            f"There are no bundles for the task {loaded.task} yet; edgelm exports {', '.join(OUTPUTS)}."
        )
    if tokens and loaded.task == "scoring":
        raise ExportError(
            f"{loaded.name} scores texts; vectors of tokens are given by graphs of embedding and ner models."
        )
    model: nn.Module = loaded.model
    model.float().eval()
    if isinstance(loaded.info, EmbeddingInfo):
        return EmbeddingGraph(model, loaded.info, tokens).eval()
    return LogitsGraph(model, tokens).eval()


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
