"""Which layers stay in float, and what the drop is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle import open_bundle
from edgelm.errors import ExportError, GateError, InputError
from edgelm.export import export
from edgelm.export.audit import audit
from edgelm.export.graph import export_graph, random_inputs
from edgelm.export.int8_static import observe, quantize_static
from edgelm.export.sensitivity import Group, choose, drop, groups
from edgelm.manifest import EmbeddingInfo, NerInfo, ScoringInfo
from edgelm.models import load_model

NER = NerInfo(("O", "B-PER", "I-PER"), "BIO")


def made_up(costs: list[float], sizes: list[int]) -> list[Group]:
    return [
        Group((f"n{i}a", f"n{i}b"), (f"l{i}",), size)
        for i, (_, size) in enumerate(zip(costs, sizes, strict=True))
    ]


def adds_up(costs: list[float], least: float) -> Any:
    def measure(keep: Collection[str]) -> float:
        return least + sum(c for i, c in enumerate(costs) if f"n{i}a" not in keep)

    return measure


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 100), st.integers(1, 50)), min_size=1, max_size=9
    ),
    st.integers(0, 300),
)
def test_the_limit_holds_and_no_group_is_in_float_for_nothing(
    parts: list[tuple[int, int]], allowed: int
) -> None:
    costs = [float(cost) for cost, _ in parts]
    found = made_up(costs, [size for _, size in parts])
    measure = adds_up(costs, 0.0)
    plan = choose(found, measure, allowed)
    achieved = measure(plan.keep)
    assert achieved <= allowed
    assert plan.predicted == pytest.approx(achieved)
    for group in found:
        inside = plan.keep & set(group.nodes)
        assert inside in (set(), set(group.nodes)), "groups are not torn apart"
        if inside:
            assert measure(plan.keep - inside) > allowed, "it could be quantised"
    if sum(costs) <= allowed:
        assert not plan.keep


def test_what_costs_most_for_its_size_goes_first() -> None:
    found = made_up([5.0, 5.0, 1.0], [10, 100, 1])
    plan = choose(found, adds_up([5.0, 5.0, 1.0], 0.5), 6.6)
    assert plan.keep == {"n0a", "n0b"}
    assert [c.precision for c in plan.choices] == ["fp32", "int8", "int8"]
    assert [c.drop for c in plan.choices] == [5.0, 5.0, 1.0]
    assert plan.least == 0.5


def test_what_cannot_hold_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        GateError, match=r"the drop is 0\.5; --max-drop allows 0\.1.*fp32"
    ):
        choose(made_up([1.0], [1]), adds_up([1.0], 0.5), 0.1)


def test_the_drop_of_embeddings_is_one_minus_cosine() -> None:
    info = EmbeddingInfo(2, "mean", True)
    due = [np.array([[1, 0]], np.float32), np.array([[0, 2]], np.float32)]
    found = [np.array([[3, 0]], np.float32), np.array([[1, 1]], np.float32)]
    assert drop(info, due, due) == pytest.approx(0)
    assert drop(info, due, found) == pytest.approx((1 - 0.5**0.5) / 2)


def test_the_drop_of_labels_counts_only_entities() -> None:
    def logits(labels: list[int]) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[labels][None]

    due = [logits([0, 0, 0, 1, 2]), logits([0, 1])]
    # One entity lost, one found where none was, two kept; the many O do not count.
    found = [logits([0, 0, 1, 1, 0]), logits([0, 1])]
    assert drop(NER, due, found) == pytest.approx(2 / 4)
    assert drop(NER, due, due) == 0
    with pytest.raises(InputError, match="finds no entities"):
        drop(NER, [logits([0, 0])], [logits([0, 0])])


def test_the_drop_of_scores() -> None:
    due = [np.array([[1.0], [2.0], [3.0]], np.float32)]
    one = ScoringInfo(("s",), "sigmoid", "pair")
    assert drop(one, due, [2 * due[0] + 1]) == pytest.approx(0), "the order is the same"
    assert drop(one, due, [-due[0]]) == pytest.approx(2)
    with pytest.raises(InputError, match="fewer than three different scores"):
        drop(one, [due[0][:2]], [due[0][:2]])
    with pytest.raises(GateError, match="every text the same score"):
        drop(one, due, [0 * due[0]])
    several = ScoringInfo(("a", "b"), "softmax", "single")
    before = [np.array([[0.0, 0.0]], np.float32)]
    after = [np.array([[0.0, 100.0]], np.float32)]
    assert drop(several, before, after) == pytest.approx(0.5)


def test_numbers_that_are_not_finite_are_no_drop() -> None:
    with pytest.raises(GateError, match="not finite"):
        drop(NER, [np.zeros((1, 1, 3))], [np.full((1, 1, 3), np.nan)])


@pytest.fixture
def fragile(tiny: Any, tmp_path: Path) -> tuple[Any, Path]:
    """A model and its graph; beside a neuron that nothing reads, int8 sees nothing of one layer's input."""
    loaded = load_model(str(tiny("embedding")))
    with torch.no_grad():
        block = loaded.model.encoder.layer[0]
        block.intermediate.dense.bias[3] += 300
        block.output.dense.weight *= 50
        block.output.dense.weight[:, 3] = 0
    graph = tmp_path / "float" / "model.onnx"
    graph.parent.mkdir()
    export_graph(loaded, graph, 20)
    return loaded, graph


