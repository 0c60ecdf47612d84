"""The rules of TensorRT's parser: broken graphs are named, every architecture passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgelm.calibration import Calibration
from edgelm.codes.config import BinaryCodes
from edgelm.codes.fitting import fit
from edgelm.errors import ExportError
from edgelm.export.codes import OUTPUT, add_codes
from edgelm.export.graph import export_graph, random_inputs
from edgelm.export.int8_dynamic import quantize_dynamic
from edgelm.export.integers import plain_integers
from edgelm.export.lint import check_graph, lint, newest_opset
from edgelm.export.precision import write_graph
from edgelm.models import load_model
from edgelm.targets import load_target
from tests.compress.test_blocks import MODELS, task_of
from tests.conftest import save_tiny

ENCODERS = sorted(name for name in MODELS if task_of(name) != "lm")
ORIN = load_target("jetson-orin-nano")
FLOAT, INT64, INT8, BOOL = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.INT8,
    TensorProto.BOOL,
)


def graph(
    tmp_path: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[int, list[Any]]],
    constants: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 20,
    output: int = FLOAT,
) -> Path:
    """A graph of some nodes, the last of which gives ``y``."""
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info("y", output, None)],
            [numpy_helper.from_array(v, n) for n, v in (constants or {}).items()],
        ),
        opset_imports=[
            helper.make_opsetid("", opset),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=9,
    )
    path = tmp_path / "g.onnx"
    onnx.save(made, path)
    return path


def node(kind: str, inputs: list[str], output: str = "y", **about: Any) -> Any:
    return helper.make_node(kind, inputs, [output], name=f"n.{output}", **about)


def rules(path: Path, tensorrt: str = "10.3") -> list[str]:
    return [problem.rule for problem in lint(path, [tensorrt])]


X = {"x": (FLOAT, ["batch", "sequence", 8])}
I = {"x": (INT64, ["batch", "sequence"])}  # noqa: E741
ONE = np.array(1.0, np.float32)


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants", "rule"),
    [
        ([node("MatMulNBits", ["x", "x"], domain="com.microsoft")], X, {}, "operator"),
        ([node("MatMulInteger", ["x", "x"])], {"x": (INT8, ["batch", 3, 3])}, {}, "operator"),
        ([node("Bernoulli", ["x"])], X, {}, "operator"),
        ([node("CumSum", ["x", "a"])], I, {"a": np.array(1)}, "type"),
        ([node("Not", ["x"])], X, {}, "type"),
        ([node("Cast", ["x"], "d", to=TensorProto.DOUBLE), node("Cast", ["d"], to=FLOAT)], X, {}, "type"),
        ([node("Cast", ["x"], "q", to=INT8), node("Cast", ["q"], to=FLOAT)], X, {}, "type"),
        ([node("NonZero", ["x"])], X, {}, "shape"),
        ([node("Reshape", ["x", "x"])], I, {}, "shape"),
        ([node("Cast", ["x"], "c", to=INT64), node("Reshape", ["x", "c"])], I, {}, "shape"),
        ([node("ReduceSum", ["x", "x"])], I, {}, "constant"),
        ([node("Add", ["x", "m"])], X, {"m": np.array(-np.inf, np.float32)}, "constant"),
        ([node("Identity", ["x"])], {"x": (FLOAT, ["batch", "words"])}, {}, "axis"),
        ([node("Identity", ["x"])], {"x": (FLOAT, ["batch", None])}, {}, "axis"),
        ([node("Softmax", ["x"])], {"x": (TensorProto.FLOAT16, ["batch", 3])}, {}, "float16"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_a_broken_rule_is_named(
    tmp_path: Path, nodes: Any, inputs: Any, constants: Any, rule: str
) -> None:
    path = graph(tmp_path, nodes, inputs, constants)
    problems = lint(path, ["10.3"])
    assert {p.rule for p in problems} == {rule}
    assert all(p.what.endswith(".") for p in problems)
    with pytest.raises(ExportError, match=r"TensorRT 10\.3 will not build this graph"):
        check_graph(path, ["10.3"])


def levels(scale: Any, zero: Any, **about: Any) -> tuple[list[Any], dict[str, Any]]:
    """Quantise ``x`` and back."""
    named = {"s": np.asarray(scale, np.float32)}
    if zero is not None:
        named["z"] = zero
    inputs = [*named]
    return [
        node("QuantizeLinear", ["x", *inputs], "q", **about),
        node("DequantizeLinear", ["q", *inputs], "y", **about),
    ], named


@pytest.mark.parametrize(
    ("scale", "zero", "count"),
    [
        (0.1, np.array(0, np.int8), 0),
        (0.1, np.array(3, np.int8), 2),  # not symmetric, both ends
        (0.1, np.array(0, np.uint8), 4),  # type of the levels, of the zero
        (0.1, None, 3),  # uint8 by default
        (0.0, np.array(0, np.int8), 2),
        (np.full(8, 0.1), np.zeros(8, np.int8), 2),  # activations a channel
    ],
)
def test_levels_are_symmetric_int8(
    tmp_path: Path, scale: Any, zero: Any, count: int
) -> None:
    nodes, named = levels(scale, zero, axis=2)
    found = rules(graph(tmp_path, nodes, X, named))
    assert len(found) == count
    assert set(found) <= {"quantisation", "type"}


@pytest.mark.parametrize(("axis", "good"), [(1, True), (0, False)])
def test_weights_have_a_scale_a_channel(tmp_path: Path, axis: int, good: bool) -> None:
    constants = {
        "w": np.ones((8, 4), np.int8),
        "s": np.ones(4, np.float32),
        "z": np.zeros(4, np.int8),
    }
    nodes = [
        node("DequantizeLinear", ["w", "s", "z"], "d", axis=axis),
        node("MatMul", ["x", "d"]),
    ]
    assert (
        rules(graph(tmp_path, nodes, X, constants)) == [] if good else ["quantisation"]
    )


def test_int8_that_is_no_level_is_refused(tmp_path: Path) -> None:
    """What ONNX Runtime reads gladly: rows of an int8 table."""
    constants = {"t": np.ones((9, 4), np.int8)}
    nodes = [node("Gather", ["t", "x"], "r"), node("Cast", ["r"], to=FLOAT)]
    assert set(rules(graph(tmp_path, nodes, I, constants))) == {"type"}


def test_a_shape_may_be_computed_from_shapes(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["x"], "s"),
        node("Mul", ["s", "one"], "t"),
        node("Expand", ["x", "t"]),
    ]
    assert rules(graph(tmp_path, nodes, X, {"one": np.array([1])})) == []


@pytest.mark.parametrize(
    ("tensorrt", "newest"),
    [("8.5.2", 17), ("9.3", 19), ("10.3", 20), ("10.13.3", 20), ("10.16.2", 24), ("11.4.1", 25)],
)  # fmt: skip
def test_opsets_by_version(tmp_path: Path, tensorrt: str, newest: int) -> None:
    assert newest_opset(tensorrt) == newest
    path = graph(tmp_path, [node("Identity", ["x"])], X, opset=newest)
    assert rules(path, tensorrt) == []
    path = graph(tmp_path, [node("Identity", ["x"])], X, opset=newest + 1)
    assert rules(path, tensorrt) == ["opset"]


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x0fnot protobuf")
    with pytest.raises(ExportError, match="is no valid ONNX graph"):
        lint(tmp_path / "g.onnx", ["10.3"])
    path = graph(tmp_path, [node("DynamicQuantizeLinear", ["x"])], X)
    with pytest.raises(ExportError, match=r"is no valid ONNX graph: .*DynamicQuan"):
        lint(path, ["10.3"])


def test_a_version_without_rules() -> None:
    with pytest.raises(ExportError, match=r"8\.2\.1 is older"):
        newest_opset("8.2.1")


def test_weights_beside_the_graph_are_not_read(tmp_path: Path) -> None:
    """As for a model of several gigabytes."""
    path = graph(tmp_path, [node("MatMul", ["x", "w"])], X, {"w": np.ones((8, 4), np.float32)})  # fmt: skip
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="w", size_threshold=0)
    (tmp_path / "w").unlink()
    assert rules(path) == []


def test_the_target_never_has_more_versions_than_its_opset_allows() -> None:
    from edgelm.targets import list_targets

    for name in list_targets():
        target = load_target(name)
        for version in target.engine.tensorrt if target.engine else ():
            assert target.opset <= newest_opset(version), name


@pytest.fixture(scope="module")
def graphs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Any, Path]]:
    """Float32 graphs of tiny models, with the model; made once."""
    root, made = tmp_path_factory.mktemp("graphs"), dict[str, tuple[Any, Path]]()

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            torch.manual_seed(0)
            folder = save_tiny(root / f"m-{name}", MODELS[name]().eval())
            loaded = load_model(str(folder), "embedding")
            (root / name).mkdir()
            path = root / name / "model.onnx"
            export_graph(loaded, path, ORIN.opset)
            made[name] = loaded, path
        return made[name]

    return get


@pytest.mark.parametrize(
    "name",
    [n if n in ("bert", "deberta-v2", "mpnet") else pytest.param(n, marks=pytest.mark.slow) for n in ENCODERS],
)  # fmt: skip
def test_every_architecture_passes_in_every_precision(
    graphs: Any, tmp_path: Path, name: str
) -> None:
    loaded, path = graphs(name)
    assert ORIN.engine is not None
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 20, "utf-8")
    versions = [v for n in ("jetson-orin-nano", "jetson-thor-t5000") for v in load_target(n).engine.tensorrt]  # type: ignore[union-attr]  # fmt: skip
    assert lint(path, versions) == []
    for precision in ORIN.precisions:
        folder = tmp_path / precision
        folder.mkdir()
        write_graph(loaded, ORIN, precision, path, folder, Calibration(str(texts)))
        assert lint(folder / "model.onnx", versions) == [], precision


def test_the_graph_for_cpus_is_refused(graphs: Any, tmp_path: Path) -> None:
    _, path = graphs("bert")
    quantize_dynamic(path, tmp_path / "q.onnx")
    assert set(rules(tmp_path / "q.onnx")) >= {"operator", "type"}


def test_codes_in_the_graph_pass(graphs: Any, tmp_path: Path) -> None:
    _, path = graphs("bert")
    vectors = np.random.default_rng(0).normal(size=(400, 32)).astype(np.float32)
    coder = fit(vectors, BinaryCodes(bits=32))
    copy = tmp_path / "model.onnx"
    copy.write_bytes(path.read_bytes())
    add_codes(copy, coder, 60)
    assert OUTPUT in {o.name for o in onnx.load(copy).graph.output}
    assert rules(copy) == []


@pytest.mark.parametrize(
    "kind", ["CumSum", "Clip", "Clip low", "Clip high", "Clip none"]
)
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_integers_stay_what_they_are(tmp_path: Path, kind: str, dtype: Any) -> None:
    constants = {"a": np.array(1), "l": np.array(-2, dtype), "h": np.array(3, dtype)}
    inputs = {
        "CumSum": ["x", "a"],
        "Clip": ["x", "l", "h"],
        "Clip low": ["x", "l"],
        "Clip high": ["x", "", "h"],
        "Clip none": ["x"],
    }[kind]
    element = INT64 if dtype is np.int64 else TensorProto.INT32
    made = [node(kind.split()[0], inputs), node("Identity", ["y"], "z")]
    path = graph(tmp_path, made, {"x": (element, ["batch", "sequence"])}, constants, output=element)  # fmt: skip
    before = onnx.load(path)
    proto = onnx.load(path)
    plain_integers(proto)
    assert kind.split()[0] not in {
        n.op_type for n in proto.graph.node if n.op_type == "Clip"
    }
    feed = np.random.default_rng(1).integers(-9, 9, (4, 700)).astype(dtype)
    due, found = (
        onnxruntime.InferenceSession(p.SerializeToString()).run(None, {"x": feed})[0]
        for p in (before, proto)
    )
    assert found.dtype == due.dtype
    np.testing.assert_array_equal(found, due)


def test_a_float_clip_is_left_alone(tmp_path: Path) -> None:
    path = graph(tmp_path, [node("Clip", ["x"])], X)
    proto = onnx.load(path)
    plain_integers(proto)
    assert [n.op_type for n in proto.graph.node] == ["Clip"]


def test_positions_of_roberta_are_exact_at_the_longest_input(
    graphs: Any,
) -> None:
    """Its positions are a sum over the mask."""
    loaded, path = graphs("mpnet")
    feeds = random_inputs(["input_ids", "attention_mask"], 2, loaded.max_length, 60)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    (output, *_) = session.run(None, {k: v for k, v in feeds.items() if k in names})
    assert np.isfinite(output).all()


def test_bfloat16_is_for_newer_versions_and_for_products(tmp_path: Path) -> None:
    half, shape = TensorProto.BFLOAT16, ["batch", "sequence", 8]
    nodes = [node("MatMul", ["x", "x"])]
    path = graph(tmp_path, nodes, {"x": (half, [8, 8])}, opset=17, output=half)
    assert rules(path) == []
    assert rules(path, "8.6") == ["type"]
    norm = [node("Softmax", ["x"])]
    assert rules(graph(tmp_path, norm, {"x": (half, shape)}, output=half)) == [
        "float16"
    ]
