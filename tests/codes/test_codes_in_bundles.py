"""From `edgelm compress --codes` to codes on the device, by every way that leads there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result

import edgelm
from edgelm import samples
from edgelm.bundle import CODES, MANIFEST, open_bundle
from edgelm.cli import cli
from edgelm.codes import BinaryCodes
from edgelm.errors import BundleError, ConfigError, InputError
from edgelm.recipe import parse_recipe, to_plain, to_toml
from edgelm.runtimes.codes import asymmetric_scores, load_coder, save_coder
from tests.runtimes.test_codes import random_coder

TEXTS = [
    f"{a} {b} {c}"
    for a in ("the man", "a woman", "anna", "peter")
    for b in ("plays", "reads", "writes", "sings in")
    for c in ("a book", "the garden of paris", "london", "a new flute")
]


def call(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def done(*args: object) -> Result:
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def coded(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]
) -> Path:
    """A folder with a checkpoint ``ck`` of tiny codes, and its ``bundle``."""
    root = tmp_path_factory.mktemp("coded")
    (root / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    source = ("--calibration", root / "texts.txt")
    done("compress", tiny("embedding"), "-o", root / "ck", "--codes", 64, *source)
    export = ("export", root / "ck", "--target", "cpu", "--precision", "fp32")
    done(*export, "-o", root / "bundle", "--codes-output")
    return root


def test_a_checkpoint_says_what_its_codes_are(coded: Path) -> None:
    about = json.loads((coded / "ck" / "edgelm.json").read_text(encoding="utf-8"))
    coder = load_coder(coded / "ck" / CODES)
    assert (coder.bits, coder.dimension) == (64, 32)
    assert about["codes"]["digest"] == coder.digest
    assert about["codes"]["kind"] == "autoencoder"
    judged = about["codes"]["held_out"]
    assert judged["queries"] == len(TEXTS[::8])
    assert 0.3 < judged["asymmetric"] <= judged["rescored"] <= 1
    assert [step["method"] for step in about["steps"]] == ["codes"]
    page = (coded / "ck" / "report.html").read_text(encoding="utf-8")
    assert "Codes of 64 bits" in page
    assert "The weights are as they were" in page


def test_all_ways_to_codes_agree(coded: Path) -> None:
    embedder = edgelm.load(coded / "bundle")
    vectors = embedder.encode(TEXTS)
    coder = load_coder(coded / "ck" / CODES)
    assert embedder.coder is not None
    assert embedder.coder.digest == coder.digest
    codes = embedder.encode(TEXTS, output="codes")
    assert np.array_equal(codes, coder.encode(vectors))
    rows = embedder.encode(TEXTS, output="queries")
    assert np.array_equal(rows, coder.project(vectors))
    asked = embedder.encode(TEXTS, output="query-codes")
    assert np.array_equal(asked, coder.encode_queries(vectors))
    found = asymmetric_scores(rows, codes, coder.factors(vectors, codes))
    due = vectors @ vectors.T
    assert np.mean(found.argmax(axis=1) == due.argmax(axis=1)) > 0.8
    lines = done("run", coded / "bundle", TEXTS[0], "--output", "codes").stdout
    assert bytes.fromhex(json.loads(lines)["code"]) == codes[0].tobytes()
    assert embedder.encode([], output="codes").shape == (0, 8)
    assert embedder.encode([], output="queries").shape == (0, 64)


def test_the_graph_gives_the_codes_that_numpy_gives(coded: Path) -> None:
    bundle = open_bundle(coded / "bundle")
    assert bundle.manifest.codes is not None
    assert bundle.manifest.codes.output == "codes"
    tensor = bundle.manifest.graph.outputs[1]
    assert (tensor.name, tensor.dtype, tensor.shape) == ("codes", "uint8", ("batch", 8))
    graph = coded / "bundle" / "model.onnx"
    session = onnxruntime.InferenceSession(
        str(graph), providers=["CPUExecutionProvider"]
    )
    embedder = edgelm.load(bundle)
    encodings = embedder.engine.tokenize(TEXTS)
    feeds = embedder.engine._collate(encodings)
    vectors, codes = session.run(["sentence_embedding", "codes"], feeds)
    assert codes.dtype == np.uint8
    coder = embedder.coder
    assert coder is not None
    # Bits whose value is not within rounding of 0 are the same in every code.
    due = coder.encode(vectors)
    sure = _margin(coder, vectors) > 1e-5
    assert sure.mean() > 0.8
    assert np.array_equal(codes[sure], due[sure])
    assert done("verify", coded / "bundle").exit_code == 0


def _margin(coder: Any, vectors: Any) -> Any:
    """How far a code's values are from 0, at least, on the way that they take."""
    centred = (vectors - coder.mean).astype(np.float64)
    found = np.where(centred @ coder.encoder >= 0, 1.0, -1.0)
    least = np.abs(centred @ coder.encoder).min(axis=1)
    size = coder.bits // 8
    for _ in range(coder.sweeps):
        for first in range(0, coder.bits, size):
            group = slice(first, first + size)
            values = centred @ coder.decoder[:, group]
            values -= found @ coder.coupling[:, group]
            least = np.minimum(least, np.abs(values).min(axis=1))
            found[:, group] = np.where(values >= 0, 1.0, -1.0)
    return least


