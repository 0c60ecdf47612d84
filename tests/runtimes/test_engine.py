"""The engine: batches, order, tokens, providers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.bundle import open_bundle
from edgelm.errors import GateError, InputError, SessionError
from edgelm.golden import load_golden
from edgelm.runtimes.engine import batches, check_onnxruntime, open_engine
from edgelm.runtimes.session import OnnxSession, saturates
from edgelm.runtimes.verification import measure_snr, verify
from tests.conftest import export_bundle

Bundles = Callable[..., Path]
TEXTS = [
    "the man plays",
    "",
    "a river in paris, the old city of anna and peter",
    "book " * 100,
    "flute",
]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 200))
def test_batches_hold_each_input_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    made = list(batches(lengths, budget))
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    for batch in made:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    for one, two in itertools.pairwise(made):  # none could have taken one more
        assert (len(one) + 1) * max(lengths[i] for i in one) > budget
        assert min(lengths[i] for i in one) >= max(lengths[i] for i in two)


@pytest.mark.parametrize("kind", ["embedding", "ner", "scorer"])
def test_results_come_in_order_and_do_not_depend_on_neighbours(
    bundles: Bundles, kind: str
) -> None:
    engine = open_engine(open_bundle(bundles(kind)))
    together = engine.run(engine.tokenize(TEXTS))
    for text, row in zip(TEXTS, together, strict=True):
        (alone,) = engine.run(engine.tokenize([text]))
        assert alone.shape == row.shape
        np.testing.assert_allclose(row, alone, atol=1e-5)


def test_no_text_gives_no_row(bundles: Bundles) -> None:
    model = edgelm.load(bundles("embedding"))
    assert isinstance(model, edgelm.Embedder)
    assert model.encode([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one string", r"write \[text\] instead"),
        (["fine", 3], r"Text 1 must be a string.* Got int"),
        ([None], r"Text 0 must be a string.* Got NoneType"),
        (b"bytes", r"Texts must be a list of strings. Got bytes"),
        (["fine", "a\udcff"], r"Text 1 holds half of a surrogate pair at position 1"),
        (7, "Got int instead"),
        ([b"bytes"], "Got bytes"),
    ],
)
def test_what_is_no_list_of_strings_is_refused(
    bundles: Bundles, texts: Any, message: str
) -> None:
    for kind in ("embedding", "ner"):
        model: Any = edgelm.load(bundles(kind))
        with pytest.raises(InputError, match=message):
            (model.encode if kind == "embedding" else model.extract)(texts)


def test_a_provider_that_is_not_there_is_refused(bundles: Bundles) -> None:
    with pytest.raises(
        SessionError,
        match=r"has no CUDAExecutionProvider here\. It has: .*CPUExecutionProvider",
    ):
        edgelm.load(bundles("embedding"), provider="CUDAExecutionProvider")


def test_a_provider_lost_silently_is_an_error(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime falls back to the CPU with a log line at most."""
    real = onnxruntime.InferenceSession

    def falls_back(path: str, options: Any, providers: list[Any], **rest: Any) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    with pytest.raises(
        SessionError,
        match="fell back from CUDAExecutionProvider to CPUExecutionProvider",
    ):
        OnnxSession(bundles("embedding") / "model.onnx", "CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("exact", "due"),
    [
        (True, ("CUDAExecutionProvider", {"use_tf32": "0"})),
        (False, "CUDAExecutionProvider"),
    ],
)
def test_cuda_is_asked_for_float32_and_its_libraries_are_looked_for(
    bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exact: bool,
    due: Any,
) -> None:
    """TF32 would miss the 80 dB of a float32 bundle; what ONNX Runtime prints is no result."""
    real, asked = onnxruntime.InferenceSession, []

    def falls_back(path: str, options: Any, providers: list[Any], **rest: Any) -> Any:
        asked.extend(providers)
        return real(path, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9")
    )
    graph = bundles("embedding") / "model.onnx"
    with pytest.raises(SessionError, match=r"It said: Failed to load libcudnn\.so\.9"):
        OnnxSession(graph, "CUDAExecutionProvider", exact=exact)
    assert asked == [due]
    assert capsys.readouterr().out == ""


