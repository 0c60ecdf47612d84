"""Export: graphs that stay dynamic, agree with torch, and are what they say."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import (
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from edgelm.bundle import open_bundle
from edgelm.embeddings import pool
from edgelm.errors import ExportError, GateError, OutputExistsError, TargetError
from edgelm.export import export
from edgelm.export import graph as graphs
from edgelm.export.audit import audit
from edgelm.export.graph import export_graph, random_inputs
from edgelm.export.int8_dynamic import quantize_dynamic
from edgelm.export.modules import wrap
from edgelm.export.plan import profiles
from edgelm.golden import load_golden
from edgelm.manifest import EmbeddingInfo
from edgelm.metrics import snr_db
from edgelm.models import load_model
from edgelm.runtimes.tensorrt.plan import Profile, read_plan
from tests.conftest import TINY, export_bundle, save_tiny, tiny_config

Bundles = Callable[..., Path]


def run(path: Path, feeds: dict[str, Any]) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = {tensor.name for tensor in session.get_inputs()}
    output: np.ndarray = session.run(
        None, {k: v for k, v in feeds.items() if k in wanted}
    )[0]
    return output


@pytest.mark.parametrize("kind", TINY)
def test_the_graph_agrees_with_torch_on_padded_batches(
    bundles: Bundles, tiny: Any, kind: str
) -> None:
    path = bundles(kind)
    module = wrap(load_model(str(tiny(kind))))
    names = [t.name for t in open_bundle(path).manifest.graph.inputs]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    for batch, sequence in ((1, 1), (1, 32), (4, 9), (7, 21)):
        feeds = random_inputs(names, batch, sequence, 60)
        feeds["token_type_ids"][:, sequence // 2 :] = 1
        with torch.no_grad():
            due = module(*(torch.from_numpy(feeds[name]) for name in names)).numpy()
        found = run(path / "model.onnx", feeds)
        real = feeds["attention_mask"][..., None] if kind == "ner" else 1
        np.testing.assert_allclose(found * real, due * real, atol=1e-5)


@pytest.mark.parametrize("kind", TINY)
def test_padding_does_not_change_a_text(bundles: Bundles, kind: str) -> None:
    """The trap: a graph exported with an all-ones mask ignores the mask."""
    path = bundles(kind) / "model.onnx"
    short = random_inputs(["input_ids", "attention_mask", "token_type_ids"], 1, 6, 60)
    padded = {k: np.pad(v, ((0, 0), (0, 11))) for k, v in short.items()}
    padded["input_ids"][:, 6:] = 17
    alone, beside = run(path, short), run(path, padded)
    np.testing.assert_allclose(
        alone, beside[:, :6] if kind == "ner" else beside, atol=1e-5
    )


def test_the_interface_is_what_the_format_says(bundles: Bundles) -> None:
    manifest = open_bundle(bundles("ner")).manifest
    assert [(t.name, t.dtype, t.shape) for t in manifest.graph.outputs] == [
        ("logits", "float32", ("batch", "sequence", 5))
    ]
    assert all(
        t.shape == ("batch", "sequence") and t.dtype == "int64"
        for t in manifest.graph.inputs
    )
    proto = onnx.load(bundles("ner") / "model.onnx")
    assert manifest.graph.opset == 20
    assert {o.domain for o in proto.opset_import} <= {"", "ai.onnx"}
    assert manifest.graph.operators == dict(
        Counter(node.op_type for node in proto.graph.node)
    )


def test_a_model_without_segments_has_no_such_input(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=70,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=34,
        type_vocab_size=1,
        pad_token_id=0,
    )
    folder = save_tiny(tmp_path / "m", RobertaModel(config))
    path = export_bundle(str(folder), tmp_path / "b", precision="fp32")
    manifest = open_bundle(path).manifest
    assert [t.name for t in manifest.graph.inputs] == ["input_ids", "attention_mask"]
    assert manifest.tokenizer.max_length == 32


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_is_that_of_sentence_transformers(
    pooling: str, normalize: bool
) -> None:
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    hidden = torch.randn(3, 6, 8)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    mode = {"last": "lasttoken"}.get(pooling, pooling)
    due = Pooling(8, pooling_mode=mode)(
        {"token_embeddings": hidden.clone(), "attention_mask": mask}
    )
    if normalize:
        due = Normalize()(due)
    found = pool(hidden, mask, EmbeddingInfo(8, pooling, normalize))
    torch.testing.assert_close(found, due["sentence_embedding"])


def test_int8_has_every_weighted_product_in_int8(bundles: Bundles) -> None:
    bundle = open_bundle(bundles("embedding", "int8"))
    proto = onnx.load(bundle.file("model.onnx"))
    counts = bundle.manifest.graph.operators
    assert bundle.manifest.precision == "int8"
    assert counts["MatMulInteger"] == 12
    assert counts["MatMul"] == 4  # attention: two products of activations a layer
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "MatMulInteger":
            assert weights[node.input[1]].dtype == np.int8
            assert not weights[node.input[3]].any(), "weights are symmetric"
    assert max(w.nbytes for w in weights.values() if w.dtype == np.float32) < 2000
    assert bundle.manifest.golden.measured_snr_db > 20


def test_int8_weights_are_scaled_per_channel(tmp_path: Path, tiny: Any) -> None:
    """A layer with one large channel would lose the others to a common scale."""
    loaded = load_model(str(tiny("embedding")))
    with torch.no_grad():
        loaded.model.encoder.layer[0].output.dense.weight[0] *= 1000
        loaded.model.encoder.layer[0].output.dense.weight[0] += 50
    export_graph(loaded, tmp_path / "f.onnx", 20)
    quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q.onnx")
    weights = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "q.onnx").graph.initializer
    }
    quantized = [
        w for w in weights.values() if w.dtype == np.int8 and w.shape == (64, 32)
    ]
    assert len(quantized) == 2
    assert all((np.abs(w).max(axis=0) >= 126).all() for w in quantized)


def test_a_graph_that_lost_its_mask_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check is on numbers, so it also sees what the exporter does in the future."""
    loaded = load_model(str(tiny("embedding")))
    real = torch.onnx.export

    def without_mask(module: Any, inputs: Any, **options: Any) -> Any:
        class Blind(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = module

            def forward(
                self, input_ids: Any, attention_mask: Any, token_type_ids: Any
            ) -> Any:
                ones = torch.ones_like(attention_mask) + 0 * attention_mask
                return self.inner(input_ids, ones, token_type_ids)

        return real(Blind(), inputs, **options)

    monkeypatch.setattr(torch.onnx, "export", without_mask)
    with pytest.raises(ExportError, match="does not compute what torch does"):
        export_graph(loaded, tmp_path / "g.onnx", 20)


def test_a_fixed_batch_is_refused(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(tiny("embedding")))
    real = torch.onnx.export

    def fixed(module: Any, inputs: Any, **options: Any) -> Any:
        axes = tuple({1: axis[1]} for axis in options.pop("dynamic_shapes"))
        return real(module, inputs, dynamic_shapes=axes, **options)

    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(ExportError, match=r"made input_ids .*\[3, 'sequence'\]"):
        export_graph(loaded, tmp_path / "g.onnx", 20)


def test_a_model_that_torch_cannot_export_is_one_sentence(
    tiny: Any, tmp_path: Path
) -> None:
    loaded = load_model(str(tiny("embedding")))

    class Broken(BertModel):
        def forward(
            self, input_ids: Any, attention_mask: Any, token_type_ids: Any
        ) -> Any:
            if input_ids.sum() > 3:
                return super().forward(input_ids, attention_mask, token_type_ids)
            raise ValueError

    loaded.model.__class__ = Broken
    with pytest.raises(ExportError, match=r"cannot export .*\(bert\)"):
        export_graph(loaded, tmp_path / "g.onnx", 20)


def test_large_weights_go_beside_the_graph(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "PROTOBUF_LIMIT", 1000)
    path = export_bundle(str(tiny("embedding")), tmp_path / "b", precision="fp32")
    bundle = open_bundle(path)
    assert "model.onnx.data" in bundle.manifest.files
    assert bundle.manifest.golden.measured_snr_db > 100


def test_jetson_carries_its_plan_and_facts(tiny: Any, tmp_path: Path) -> None:
    path = export_bundle(str(tiny("embedding")), tmp_path / "b", target="jetson")
    bundle = open_bundle(path)
    assert bundle.manifest.target == "jetson-orin-nano-4gb"
    plan = read_plan(bundle)
    assert plan.compute_capability == "8.7"
    assert not plan.sparse_2_4
    assert plan.profiles == (Profile((1, 1), (4, 32), (16, 32)),)
    assert bundle.manifest.provenance["fit"]["available_mib"] == 3072
    assert b"Jetson Orin Nano" in bundle.file("target.toml").read_bytes()


@pytest.mark.parametrize("longest", [1, 31, 32, 33, 128, 512, 8192])
def test_profiles_cover_every_length_once(longest: int) -> None:
    """No length is in two, none is left out, none is longer than the model takes."""
    made = profiles(longest, (32, 64, 128, 256, 512), (1, 8, 32))
    lengths = [n for p in made for n in range(p.min[1], p.max[1] + 1)]
    assert lengths == list(range(1, longest + 1))
    assert all(p.opt == (8, p.max[1]) for p in made)
    assert {p.max[1] for p in made[:-1]} <= {32, 64, 128, 256, 512}


def test_int8_for_tensorrt_has_no_rows_of_int8(tiny: Any, tmp_path: Path) -> None:
    """TensorRT reads int8 behind QuantizeLinear and DequantizeLinear only."""
    path = export_bundle(
        str(tiny("embedding")), tmp_path / "b", target="jetson", precision="int8"
    )
    found = audit(onnx.load(path / "model.onnx"))
    assert {w.precision for w in found if w.kind == "product"} == {"int8"}
    assert {w.precision for w in found if w.kind == "table"} == {"fp16", "fp32"}


def test_golden_examples_are_the_models_own_answers(
    bundles: Bundles, tiny: Any
) -> None:
    module = wrap(load_model(str(tiny("scorer"))))
    golden = load_golden(open_bundle(bundles("scorer")))
    assert all(g.pair is not None for g in golden)
    tokenizer = load_model(str(tiny("scorer"))).tokenizer
    for example in golden[:3]:
        tokens = tokenizer(
            example.text,
            example.pair,
            truncation=True,
            max_length=32,
            return_tensors="pt",
        )
        with torch.no_grad():
            due = module(**tokens)[0].numpy()
        np.testing.assert_allclose(example.output, due, atol=1e-6)


def test_too_little_agreement_leaves_no_bundle(tiny: Any, tmp_path: Path) -> None:
    loaded = load_model(str(tiny("embedding")))
    with pytest.raises(
        GateError,
        match=r"agrees .* only to .* dB; at least 70\.0 dB are due.*--min-snr-db",
    ):
        export(loaded, "cpu", tmp_path / "b", precision="int8", min_snr_db=70)
    assert list(tmp_path.iterdir()) == []


def test_the_tolerance_is_recorded(tiny: Any, tmp_path: Path) -> None:
    path = export_bundle(
        str(tiny("embedding")), tmp_path / "b", precision="int8", min_snr_db=3.5
    )
    assert open_bundle(path).manifest.golden.min_snr_db == 3.5


def test_a_precision_that_the_target_lacks(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(
        TargetError,
        match="nvidia-gpu has the precisions fp32, fp16; int8 was asked for",
    ):
        export(
            load_model(str(tiny("embedding"))),
            "nvidia-gpu",
            tmp_path / "b",
            precision="int8",
        )


def test_an_existing_output_is_left_alone(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputExistsError):
        export(load_model(str(tiny("embedding"))), "cpu", tmp_path / "b")


def test_a_language_model_has_no_bundle(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    folder = save_tiny(tmp_path / "lm", LlamaForCausalLM(config))
    with pytest.raises(ExportError, match="no bundles for the task lm yet"):
        export(load_model(str(folder)), "cpu", tmp_path / "b")


def test_a_killed_export_leaves_no_bundle(tiny: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from edgelm.export import export; from edgelm.models import load_model\n"
        "export(load_model(sys.argv[1]), 'cpu', Path(sys.argv[2]), precision='fp32',"
        " progress=lambda what: print(what, flush=True))"
    )
    command = [sys.executable, "-c", code, str(tiny("embedding")), str(tmp_path / "b")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "golden" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "b").exists()
    export_bundle(str(tiny("embedding")), tmp_path / "b")
    open_bundle(tmp_path / "b")


def test_export_accepts_a_half_precision_checkpoint(tiny: Any, tmp_path: Path) -> None:
    model = BertModel(tiny_config()).to(torch.bfloat16)
    path = export_bundle(
        str(save_tiny(tmp_path / "m", model)), tmp_path / "b", precision="fp32"
    )
    assert open_bundle(path).manifest.golden.measured_snr_db > 100


def test_snr_of_the_real_model(bundles: Bundles) -> None:
    fp32, int8 = (open_bundle(bundles("minilm", p)).manifest for p in ("fp32", "int8"))
    assert fp32.golden.measured_snr_db > 100
    assert 12 < int8.golden.measured_snr_db < 60
    assert int8.graph.operators["MatMulInteger"] == 36
    assert snr_db([1.0, 2.0], [1.0, 2.0]) == float("inf")
