"""float16 and bfloat16: typed, in range, and the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import edgelm
from edgelm.bundle import open_bundle
from edgelm.errors import ExportError, SessionError, TargetError
from edgelm.export import export
from edgelm.export.audit import audit
from edgelm.export.editor import HALVES, layer
from edgelm.export.graph import export_graph, random_inputs
from edgelm.export.half import FLOAT, write_half
from edgelm.export.rounded import open_here
from edgelm.metrics import snr_db
from edgelm.models import load_model
from tests.compress.test_blocks import MODELS
from tests.conftest import export_bundle, save_tiny

NAMES = ["input_ids", "attention_mask", "token_type_ids"]
# What must be float32 wherever it stands.
EXACT = {"LayerNormalization", "Softmax", "ReduceSum", "ReduceL2", "ReduceMean", "Div"}
EXACT |= {"Pow", "Sqrt", "Where", "Sub", "Clip", "Exp", "ReduceMax", "Max", "Gemm"}
QUICK = ["distilbert", "t5"]
OTHERS = ["albert", "bert", "deberta-v2", "electra", "modernbert", "mpnet", "roberta"]


def answers(path: Path, given: dict[str, Any]) -> np.ndarray:
    wanted = {value.name for value in onnx.load(path).graph.input}
    given = {k: v for k, v in given.items() if k in wanted}
    (output,) = open_here(path).run(given).values()
    return np.asarray(output)


def types(path: Path) -> tuple[onnx.ModelProto, dict[str, int]]:
    proto = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    values = (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    known = {v.name: v.type.tensor_type.elem_type for v in values}
    return proto, known | {t.name: t.data_type for t in proto.graph.initializer}


def texts(names: list[str], count: int = 12) -> list[dict[str, Any]]:
    return [random_inputs(names, 1, 4 + i, 60) for i in range(count)]


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_every_encoder_is_typed_and_agrees(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    save_tiny(tmp_path, model if name == "t5" else model.base_model)
    loaded = load_model(str(tmp_path), task="embedding")
    graph = export_graph(loaded, tmp_path / "f.onnx", 20)
    names = [tensor.name for tensor in graph.inputs]
    for kind in HALVES:
        agrees(tmp_path, names, kind)


def agrees(tmp_path: Path, names: list[str], kind: str) -> None:
    due_type = HALVES[kind]
    _, kept = write_half(tmp_path / "f.onnx", tmp_path / "h.onnx", texts(names), kind)
    assert kept == {}
    proto, known = types(tmp_path / "h.onnx")
    halves = 0
    for node in proto.graph.node:
        read = {known[n] for n in node.input if known.get(n) in (FLOAT, due_type)}
        assert len(read) < 2, f"{node.name} reads both types"
        assert node.op_type not in EXACT or due_type not in read, node.name
        halves += node.op_type == "MatMul" and read == {due_type}
    before = onnx.load(tmp_path / "f.onnx")
    last = {w.node for w in audit(before) if w.kind == "head"}
    products = [n for n in before.graph.node if n.op_type == "MatMul"]
    assert halves == len([n for n in products if n.name not in last])
    given = random_inputs(names, 4, 13, 60)
    due = answers(tmp_path / "f.onnx", given)
    found = answers(tmp_path / "h.onnx", given)
    assert found.dtype == np.float32
    assert snr_db(due, found) > {"fp16": 45, "bf16": 27}[kind]
    # A text of padding but for one token: no mask became an infinity.
    given["attention_mask"][:, 1:] = 0
    assert np.isfinite(answers(tmp_path / "h.onnx", given)).all()


@pytest.mark.parametrize(
    ("kind", "precision", "least"),
    [("ner", "fp16", 45), ("scorer", "fp16", 45), ("scorer", "bf16", 27)],
)
def test_heads_stay_float32(
    tiny: Any, tmp_path: Path, kind: str, precision: str, least: float
) -> None:
    path = export_bundle(
        str(tiny(kind)), tmp_path / "b", target="jetson", precision=precision
    )
    manifest = open_bundle(path).manifest
    assert manifest.precision == precision
    assert manifest.golden.measured_snr_db > least
    found = audit(onnx.load(path / "model.onnx"))
    assert {w.precision for w in found if w.kind == "product"} == {precision}
    assert {w.precision for w in found if w.kind == "head"} == {"fp32"}
    assert {w.precision for w in found if w.kind == "table" and w.weights > 64} == {
        precision
    }
    assert ("checked" in manifest.provenance["precision"]) == (precision == "bf16")
    if precision == "bf16":
        with pytest.raises(SessionError, match=r"no bf16 products.*--precision fp16"):
            edgelm.load(path, provider="CPUExecutionProvider")


@pytest.mark.parametrize("target", ["cpu", "cpu-openvino", "nvidia-gpu"])
def test_what_has_no_bfloat16_refuses_it(
    target: str, tiny: Any, tmp_path: Path
) -> None:
    loaded = load_model(str(tiny("embedding")))
    with pytest.raises(TargetError, match=r"has the precisions .*; bf16 was asked for"):
        export(loaded, target, tmp_path / "b", precision="bf16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 33)])
def test_bfloat16_computes_what_torch_does(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    """A layer with a residual sum and a layer norm, whose products torch computes in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    up = torch.randn(24, 56, generator=draw)
    bias = torch.randn(56, generator=draw) * 1e5
    down = torch.randn(56, 24, generator=draw)
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    constants = {"up": up, "bias": bias, "down": down, "one": torch.ones(24)}
    about = [shape[0], shape[1], 24]
    made = onnx.helper.make_graph(
        [
            node("MatMul", ["x", "up"], ["a"], "a"),
            node("Add", ["a", "bias"], ["b"], "b"),
            node("Relu", ["b"], ["c"], "c"),
            node("MatMul", ["c", "down"], ["d"], "d"),
            node("Add", ["d", "x"], ["e"], "e"),
            node("LayerNormalization", ["e", "one"], ["y"], "y"),
        ],
        "g",
        [value("x", FLOAT, about)],
        [value("y", FLOAT, about)],
        [onnx.numpy_helper.from_array(v.numpy(), n) for n, v in constants.items()],
    )
    model = onnx.helper.make_model(
        made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.save(model, tmp_path / "f.onnx")
    write_half(tmp_path / "f.onnx", tmp_path / "h.onnx", [], "bf16")
    _, known = types(tmp_path / "h.onnx")
    kinds = [known[name] for name in "abcdey"]
    assert kinds == [*[HALVES["bf16"]] * 4, FLOAT, FLOAT]
    # Nothing that float16 holds comes of it.
    x = torch.randn(*about, generator=draw) * 1e5
    half = torch.bfloat16
    inner = torch.relu(x.to(half) @ up.to(half) + bias.to(half))
    wide = (inner @ down.to(half)).float() + x
    due = torch.nn.functional.layer_norm(wide, (24,)).numpy()
    exact = torch.relu(x @ up + bias) @ down + x
    exact = torch.nn.functional.layer_norm(exact, (24,)).numpy()
    found = answers(tmp_path / "h.onnx", {"x": x.numpy()})
    # Sums in another order may round the other way, which is rare.
    assert snr_db(due, found) > snr_db(exact, found) + 10
    assert 35 < snr_db(exact, found) < 50


def changed(
    source: Path, path: Path, edits: dict[tuple[str, str], Callable[[Any], Any]]
) -> Path:
    """A graph with other constants, by operator and layer; equal ones are one constant there."""
    proto = onnx.load(source)
    numpy = onnx.numpy_helper
    constants = {t.name: numpy.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        edit = edits.get((node.op_type, layer(node)))
        if edit is None:
            continue
        (place,) = [i for i, n in enumerate(node.input[:2]) if n in constants]
        value = edit(constants[node.input[place]].copy()).astype("f4")
        node.input[place] = f"{node.name}.changed"
        proto.graph.initializer.append(numpy.from_array(value, node.input[place]))
    onnx.save(proto, path)
    return path


@pytest.fixture
def overflowing(bundles: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose second layer brings values that no float16 holds, and takes them back."""

    def far(bias: Any) -> Any:
        bias[3] += 2e5
        return bias

    def little(weight: Any) -> Any:
        weight[3] = 1e-6
        return weight

    edits = {
        ("Add", "encoder.layer.1.intermediate.dense"): far,
        ("MatMul", "encoder.layer.1.output.dense"): little,
    }
    source = bundles("embedding") / "model.onnx"
    return changed(source, tmp_path / "f.onnx", edits)


def test_what_overflows_stays_float32_and_is_named(
    overflowing: Path, tmp_path: Path
) -> None:
    _, kept = write_half(overflowing, tmp_path / "h.onnx", texts(NAMES))
    assert any("values up to 2e+05" in reason for reason in kept.values())
    assert "encoder.layer.1.output.dense (MatMul)" in kept
    assert all("layer.1." in name for name in kept)
    found = {
        w.layer: w.precision
        for w in audit(onnx.load(tmp_path / "h.onnx"))
        if w.kind == "product"
    }
    assert [n for n, p in found.items() if p == "fp32"] == [
        "encoder.layer.1.output.dense"
    ]
    given = random_inputs(NAMES, 4, 13, 60)
    due = answers(overflowing, given)
    assert snr_db(due, answers(tmp_path / "h.onnx", given)) > 45


def test_weights_that_vanish_in_float16_stay_float32(
    bundles: Callable[..., Path], tmp_path: Path
) -> None:
    name = "encoder.layer.0.intermediate.dense"
    source = bundles("embedding") / "model.onnx"
    edits = {("MatMul", name): lambda weight: weight * 1e-6}
    changed(source, tmp_path / "f.onnx", edits)
    _, kept = write_half(tmp_path / "f.onnx", tmp_path / "h.onnx", texts(NAMES))
    assert kept == {f"{name} (MatMul)": "weights too small for float16"}


def test_a_model_that_overflows_in_float32_is_refused(
    bundles: Callable[..., Path], tmp_path: Path
) -> None:
    source = bundles("embedding") / "model.onnx"
    name = ("LayerNormalization", "encoder.layer.0.output.LayerNorm")
    changed(source, tmp_path / "f.onnx", {name: lambda weight: weight * 3e38})
    with pytest.raises(ExportError, match="overflows in float32"):
        write_half(tmp_path / "f.onnx", tmp_path / "h.onnx", texts(NAMES))
