"""Which blocks and linear layers an architecture has: one table, no classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from edgelm.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


Part = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Architecture:
    """Where an architecture keeps its linear layers.

    Attributes:
        blocks: Path from the base model to the list of its blocks.
        attention_in: Projections of the attention's input, within a block.
        attention_out: Projection of the attention's output.
        ffn_in: First layers of the feed-forward network. Two: gate, then up.
        ffn_out: Its last layer.
        fused_gate: Whether the one layer of ``ffn_in`` holds gate and up.
        transposed: Whether its weights are ``[in, out]`` (GPT-2's Conv1D).
        ffn_width: What the config calls the network's inner width.
        free_heads: Whether attention works with fewer heads than the config says.
        residual: Where attention's and the network's output join the residual stream:
            ``post``, it is normalised behind the sum; ``pre``, it is not; None: they do
            not join it one after the other and as they are.
    """

    blocks: str
    attention_in: tuple[str, ...]
    attention_out: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    fused_gate: bool = False
    transposed: bool = False
    ffn_width: str = "intermediate_size"
    free_heads: bool = True
    residual: Literal["pre", "post"] | None = "pre"

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers of a block by what they wait for, in the order of the forward pass."""
        return (self.attention_in, (self.attention_out,), self.ffn_in, (self.ffn_out,))

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a block, in the order of the forward pass."""
        return tuple(name for group in self.groups for name in group)


_BERT = Architecture(
    blocks="encoder.layer",
    attention_in=(
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ),
    attention_out="attention.output.dense",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    residual="post",
)
_LLAMA = Architecture(
    blocks="layers",
    attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
)

_T5 = Architecture(
    blocks="encoder.block",
    attention_in=(
        "layer.0.SelfAttention.q",
        "layer.0.SelfAttention.k",
        "layer.0.SelfAttention.v",
    ),
    attention_out="layer.0.SelfAttention.o",
    ffn_in=("layer.1.DenseReluDense.wi",),
    ffn_out="layer.1.DenseReluDense.wo",
    ffn_width="d_ff",
    free_heads=False,  # positions have a bias a head
)

# model_type of the config -> where its layers are.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "ernie": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "deberta-v2": Architecture(
        blocks="encoder.layer",
        attention_in=(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
        ),
        attention_out="attention.output.dense",
        ffn_in=("intermediate.dense",),
        ffn_out="output.dense",
        free_heads=False,
        residual="post",
    ),
    "mpnet": Architecture(
        blocks="encoder.layer",
        attention_in=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_out="attention.attn.o",
        ffn_in=("intermediate.dense",),
        ffn_out="output.dense",
        free_heads=False,  # positions have a bias a head
        residual="post",
    ),
    "distilbert": Architecture(
        blocks="transformer.layer",
        attention_in=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_out="attention.out_lin",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        ffn_width="hidden_dim",
        residual="post",
    ),
    # One block, called once for every layer.
    "albert": Architecture(
        blocks="encoder.albert_layer_groups.0.albert_layers",
        attention_in=("attention.query", "attention.key", "attention.value"),
        attention_out="attention.dense",
        ffn_in=("ffn",),
        ffn_out="ffn_output",
        residual="post",
    ),
    "modernbert": Architecture(
        blocks="layers",
        attention_in=("attn.Wqkv",),
        attention_out="attn.Wo",
        ffn_in=("mlp.Wi",),
        ffn_out="mlp.Wo",
        fused_gate=True,
    ),
    "gemma": _LLAMA,
    # A norm of their own behind attention and network.
    "gemma2": replace(_LLAMA, residual=None),
    "gemma3_text": replace(_LLAMA, residual=None),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Architecture(
        blocks="decoder.layers",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.out_proj",
        ffn_in=("fc1",),
        ffn_out="fc2",
        ffn_width="ffn_dim",
        free_heads=False,
        residual=None,  # as the size has it
    ),
    "gpt2": Architecture(
        blocks="h",
        attention_in=("attn.c_attn",),
        attention_out="attn.c_proj",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        transposed=True,
        ffn_width="n_inner",
        free_heads=False,
    ),
    "phi": Architecture(
        blocks="layers",
        attention_in=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_out="self_attn.dense",
        ffn_in=("mlp.fc1",),
        ffn_out="mlp.fc2",
        residual=None,  # side by side
    ),
    "t5": _T5,
    "mt5": _T5,
}
# The same where the config says that the feed-forward network has a gate.
_GATED: dict[str, Architecture] = dict.fromkeys(
    ("t5", "mt5"),
    replace(_T5, ffn_in=("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1")),
)


def architecture(model_type: str) -> Architecture:
    """Look an architecture up.

    Raises:
        ModelError: The table does not have it.
    """
    try:
        return ARCHITECTURES[model_type]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelError(
            f"edgelm does not know where the architecture '{model_type}' keeps its layers. It knows: {known}."
        ) from None


def of_config(config: Any) -> Architecture:
    """Where the layers of a model are, by its config. Errors are those of `architecture`."""
    kind = config.model_type
    if getattr(config, "is_gated_act", False) and kind in _GATED:
        return _GATED[kind]
    return architecture(kind)


def blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The blocks of a model, with their names in it, in the order of the forward pass."""
    where = of_config(model.config).blocks
    base: nn.Module = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    path = f"{prefix}.{where}" if prefix else where
    found = base.get_submodule(where).children()
    return [(f"{path}.{i}", block) for i, block in enumerate(found)]


def linears(
    model: PreTrainedModel, block: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a block, with their names in it."""
    for name in of_config(model.config).linears:
        yield name, block.get_submodule(name)


def weight_matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as ``[out, in]``; GPT-2's Conv1D keeps it transposed.

    The result shares memory with the layer, so writing to it changes the layer.
    """
    weight: torch.Tensor = layer.get_parameter("weight").detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight
