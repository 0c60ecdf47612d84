"""Routed experts in ONNX Runtime: the operator against numpy and PyTorch, the gate, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from transformers import BertModel

from edgelm import layers
from edgelm.bundle import open_bundle
from edgelm.calibration import Calibration
from edgelm.cli import cli
from edgelm.compress import FactorLLM
from edgelm.errors import ExportError, TargetError
from edgelm.export import export, export_fastest
from edgelm.export.audit import audit
from edgelm.export.graph import export_graph, random_inputs
from edgelm.export.modules import wrap
from edgelm.export.moe import moe
from edgelm.export.routed import (
    LENGTHS,
    TOLERANCE_DB,
    in_turns,
    refusal,
    write_experts,
    write_narrow,
)
from edgelm.metrics import snr_db
from edgelm.models import LoadedModel, load_model
from edgelm.pipeline import compress_model
from edgelm.recipe import Recipe
from edgelm.runtimes.session import OnnxSession
from tests.conftest import save_tiny, tiny_config

FAST = {"routed": {16: 1.0, 32: 2.0}, "static": {16: 1.5, 32: 2.5}, "dense": {16: 3.0, 32: 5.0}}  # fmt: skip
SLOW = {**FAST, "routed": {16: 1.25, 32: 2.75}}


def routed(model: str, path: Path, **settings: Any) -> LoadedModel:
    """A routed model, by way of its checkpoint."""
    step = FactorLLM(**{"experts": 4, "active": 2, "steps": 0, **settings})
    recipe = Recipe(Calibration(max_texts=48, max_tokens=32), (step,))
    compress_model(model, recipe, path)
    return load_model(str(path))


@pytest.fixture(scope="module")
def checkpoint(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of the tiny embedding model, routers at random; not to be changed."""
    path = tmp_path_factory.mktemp("routed") / "ckpt"
    routed(str(tiny("embedding")), path)
    return path


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> Path:
    """Its float32 graph of all experts, alone in its folder."""
    path = checkpoint.parent / "float" / "model.onnx"
    path.parent.mkdir()
    export_graph(load_model(str(checkpoint)), path, 20)
    return path


def with_active(checkpoint: Path, active: int) -> LoadedModel:
    """The same with another number of active experts."""
    loaded = load_model(str(checkpoint))
    assert loaded.routing is not None
    for network in loaded.routing.networks.values():
        network.active = active
    return loaded


@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_operator_adds_up_a_tokens_experts(activation: str, active: int) -> None:
    draw = np.random.default_rng(active)
    experts, hidden, width = 4, 16, 32
    w1, b1, w2, router, shift = (
        draw.standard_normal(shape).astype(np.float32)
        for shape in (
            (width, hidden),
            width,
            (hidden, width),
            (hidden, experts),
            experts,
        )
    )
    x = draw.standard_normal((3, 5, hidden)).astype(np.float32)
    nodes, constants = moe(
        "x", "y", (w1, b1, w2), (router, shift), active, scale=experts, activation=activation
    )  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        [info("x", 1, ["batch", "sequence", hidden])],
        [info("y", 1, ["batch", "sequence", hidden])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid(*o) for o in (("", 20), ("com.microsoft", 1))]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = ort.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (given,) = session.run(None, {"x": x})
    a = x @ w1.T + b1
    exact = 0.5 * a * (1 + np.vectorize(math.erf)(a / math.sqrt(2)))
    a = np.maximum(a, 0) if activation == "relu" else exact
    due = np.zeros_like(x)
    for place in np.ndindex(3, 5):
        best = np.argsort(-(x[place] @ router + shift))[:active]
        on = np.isin(np.arange(width) // (width // experts), best)
        due[place] = experts / active * (w2[:, on] @ a[place][on])
    error = np.linalg.norm(given - due) / np.linalg.norm(due)
    assert error < (1e-5 if activation == "relu" else 2e-3)


def answers(module: Any, graph: Path, names: list[str], vocabulary: int) -> float:
    """How well a graph agrees with PyTorch, dB, over padded batches."""
    session = OnnxSession(graph, "CPUExecutionProvider")
    due, given = [], []
    for batch, sequence in ((1, 3), (2, 29), (5, 8)):
        feeds = random_inputs(names, batch, sequence, vocabulary)
        with torch.no_grad():
            wanted = module(*(torch.from_numpy(feeds[n]) for n in names)).numpy()
        (found,) = session.run(feeds).values()
        mask = feeds["attention_mask"][..., None]
        real = mask if wanted.shape[:2] == (batch, sequence) else 1
        due.append((wanted * real).ravel())
        given.append((found * real).ravel())
    return snr_db(np.concatenate(due), np.concatenate(given))


@pytest.mark.parametrize("kind", ["ner", "scorer"])
def test_torch_graph_and_operator_agree(
    kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    loaded = routed(str(tiny(kind)), tmp_path / "ckpt", steps=2)
    source = tmp_path / "float" / "model.onnx"
    source.parent.mkdir()
    names = [tensor.name for tensor in export_graph(loaded, source, 20).inputs]
    graph = write_experts(loaded, source, tmp_path / "routed.onnx")
    assert graph.operators["MoE"] == 2
    assert "Gelu" not in graph.operators
    vocabulary = int(loaded.model.config.vocab_size)
    found = answers(wrap(loaded), tmp_path / "routed.onnx", names, vocabulary)
    assert found > TOLERANCE_DB
    assert answers(wrap(loaded), source, names, vocabulary) < found - 10
    of = [w for w in audit(onnx.load(tmp_path / "routed.onnx")) if w.kind == "product"]
    before = [w for w in audit(onnx.load(source)) if w.kind == "product"]
    assert sum(w.weights for w in of if "MoE" not in w.node) > 0
    extra = 2 * 32 * 4  # the routers
    assert sum(w.weights for w in of) == sum(w.weights for w in before) + extra


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "relu"])
def test_with_the_operators_own_activation_they_agree_closely(
    act: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = BertModel(tiny_config(hidden_act=act, initializer_range=0.2))
    folder = save_tiny(tmp_path / "tiny", model)
    loaded = routed(str(folder), tmp_path / "ckpt", split="permuted")
    source = tmp_path / "model.onnx"
    names = [tensor.name for tensor in export_graph(loaded, source, 20).inputs]
    write_experts(loaded, source, tmp_path / "routed.onnx")
    assert answers(wrap(loaded), tmp_path / "routed.onnx", names, 65) > 80
    assert answers(wrap(loaded), source, names, 65) < 30  # it is not the dense one


def test_with_all_experts_active_the_graph_is_the_dense_model(
    tiny: Callable[[str], Path], checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    loaded = with_active(checkpoint, 4)
    graph = write_experts(loaded, source, tmp_path / "routed.onnx")
    names = [tensor.name for tensor in graph.inputs]
    dense = wrap(load_model(str(tiny("embedding"))))
    assert answers(dense, tmp_path / "routed.onnx", names, 65) > 50


@pytest.mark.parametrize("active", [1, 3])
def test_the_static_rival_has_as_many_neurons_as_are_active(
    active: int, checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    loaded, narrow = with_active(checkpoint, active), tmp_path / "narrow.onnx"
    write_narrow(loaded, source, narrow)
    wide, few = (
        {w.layer: w.weights for w in audit(onnx.load(p))} for p in (source, narrow)
    )
    for name, weights in wide.items():
        of_network = name.endswith(("intermediate.dense", "layer.1.output.dense"))
        of_network |= name.endswith("layer.0.output.dense")
        cut = active / 4 if of_network and "attention" not in name else 1
        assert few[name] == weights * cut, name
    times = in_turns({"static": narrow, "dense": source}, loaded)
    assert set(times) == {"static", "dense"}
    assert list(times["dense"]) == [16, 32]  # what the model takes of LENGTHS
    assert LENGTHS == (16, 64, 256)
    assert all(ms > 0 for found in times.values() for ms in found.values())


@pytest.mark.parametrize(
    ("times", "errors", "due"),
    [
        (FAST, (0.1, 0.1), ""),
        (FAST, (0.1, 0.2), ""),
        (FAST, (0.3, 0.2), "it is further from the dense one"),
        (SLOW, (0.1, 0.2), "it is not faster than a static one"),
        ({**FAST, "routed": FAST["static"]}, (0.1, 0.2), "it is not faster"),
        (SLOW, (0.3, 0.2), "active width and is further from the dense one"),
        (FAST, (math.nan, 0.2), "it is further"),
    ],
)
def test_a_routed_graph_is_kept_where_it_is_faster_and_no_worse(
    times: Any, errors: tuple[float, float], due: str
) -> None:
    why = refusal(times, dict(zip(("routed", "static"), errors, strict=True)))
    assert bool(why) == bool(due)
    assert due in why
    if times is SLOW:
        assert "32 tokens: 2.75 ms routed, 2.5 ms static, 5 ms dense" in why
        assert f"{100 * errors[0]:.3g} % routed, 20 % static" in why


def test_a_bundle_that_is_kept_says_by_how_much(
    checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    loaded = load_model(str(checkpoint))
    assert loaded.routing is not None
    close = replace(loaded.routing, errors={"routed": 0.01, "static": 0.02})
    bundle = export(
        replace(loaded, routing=close),
        "cpu",
        tmp_path / "b",
        float_graph=source,
        timing=lambda *_: FAST,
    )
    assert bundle.manifest.precision == "fp32"
    assert bundle.manifest.graph.operators["MoE"] == 2
    assert bundle.manifest.golden.min_snr_db == TOLERANCE_DB
    kept = open_bundle(tmp_path / "b").manifest.provenance["precision"]["routing"]
    assert kept["p50_ms"]["static"] == {"16": 1.5, "32": 2.5}
    assert kept["errors"] == {"routed": 0.01, "static": 0.02}
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output


def test_a_routed_model_that_is_worse_is_refused_with_the_numbers(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Its routers are random, so that it is further from the dense model, however fast."""
    args = ["export", str(checkpoint), "--target", "cpu", "-o", str(tmp_path / "b")]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 3
    about = json.loads((checkpoint / "edgelm.json").read_text())["routing"]["errors"]
    assert "further from the dense one" in done.output
    assert "p50 of 16 tokens: " in done.output
    assert f"{100 * about['routed']:.3g} % routed" in done.output
    assert f"{100 * about['static']:.3g} % static" in done.output
    assert "edgelm compress MODEL -o CKPT --ffn-keep 0.5" in done.output
    assert list(tmp_path.iterdir()) == []


def test_other_targets_and_precisions_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    loaded = load_model(str(checkpoint))
    for target, precision in (
        ("cpu", "int8"),
        ("cpu-openvino", "fp32"),
        ("nvidia-gpu", "fp32"),
        ("jetson-orin-nano", "auto"),
    ):
        with pytest.raises(TargetError, match="are exported in fp32 and for ONNX Runt"):
            export(loaded, target, tmp_path / "b", precision=precision)
    with pytest.raises(TargetError, match="cpu-openvino in fp32 was asked for"):
        export_fastest(loaded, ("cpu", "cpu-openvino"), tmp_path / "b")


def test_a_network_that_the_operator_has_not_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertModel(tiny_config(hidden_act="silu"))
    folder = save_tiny(tmp_path / "silu", model)
    loaded = routed(str(folder), tmp_path / "ckpt")
    with pytest.raises(ExportError, match=r"encoder\.layer\.0 is not a layer, GELU or"):
        export(loaded, "cpu", tmp_path / "b")


@pytest.mark.slow
def test_torch_and_operator_agree_on_minilm(tmp_path: Path) -> None:
    loaded = routed("minilm", tmp_path / "ckpt", experts=8, active=4, steps=2)
    source = tmp_path / "model.onnx"
    names = [tensor.name for tensor in export_graph(loaded, source, 20).inputs]
    write_experts(loaded, source, tmp_path / "routed.onnx")
    found = answers(wrap(loaded), tmp_path / "routed.onnx", names, 30000)
    assert found > TOLERANCE_DB
    for _, block in layers.blocks(loaded.model):
        block.get_submodule("intermediate").intermediate_act_fn = torch.nn.GELU("tanh")
    found = answers(wrap(loaded), tmp_path / "routed.onnx", names, 30000)
    assert found > 80
