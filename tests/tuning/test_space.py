"""What can be tried for a target, and what it becomes."""

from __future__ import annotations

import pytest

from edgelm.errors import ModelError
from edgelm.recipe import PRESETS, parse_recipe
from edgelm.targets import list_targets, load_target
from edgelm.tuning.space import (
    SPACES,
    Configuration,
    every,
    normal,
    presets,
    space_for,
)


@pytest.mark.parametrize("name", list_targets())
def test_a_space_asks_for_nothing_that_its_target_refuses(name: str) -> None:
    target = load_target(name)
    if target.runtime not in SPACES:
        return
    space = space_for(target, "bert", table_bits=True)
    sparse = target.gpu is not None and target.gpu.sparse_2_4
    found = list(every(space))
    assert len(found) == len(set(found)) > 10
    for c in found:
        assert c.precision in target.precisions
        assert c == normal(c)
        assert c.sparsity == "none" or (sparse and c.precision in ("fp16", "bf16"))
        assert c.table_bits == 8 or target.runtime == "onnxruntime"
        assert (c.floats, c.table_bits) == (0, 8) or c.precision == "int8"
        assert not c.steps or parse_recipe({"steps": c.steps}, "x").steps
    assert {c.neurons for c in presets(space)} == {1.0, *PRESETS.values()}
    assert set(presets(space)) <= set(found)


def test_an_architecture_that_needs_its_heads_keeps_them() -> None:
    space = space_for(load_target("cpu"), "mpnet", table_bits=True)
    assert "heads" not in space
    assert {c.heads for c in every(space)} == {1.0}


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match="Models of type 'fnet' cannot be compressed"):
        space_for(load_target("cpu"), "fnet", table_bits=True)


def test_a_configuration_becomes_the_recipe_that_its_flags_would_be() -> None:
    c = Configuration(neurons=0.5, allocation="auto", heads=0.75, sparsity="2:4")
    assert [s["method"] for s in c.steps] == ["shrink", "shrink", "sparsify"]
    assert [s.get("part") for s in c.steps] == ["heads", "neurons", None]
    assert Configuration().steps == []
    assert c.dense == Configuration()
