"""float16: typed, in range, and the same answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgelm.bundle import open_bundle
from edgelm.errors import ExportError
from edgelm.export.audit import audit
from edgelm.export.editor import layer
from edgelm.export.graph import export_graph, random_inputs
from edgelm.export.half import FLOAT, FLOAT16, write_half
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
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {tensor.name for tensor in session.get_inputs()}
    (output,) = session.run(None, {k: v for k, v in given.items() if k in wanted})
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
    _, kept = write_half(tmp_path / "f.onnx", tmp_path / "h.onnx", texts(names))
    assert kept == {}
    proto, known = types(tmp_path / "h.onnx")
    halves = 0
    for node in proto.graph.node:
        read = {known[n] for n in node.input if known.get(n) in (FLOAT, FLOAT16)}
        assert len(read) < 2, f"{node.name} reads both types"
        assert node.op_type not in EXACT or FLOAT16 not in read, node.name
        halves += node.op_type == "MatMul" and read == {FLOAT16}
    before = onnx.load(tmp_path / "f.onnx")
    last = {w.node for w in audit(before) if w.kind == "head"}
    products = [n for n in before.graph.node if n.op_type == "MatMul"]
    assert halves == len([n for n in products if n.name not in last])
    given = random_inputs(names, 4, 13, 60)
    due = answers(tmp_path / "f.onnx", given)
    found = answers(tmp_path / "h.onnx", given)
    assert found.dtype == np.float32
    assert snr_db(due, found) > 45
    # A text of padding but for one token: no mask became an infinity.
    given["attention_mask"][:, 1:] = 0
    assert np.isfinite(answers(tmp_path / "h.onnx", given)).all()


@pytest.mark.parametrize("kind", ["ner", "scorer"])
def test_heads_stay_float32(tiny: Any, tmp_path: Path, kind: str) -> None:
    path = export_bundle(
        str(tiny(kind)), tmp_path / "b", target="jetson", precision="fp16"
    )
    manifest = open_bundle(path).manifest
    assert manifest.precision == "fp16"
    assert manifest.golden.measured_snr_db > 45
    found = audit(onnx.load(path / "model.onnx"))
    assert {w.precision for w in found if w.kind == "product"} == {"fp16"}
    assert {w.precision for w in found if w.kind == "head"} == {"fp32"}
    assert {w.precision for w in found if w.kind == "table" and w.weights > 64} == {
        "fp16"
    }


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