def test_auto_holds_the_drop_and_says_what_it_did(
    fragile: tuple[Any, Path], tmp_path: Path
) -> None:
    loaded, graph = fragile
    options: Any = {"float_graph": graph, "min_snr_db": 0}
    with pytest.raises(GateError, match=r"int8 graph .* has a drop of .*allows 0\.01"):
        export(
            loaded, "cpu", tmp_path / "b", precision="int8", max_drop=0.01, **options
        )
    assert not (tmp_path / "b").exists()
    bundle = export(loaded, "cpu", tmp_path / "b", max_drop=0.01, **options)
    about = bundle.manifest.provenance["precision"]
    assert about["drop"] <= 0.01 == about["max_drop"]
    assert about["measure"] == "1 - mean cosine"
    chosen = {n: c["precision"] for c in about["layers"] for n in c["layers"]}
    assert [n for n, p in chosen.items() if p == "fp32"] == [
        "encoder.layer.0.output.dense"
    ]
    worst = max(about["layers"], key=lambda choice: choice["drop"])
    assert worst["layers"] == ["encoder.layer.0.output.dense"]
    assert worst["drop"] > 0.01
    assert about["tables"] <= about["predicted"] <= 0.01
    found = {
        w.layer: w.precision
        for w in audit(onnx.load(bundle.file("model.onnx")))
        if w.kind == "product"
    }
    assert found == chosen, "the graph is what the manifest says"
    assert open_bundle(tmp_path / "b").manifest.provenance["precision"] == about


def test_static_int8_keeps_in_float_what_it_is_told_to(
    bundles: Callable[..., Path], tmp_path: Path
) -> None:
    source = bundles("embedding") / "model.onnx"
    names = ["input_ids", "attention_mask", "token_type_ids"]
    scalings = observe(source, (random_inputs(names, 1, 4 + i, 60) for i in range(20)))
    first, *_, last = groups(onnx.load(source))
    # One of query, key and value, too: the others still read the quantised input.
    keep = {first.nodes[1], *last.nodes}
    quantize_static(source, tmp_path / "q.onnx", scalings, keep)
    found = audit(onnx.load(tmp_path / "q.onnx"))
    products = {w.node: w.precision for w in found if w.kind == "product"}
    assert {n for n, p in products.items() if p == "fp32"} == keep
    assert list(products.values()).count("int8") == 10
    with pytest.raises(ExportError, match="no weighted product nonsense"):
        quantize_static(source, tmp_path / "q.onnx", scalings, {"nonsense"})


def test_groups_are_what_reads_one_tensor(bundles: Callable[..., Path]) -> None:
    found = groups(onnx.load(bundles("ner") / "model.onnx"))
    assert [len(g.nodes) for g in found] == [3, 1, 1, 1] * 2
    assert found[0].layers[1].endswith("encoder.layer.0.attention.self.key")
    assert [g.weights for g in found[:4]] == [3 * 32 * 32, 32 * 32, 32 * 64, 32 * 64]