def test_a_float32_bundle_for_a_gpu_is_opened_exactly(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its target's provider is taken unasked, and never left for the CPU by a call that fails."""
    path = export_bundle(str(tiny("embedding")), tmp_path / "b", target="nvidia-gpu")
    real, asked = onnxruntime.InferenceSession, []

    class Cuda(real):  # type: ignore[misc, valid-type]
        def __init__(self, path: str, options: Any, providers: Any, **rest: Any):
            asked.extend(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"], **rest)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Cuda)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    session = open_engine(open_bundle(path)).session
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"})]
    assert isinstance(session, OnnxSession)
    assert session.batch_tokens > OnnxSession.batch_tokens
    assert session._session._enable_fallback is False


def test_a_jetson_bundle_says_where_it_runs(tiny: Any, tmp_path: Path) -> None:
    path = export_bundle(str(tiny("embedding")), tmp_path / "b", target="jetson")
    with pytest.raises(
        SessionError,
        match=r"engine is built on the device.*--provider CPUExecutionProvider",
    ):
        edgelm.load(path)
    model = edgelm.load(path, provider="CPUExecutionProvider")
    assert isinstance(model, edgelm.Embedder)
    assert model.encode(["the man"]).shape == (1, 32)


def test_threads_are_taken(bundles: Bundles) -> None:
    one, all_of_them = (edgelm.load(bundles("embedding"), threads=n) for n in (1, None))
    assert isinstance(one, edgelm.Embedder)
    assert isinstance(all_of_them, edgelm.Embedder)
    np.testing.assert_allclose(one.encode(TEXTS), all_of_them.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("kind", ["embedding", "ner", "scorer"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_verify_replays_the_golden_examples(
    bundles: Bundles, kind: str, precision: str
) -> None:
    bundle = open_bundle(bundles(kind, precision))
    result = verify(open_engine(bundle), load_golden(bundle))
    assert result.examples == bundle.manifest.golden.count
    assert result.snr_db >= result.min_snr_db
    assert result.snr_db == pytest.approx(
        min(300, bundle.manifest.golden.measured_snr_db), abs=1
    )


def test_verify_sees_a_wrong_graph_a_wrong_tokenizer_and_nan(bundles: Bundles) -> None:
    bundle = open_bundle(bundles("embedding"))
    engine = open_engine(bundle)
    golden = load_golden(bundle)
    other = [
        type(g)(g.text, g.pair, g.input_ids, g.output[::-1].copy()) for g in golden
    ]
    with pytest.raises(GateError, match="does not give what the original model gave"):
        verify(engine, other)
    other = [type(g)(g.text, g.pair, g.input_ids + 1, g.output) for g in golden]
    with pytest.raises(
        GateError, match="other tokens than the original for golden example 0"
    ):
        verify(engine, other)

    class Nan:
        provider = runtime = "test"
        batch_tokens = 512
        length_step = 1

        def run(self, feeds: Any) -> Any:
            return {
                "sentence_embedding": np.full(
                    (len(feeds["input_ids"]), 32), np.nan, np.float32
                )
            }

    engine.session = Nan()
    with pytest.raises(GateError, match="not finite"):
        measure_snr(engine, golden)


def test_a_table_of_4_bits_names_the_runtime_that_it_needs(bundles: Bundles) -> None:
    manifest = open_bundle(bundles("embedding")).manifest
    check_onnxruntime(manifest, "1.17.0")
    operators = {**manifest.graph.operators, "GatherBlockQuantized": 1}
    four = replace(manifest, graph=replace(manifest.graph, operators=operators))
    for version in ("1.23.0", "1.23.2", "1.32.0", "2.0"):
        check_onnxruntime(four, version)
    for version in ("1.9.0", "1.22.1"):
        with pytest.raises(
            SessionError, match=rf"from 1\.23 on; this is {version}\. U"
        ):
            check_onnxruntime(four, version)


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ("flags : fpu sse2 avx2 fma", True),
        ("flags : fpu sse2 avx512f avx512bw", True),
        ("flags : fpu sse2 avx2 avx_vnni", False),
        ("flags : fpu sse2 avx512f avx512_vnni", False),
        ("", False),
    ],
)
def test_only_an_x86_without_vnni_needs_slower_products(flags: str, due: bool) -> None:
    assert saturates(flags) == due


def test_a_folded_constant_of_several_products_opens_without_vnni(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeBERTa's relative positions: ONNX Runtime 1.32 cannot open it with products that do not saturate."""
    helper, make = onnx.helper, onnx.helper.make_tensor_value_info
    draw = np.random.default_rng(0)
    constants = {
        "c": draw.uniform(0.5, 1, (8, 256)).astype("f4"),
        "step": np.float32(1 / 127),
        "zero": np.int8(0),
        **{f"w{i}": np.full((256, 4), 127, np.int8) for i in range(2)},
        **{f"none{i}": np.int8(0) for i in range(2)},
    }
    scale = ["step", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["c", *scale], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *scale], ["d"]),
        helper.make_node("Add", ["y0", "y1"], ["y01"]),
        helper.make_node("Mul", ["y01", "x"], ["y"]),
    ]
    for i in range(2):
        weight = helper.make_node(
            "DequantizeLinear", [f"w{i}", "step", f"none{i}"], [f"v{i}"]
        )
        product = helper.make_node("MatMul", ["d", f"v{i}"], [f"y{i}"])
        nodes[2 + 2 * i : 2 + 2 * i] = [weight, product]
    graph = helper.make_graph(
        nodes,
        "g",
        [make("x", 1, [1])],
        [make("y", 1, [8, 4])],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(made, tmp_path / "g.onnx")
    monkeypatch.setattr("edgelm.runtimes.session._cpu_flags", lambda: "sse2 avx2")
    session = OnnxSession(tmp_path / "g.onnx", "CPUExecutionProvider")
    found = session.run({"x": np.ones(1, "f4")})["y"]
    due = 2 * constants["c"].sum(axis=1, keepdims=True) * np.ones((1, 4))
    np.testing.assert_allclose(found, due, rtol=0.01)
