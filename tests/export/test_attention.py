"""Attention as exported: the same numbers, in operators that runtimes fuse."""

from __future__ import annotations

from pathlib import Path

import openvino
import pytest
import torch

from edgelm.export.attention import MASKED, additive_mask, attend
from edgelm.export.graph import export_graph
from edgelm.models import load_model
from tests.compress.test_blocks import MODELS
from tests.conftest import save_tiny

# One for each way: the usual one, windows, a bias by position, attention of its own.
QUICK = ["bert", "modernbert", "t5"]
OTHERS = [
    "albert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "mpnet",
    "roberta",
    "xlm-roberta",
]
PIECES = {"IsNaN", "GatherND", "NonZero", "ScatterND", "Where"}


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_every_encoder_is_exported_in_plain_operators(
    name: str, tmp_path: Path
) -> None:
    """`export_graph` itself compares with transformers' own attention on padded batches."""
    model = MODELS[name]()
    save_tiny(tmp_path, model if name == "t5" else model.base_model)
    loaded = load_model(str(tmp_path), task="embedding")
    before = loaded.model.config._attn_implementation
    graph = export_graph(loaded, tmp_path / "g.onnx", 20)
    assert loaded.model.config._attn_implementation == before
    assert graph.operators["Softmax"] == 3
    if name not in (
        "deberta-v2",
        "modernbert",
        "mpnet",
        "t5",
    ):  # they choose by position
        assert not PIECES & set(graph.operators)
    compiled = openvino.Core().compile_model(str(tmp_path / "g.onnx"), "CPU")
    if name == "bert":
        run = [
            str(op.get_rt_info()["layerType"].value)
            for op in compiled.get_runtime_model().get_ops()
        ]
        assert "Input" in run
        assert "Softmax" not in run, "attention runs piece by piece"


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attend_is_scaled_dot_product_attention(heads: int) -> None:
    query = torch.randn(2, 4, 5, 8)
    key, value = torch.randn(2, 2, heads, 5, 8)
    bias, mask = torch.randn(1, 4, 5, 5), torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = MASKED
    found, weights = attend(
        torch.nn.Identity(), query, key, value, mask, position_bias=bias
    )
    due = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias + mask, enable_gqa=True
    )
    torch.testing.assert_close(found, due.transpose(1, 2))
    assert weights is None


def test_what_a_token_may_not_see_counts_nothing() -> None:
    def window(batch: int, head: int, query: int, key: int) -> bool:
        return abs(query - key) <= 1

    tokens = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mask = additive_mask(
        mask_function=window,
        attention_mask=tokens,
        batch_size=2,
        q_length=4,
        kv_length=4,
        use_vmap=True,
    )
    assert mask is not None
    seen = mask > MASKED / 2
    for row in range(2):
        for query in range(4):
            for key in range(4):
                due = abs(query - key) <= 1 and bool(tokens[row, key])
                assert bool(seen[row, 0, query, key]) == due
    assert float(torch.exp(torch.tensor(MASKED) + 1e3)) == 0.0