@pytest.mark.parametrize("sweeps", [0, 3])
@pytest.mark.parametrize("bits", [32, 40, 1024])
def test_a_graph_decides_values_of_zero_as_numpy_does(
    tmp_path: Path, bits: int, sweeps: int
) -> None:
    """A graph that gives what it is fed; small whole numbers, so that every sum is exact."""
    from edgelm.export import codes as export_codes
    from edgelm.runtimes.codes import Coder

    draw = np.random.default_rng(bits)
    arrays = [
        draw.integers(-1, 2, shape).astype(np.float32)
        for shape in ((12,), (12, bits), (12, bits))
    ]
    coder = Coder(*arrays, sweeps)
    helper, proto = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input_ids"], ["out"], to=proto.FLOAT)],
        "same",
        [helper.make_tensor_value_info("input_ids", proto.INT64, ["batch", 12])],
        [helper.make_tensor_value_info("out", proto.FLOAT, ["batch", 12])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.MonkeyPatch.context() as patch:
        # The check of the real exporter feeds token ids of another length.
        patch.setattr(export_codes, "_check", lambda *_: None)
        export_codes.add_codes(tmp_path / "model.onnx", coder, 100)
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    ids = draw.integers(-1, 2, (64, 12))
    _, codes = session.run(None, {"input_ids": ids})
    vectors = ids.astype(np.float32)
    assert (_margin(coder, vectors) == 0).mean() > 0.9
    assert np.array_equal(codes, coder.encode(vectors))
    assert session.run(None, {"input_ids": ids[:0]})[1].shape == (0, bits // 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "most"),
    # OpenVINO may compute what is not int8 in less than float32, as the CPU likes it.
    [("cpu", 1e-3), ("cpu-openvino", 1e-2)],
)
def test_codes_of_the_built_in_model_in_int8(
    tmp_path: Path, target: str, most: float
) -> None:
    done("compress", "minilm", "-o", tmp_path / "ck", "--codes", 256)
    done(
        "export", tmp_path / "ck", "--target", target, "-o", tmp_path / "b",
        "--precision", "int8", "--codes-output",
    )  # fmt: skip
    embedder = edgelm.load(tmp_path / "b")
    texts = samples.calibration()[:40]
    encodings = embedder.engine.tokenize(texts)
    found = embedder.engine.session.run(embedder.engine._collate(encodings))
    assert embedder.coder is not None
    due = np.unpackbits(embedder.coder.encode(found["sentence_embedding"]), axis=1)
    assert (due != np.unpackbits(found["codes"], axis=1)).mean() < most


def test_codes_are_not_passed_on_to_another_model(coded: Path, tmp_path: Path) -> None:
    done(
        "compress", coded / "ck", "-o", tmp_path / "next", "--sparsity", "2:4",
        "--calibration", coded / "texts.txt",
    )  # fmt: skip
    assert not (tmp_path / "next" / CODES).exists()
    about = json.loads((tmp_path / "next" / "edgelm.json").read_text(encoding="utf-8"))
    assert [step["method"] for step in about["steps"]] == ["sparsify"]


def test_codes_after_other_steps_are_of_what_these_leave(
    coded: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    done(
        "compress", tiny("embedding"), "-o", tmp_path / "ck", "--ffn-keep", "0.5",
        "--codes", 32, "--codes-kind", "itq", "--calibration", coded / "texts.txt",
    )  # fmt: skip
    coder = load_coder(tmp_path / "ck" / CODES)
    assert coder.bits == 32
    done("export", tmp_path / "ck", "--target", "cpu", "-o", tmp_path / "b")
    manifest = open_bundle(tmp_path / "b").manifest
    assert manifest.codes is not None
    assert (manifest.codes.kind, manifest.codes.output) == ("itq", None)
    assert [step["method"] for step in manifest.model.steps] == ["shrink", "codes"]


def test_few_texts_are_enough_but_judge_nothing(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("the man\na woman plays\n", encoding="utf-8")
    result = done(
        "compress", tiny("embedding"), "-o", tmp_path / "ck", "--codes", 32,
        "--calibration", tmp_path / "texts.txt", "--json",
    )  # fmt: skip
    (line,) = result.stdout.splitlines()
    assert "held_out" not in json.loads(line)["codes"]


def test_recipes_with_codes_come_back_whole() -> None:
    import tomllib

    data = {"steps": [{"method": "sparsify"}, {"method": "codes", "bits": 128}]}
    recipe = parse_recipe(data, "test")
    assert recipe.codes == BinaryCodes(bits=128)
    assert len(recipe.layer_steps) == 1
    assert parse_recipe(tomllib.loads(to_toml(recipe)), "test") == recipe
    assert to_plain(recipe)["steps"][1]["kind"] == "autoencoder"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["codes", "sparsify"], "make them the last step"),
        (["codes", "codes"], "only once"),
    ],
)
def test_codes_are_the_last_step(steps: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe({"steps": [{"method": step} for step in steps]}, "test")


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["--codes", "100"], "multiple of 8 from 32 to 1024. Got 100", 1),
        (["--codes", "2048"], "multiple of 8 from 32 to 1024. Got 2048", 1),
        (["--codes", "64", "--codes-kind", "sign"], "at most 32 here; 64", 1),
        (["--codes-kind", "itq"], "--codes-kind goes with --codes", 2),
        (["--codes", "64", "--codes-kind", "best"], "Invalid value", 2),
    ],
)
def test_codes_that_cannot_be_are_refused(
    coded: Path, tmp_path: Path, args: list[str], message: str, code: int
) -> None:
    result = call(
        "compress", coded / "ck", "-o", tmp_path / "ck", *args,
        "--calibration", coded / "texts.txt",
    )  # fmt: skip
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "ck").exists()


