"""Where the time goes: every operator has a group, and the sum is the wall clock."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from edgelm.cli import cli
from edgelm.errors import InputError
from edgelm.evaluate.operators import GROUPS, find_groups
from edgelm.evaluate.profile import profile
from edgelm.export.graph import export_graph
from edgelm.export.int8_dynamic import quantize_dynamic
from edgelm.models import load_model
from edgelm.reports.profile import profile_section, sentences
from tests.compress.test_blocks import MODELS
from tests.conftest import save_tiny

QUICK = ["t5"]
OTHERS = [
    "albert",
    "bert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
]
# Query, key and value in one; keys and queries of relative positions beside the usual four.
ATTENTION = {"modernbert": 6, "deberta-v2": 18}
TEXTS = ["the man plays", "paris", "an old book of the river in the city"] * 5


def optimised(path: Path) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    saved = path.with_suffix(".optimised.onnx")
    options.optimized_model_filepath = str(saved)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(saved)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_every_operator_of_every_encoder_has_a_group(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    save_tiny(tmp_path, model if name == "t5" else model.base_model)
    export_graph(load_model(str(tmp_path), task="embedding"), tmp_path / "f.onnx", 20)
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx")
    for file in ("f.onnx", "q.onnx"):
        plain = onnx.load(tmp_path / file)
        for proto in (plain, optimised(tmp_path / file)):
            found = find_groups(proto)
            assert set(found.groups) == {node.name for node in proto.graph.node}
            count = Counter(found.groups[product] for product in found.products)
            assert count["ffn"] == 6, "two in each of three layers"
            due = ATTENTION.get(name, 12)
            if name == "deberta-v2" and proto is not plain:
                due = 12  # what depends on no text has been computed
            assert count["attention"] == due
            kinds: dict[str, Counter[str]] = {g: Counter() for g in (*GROUPS, "other")}
            for node, group in found.groups.items():
                kinds[group][found.kinds[node]] += 1
            assert kinds["attention"]["Softmax"] == 3
            assert not kinds["ffn"]["Softmax"]
            assert kinds["embedding"]
            assert kinds["normalise"]
            assert kinds["pooling"]["ReduceSum"]
            # DeBERTa's norm of relative positions feeds all layers and is nobody's.
            assert set(kinds["other"]) <= (
                {"LayerNormalization"} if name == "deberta-v2" else set()
            )
            whole = {p.whole for ps in found.products.values() for p in ps}
            assert whole == {file == "q.onnx"}


def test_what_is_not_recognised_is_other(tmp_path: Path) -> None:
    """A convolution between two layers is neither attention nor anything else known."""
    helper, make = onnx.helper, onnx.helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], name="query"),
        helper.make_node("MatMul", ["q", "q"], ["s"], name="scores"),
        helper.make_node("Softmax", ["s"], ["p"], name="softmax"),
        helper.make_node("MatMul", ["p", "q"], ["c"], name="context"),
        helper.make_node("MatMul", ["c", "w"], ["o"], name="out"),
        helper.make_node("Conv", ["o", "k"], ["v"], name="odd"),
        helper.make_node("MatMul", ["v", "w"], ["u"], name="up"),
        helper.make_node("Relu", ["u"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["d"], name="down"),
        helper.make_node("ReduceMax", ["d"], ["y"], name="pool"),
    ]
    constants = [
        onnx.helper.make_tensor("w", 1, [4, 4], [0.0] * 16),
        onnx.helper.make_tensor("k", 1, [4, 4, 1], [0.0] * 16),
    ]
    graph = helper.make_graph(
        nodes, "g", [make("x", 1, [1, 4, 4])], [make("y", 1, [1])], constants
    )
    groups = find_groups(helper.make_model(graph)).groups
    assert groups == {
        "query": "attention",
        "scores": "attention",
        "softmax": "attention",
        "context": "attention",
        "out": "attention",
        "odd": "other",
        "up": "ffn",
        "relu": "ffn",
        "down": "ffn",
        "pool": "pooling",
    }


@pytest.mark.parametrize(
    ("kind", "precision", "target"),
    [
        ("embedding", "int8", "cpu"),
        ("scorer", "fp32", "cpu"),
        ("ner", "int8", "cpu-openvino"),
    ],
)
def test_the_groups_add_up_to_the_wall_clock(
    bundles: Callable[..., Path], kind: str, precision: str, target: str
) -> None:
    found = profile(str(bundles(kind, precision, target)), TEXTS, rounds=3, threads=1)
    shares = {group["name"]: group["share"] for group in found["groups"]}
    assert list(shares) == ["tokenise", *GROUPS, "other", "unaccounted"]
    assert sum(shares.values()) == pytest.approx(1)
    for name in ("tokenise", "attention", "ffn", "embedding", "unaccounted"):
        assert 0 < shares[name] < 1, name
    assert found["texts_per_s"] == pytest.approx(15 / found["wall_ms"] * 1e3)
    products = found["products"]
    # 32 wide, 64 within, two layers of four and two products.
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert sum(s["inputs"] * s["outputs"] * s["count"] for s in products["shapes"]) == (
        weights
    )
    assert products["gop_a_text"] > 2 * weights * 4 / 1e9
    own = "int8" if precision == "int8" else "float"
    assert products["ceiling_gops"] == pytest.approx(products[f"{own}_ceiling_gops"])
    assert products["gops"] > 0
    assert any("GOP/s" in sentence for sentence in sentences(found))
    page = profile_section(found)
    assert page.count("<svg") == 2
    assert "unaccounted" in page


def test_the_command_shows_it_and_refuses_models(
    bundles: Callable[..., Path], tmp_path: Path
) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("\n".join(TEXTS), "utf-8")
    report = tmp_path / "r"
    arguments = ["--profile", "--rounds", "1", "--threads", "1", "--texts", str(texts)]
    arguments += ["--report", str(report), "--json"]
    bundle = str(bundles("embedding", "int8"))
    result = CliRunner().invoke(cli, ["bench", bundle, *arguments])
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout.splitlines()[0])
    assert printed["profile"]["groups"][0]["name"] == "tokenise"
    assert "Where the time goes" in result.stderr
    assert "Where the time goes" in report.with_suffix(".html").read_text("utf-8")
    with pytest.raises(InputError, match="is no bundle"):
        profile(str(tmp_path), TEXTS)
