"""Channel permutation: the network stays the same, the pattern keeps more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
)

from edgelm import layers
from edgelm.calibration import Batch
from edgelm.compress import Blocks, Sparsify, compress
from edgelm.compress.patterns import make_mask, parse_pattern
from edgelm.compress.permute import best_order, reorder_
from edgelm.errors import ConfigError
from tests.conftest import tiny_config

SMALL = {"vocab_size": 70, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Any] = {
    "bert": lambda: BertModel(tiny_config()),
    "gpt2": lambda: GPT2Model(
        GPT2Config(vocab_size=70, n_embd=16, n_layer=2, n_head=2)
    ),
    "llama": lambda: LlamaModel(
        LlamaConfig(hidden_size=16, intermediate_size=32, **SMALL)
    ),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(hidden_size=16, intermediate_size=32, pad_token_id=0, **SMALL)
    ),
}


def kept(saliency: torch.Tensor, pattern: str) -> float:
    return float((saliency * make_mask(saliency, parse_pattern(pattern))).sum())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    pattern=st.sampled_from(["2:4", "1:4", "3:4", "4:8", "4:4", "1:2"]),
)
def test_an_order_is_a_permutation_and_never_loses(
    seed: int, rows: int, groups: int, pattern: str
) -> None:
    torch.manual_seed(seed)
    width = groups * parse_pattern(pattern).group
    saliency = torch.rand(rows, width) ** 4
    order = best_order(saliency, parse_pattern(pattern))
    assert torch.equal(order.sort().values, torch.arange(width))
    assert kept(saliency[:, order], pattern) >= kept(saliency, pattern) * (1 - 1e-6)


def test_clustered_channels_are_spread_out() -> None:
    """The important half lies together: as it is, 2:4 must throw half of it away."""
    saliency = torch.tensor([[8.0, 8, 8, 8, 1, 1, 1, 1]]).repeat(3, 1)
    order = best_order(saliency, parse_pattern("2:4"))
    assert kept(saliency, "2:4") == 3 * (8 + 8 + 1 + 1)
    assert kept(saliency[:, order], "2:4") == 3 * 4 * 8


@pytest.mark.parametrize("name", MODELS)
def test_a_reordered_network_computes_the_same(name: str) -> None:
    model = MODELS[name]().eval()
    ids = torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero at first
            parameter.add_(0.1 * torch.randn_like(parameter))
        before = model(input_ids=ids).last_hidden_state
        where = layers.architecture(model.config.model_type)
        for _, block in layers.blocks(model):
            *_, consumer = (m for _, m in layers.linears(model, block))
            producers = [block.get_submodule(n) for n in where.ffn_in]
            width = layers.weight_matrix(consumer).shape[1]
            reorder_(producers, consumer, torch.randperm(width))
        after = model(input_ids=ids).last_hidden_state
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sparsifying_permuted_loses_less_of_the_layer(name: str) -> None:
    """Where a few channels of the network matter most and lie together."""
    ids = torch.randint(5, 60, (4, 12))
    batches = [Batch(ids, torch.ones_like(ids))]
    errors = {}
    for permuted in (False, True):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        for _, block in layers.blocks(model):
            *_, consumer = (m for _, m in layers.linears(model, block))
            matrix = layers.weight_matrix(consumer)
            matrix[:, : matrix.shape[1] // 4].mul_(20)
        step = Sparsify(sparsity="2:4", refine="none", repair="none", permute=permuted)
        rows = compress(Blocks(model), [step], batches, batches)
        where = layers.architecture(model.config.model_type)
        first = [r for r in rows if r["layer"].endswith("0." + where.ffn_out)]
        errors[permuted] = first[0]["error"]
    assert errors[True] < 0.7 * errors[False]


def test_a_fraction_needs_no_order() -> None:
    with pytest.raises(ConfigError, match="2:4"):
        Sparsify(sparsity=0.5, permute=True)