def test_models_without_embeddings_have_no_codes(
    tiny_ner: Path, coded: Path, tmp_path: Path
) -> None:
    result = call(
        "compress", tiny_ner, "-o", tmp_path / "ck", "--codes", 32,
        "--calibration", coded / "texts.txt",
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is for the task ner" in result.stderr
    result = call("run", coded / "ck", "a text", "--output", "codes")
    assert result.exit_code == 1  # a checkpoint is no bundle


def test_bundles_without_codes_say_how_to_get_them(
    tiny_bundle: Path, tiny_embedding: Path, tmp_path: Path
) -> None:
    embedder = edgelm.load(tiny_bundle)
    assert embedder.coder is None
    with pytest.raises(InputError, match="edgelm compress MODEL -o CKPT --codes 256"):
        embedder.encode(["the man"], output="codes")
    with pytest.raises(InputError, match="must be one of vectors, int8"):
        embedder.encode(["the man"], output="bits")  # type: ignore[call-overload]
    result = call(
        "export", tiny_embedding, "--target", "cpu", "-o", tmp_path / "b", "--codes-output"
    )  # fmt: skip
    assert result.exit_code == 1
    assert "has no codes that its graph could give" in " ".join(result.stderr.split())
    assert not (tmp_path / "b").exists()


def test_a_coder_of_other_embeddings_is_refused(coded: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(coded / "ck", tmp_path / "ck")
    save_coder(random_coder(31, 64), checkpoint / CODES)
    result = call("export", checkpoint, "--target", "cpu", "-o", tmp_path / "b")
    assert result.exit_code == 1
    assert "embeddings of 31 dimensions; the model's have 32" in " ".join(
        result.stderr.split()
    )


def test_an_exchanged_coder_is_noticed(coded: Path, tmp_path: Path) -> None:
    from edgelm.bundle import seal

    bundle = shutil.copytree(coded / "bundle", tmp_path / "b")
    save_coder(random_coder(32, 64), bundle / CODES)
    with pytest.raises(BundleError, match=r"bytes instead of|SHA-256"):
        edgelm.load(bundle)
    seal(bundle, open_bundle(coded / "bundle").manifest)  # a careful forger's digests
    assert (bundle / MANIFEST).is_file()
    with pytest.raises(BundleError, match="not the one that its manifest describes"):
        edgelm.load(bundle)
