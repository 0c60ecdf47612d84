"""How sparsity is shared out among blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import BertModel

from edgelm import layers
from edgelm.calibration import Batch
from edgelm.compress import Blocks, Sparsify, compress
from edgelm.compress.allocation import owl, plan, progressive
from edgelm.errors import ConfigError
from tests.conftest import tiny_config


@pytest.fixture
def batches() -> list[Batch]:
    ids = torch.randint(5, 60, (6, 12))
    return [Batch(ids, torch.ones_like(ids))]


@pytest.mark.parametrize("blocks", [1, 2, 5, 12])
def test_progressive_rises_evenly_about_the_mean(blocks: int) -> None:
    found = progressive(blocks, 0.6, 0.1)
    assert sum(found) / blocks == pytest.approx(0.6)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert steps == pytest.approx([0.2 / max(blocks - 1, 1)] * (blocks - 1))


def test_owl_leaves_blocks_with_outliers_denser() -> None:
    found = owl([0.01, 0.05, 0.03], 0.7, 0.08)
    assert sum(found) / 3 == pytest.approx(0.7)
    assert found[0] - found[1] == pytest.approx(0.16)
    assert found[0] > found[2] > found[1]
    assert owl([0.02, 0.02], 0.7, 0.08) == [0.7, 0.7]


def test_owl_counts_outliers_where_they_are(batches: list[Batch]) -> None:
    """A block with a few huge weights must come out denser than its twin."""
    model = BertModel(tiny_config(num_hidden_layers=3)).eval()
    found = layers.blocks(model)
    for _, layer in layers.linears(model, found[1][1]):
        layers.weight_matrix(layer)[:, :3] *= 30
    step = Sparsify(sparsity=0.5, allocation="owl", band=0.1)
    with torch.no_grad():
        planned = [float(c.sparsity) for c in plan(step, Blocks(model), 0, batches)]
    assert sum(planned) / 3 == pytest.approx(0.5)
    assert planned[1] == min(planned)
    assert max(planned) - min(planned) == pytest.approx(0.2)


@pytest.mark.parametrize("allocation", ["owl", "progressive"])
def test_the_model_gets_what_was_planned(allocation: str, batches: list[Batch]) -> None:
    model = BertModel(tiny_config(num_hidden_layers=3)).eval()
    step = Sparsify(
        sparsity=0.5,
        allocation=allocation,  # type: ignore[arg-type]
        band=0.2,
        refine="none",
        repair="none",
    )
    with torch.no_grad():
        planned = plan(step, Blocks(model), 0, batches)
    rows = compress(Blocks(model), [step], batches, batches)
    for row in rows:
        block = int(row["layer"].split(".")[2])
        width = row["shape"][1]
        due = int(width * float(planned[block].sparsity) + 1e-9) / width
        assert row["sparsity"] == pytest.approx(due)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="narrower band"):
        progressive(4, 0.95, 0.1)
    with pytest.raises(ConfigError, match=r"--sparsity 0.5"):
        Sparsify(sparsity="2:4", allocation="owl")
    with pytest.raises(ConfigError, match="'band'"):
        Sparsify(band=0.5)
