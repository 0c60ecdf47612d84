"""The GPU benchmark, as far as a CPU can run it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks.sparse_products import sparse

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> click.Command:
    """The command; it finds its other file beside it, as a script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    command: click.Command = importlib.import_module("gpu").main
    return command


@pytest.mark.slow
def test_on_a_cpu_every_part_is_in_the_file(
    main: click.Command, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "cpu.json"
    options = "--device cpu --batches 1,3 --lengths 8,64 --tokens 4,32 --shapes 64x96"
    options += f" --rounds 2 --texts 24 --model {tiny('embedding')} -o {path}"
    done = CliRunner().invoke(main, options.split())
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text("utf-8"))
    assert found["about"]["torch"] == torch.__version__
    assert found["device"] == "cpu"

    same = found["compress"]
    assert (same["equal_mask"], same["db"]) == (1.0, 300.0)

    graphs = {row["precision"]: row for row in found["graphs"]}
    assert list(graphs) == ["fp32", "fp16", "bf16", "int8"]
    assert "no bf16 products for CPUs" in graphs["bf16"]["reason"]
    for name, least in (("fp32", 80.0), ("fp16", 40.0), ("int8", 12.0)):
        row = graphs[name]
        assert least < row["db"] <= 300
        assert row["least_cosine"] <= row["mean_cosine"] <= 1 + 1e-9
        assert set(row["ms"]) == {"1x8", "3x8", "1x64", "3x64"}
        assert row["ms"]["1x8"]["p50"] > 0
        assert row["ms"]["3x64"] == {"reason": "the model takes 32 tokens"}
        assert set(row["operators"]) == {"CPUExecutionProvider"}
    assert graphs["fp16"]["chosen"] == "CUDAExecutionProvider"
    assert graphs["fp32"]["ms"]["1x8"]["times_as_fast_as_fp32"] == 1.0

    rows = found["layers"]
    shapes = {(row["out"], row["in"]) for row in rows}
    assert shapes == {(32, 32), (64, 32), (32, 64), (64, 96)}
    assert len(rows) == len(shapes) * 3 * 2
    for row in rows:
        assert set(row["ms"]) == {"dense"}
        assert "CUDA" in row["reason"]
        assert row["db"]["dense"] > {"fp16": 60, "bf16": 40, "int8": 299}[row["format"]]
    assert "| bf16 | " in done.output
    assert "| 64x96 | int8 | 32 |" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_is_missing(
    main: click.Command, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    done = CliRunner().invoke(main, ["-o", str(path)])
    assert done.exit_code == 1
    assert done.output.startswith("Error: This needs an NVIDIA GPU")
    assert done.output.count("\n") == 1
    assert f"torch {torch.__version__}" in done.output
    assert "onnxruntime-gpu[cuda,cudnn]" in done.output
    assert not path.exists()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_sparse_products_are_those_of_the_same_weight_dense() -> None:
    weight = torch.randint(-9, 9, (64, 128)).reshape(64, 32, 4)
    weight[..., :2] = 0
    for form in (torch.float16, torch.int8):
        w = weight.reshape(64, 128).to("cuda", form)
        x = torch.randint(-9, 9, (32, 128)).to("cuda", form)
        due = x.double() @ w.double().t()
        assert torch.equal(sparse(w, x, 0)().double(), due)
