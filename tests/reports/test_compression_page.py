"""The page of a compression and the sizes on it, of a checkpoint that was really made."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import zstandard
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from edgelm.cli import cli
from edgelm.compress.sizes import sizes
from edgelm.reports.charts import lines
from edgelm.reports.compression import compression_page


@pytest.fixture
def checkpoint(tiny_embedding: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ck"
    flags = ["--sparsity", "2:4", "--refine", "dsnot", "--repair", "bias"]
    result = CliRunner().invoke(
        cli, ["compress", str(tiny_embedding), "-o", str(folder), *flags]
    )
    assert result.exit_code == 0, result.output
    assert "report.html" in result.stderr
    return folder


def test_the_page_shows_every_layer_and_needs_no_network(checkpoint: Path) -> None:
    about = json.loads((checkpoint / "edgelm.json").read_text(encoding="utf-8"))
    page = (checkpoint / "report.html").read_text(encoding="utf-8")
    assert page == compression_page(about)
    assert "http" not in page
    for row in about["report"]:
        assert row["layer"] in page
        assert f"<td>{100 * row['error']:.2f}</td>" in page
    assert f"{about['cost']['tokens']} tokens" in page
    for svg in re.findall("<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
    # One plot for each kind of layer, with a point a block.
    kinds = {row["layer"].split(".", 3)[3] for row in about["report"]}
    assert page.count("<svg") == len(kinds)


def test_the_sizes_are_those_of_the_weights_on_disk(checkpoint: Path) -> None:
    about = json.loads((checkpoint / "edgelm.json").read_text(encoding="utf-8"))
    weights = load_file(checkpoint / "model.safetensors")
    for row in about["report"]:
        weight = weights[row["layer"] + ".weight"].numpy()
        assert row["bytes"]["dense"] == weight.nbytes
        packed = np.packbits(weight != 0).nbytes + weight[weight != 0].nbytes
        assert row["bytes"]["bitmask"] == packed


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    zeros=st.integers(0, 81),
)
def test_sizes_of_odd_shapes(shape: tuple[int, int], dtype: Any, zeros: int) -> None:
    weight = torch.ones(shape)
    weight.view(-1)[:zeros] = 0
    weight = weight.to(dtype)
    found = sizes(weight)
    left = int((weight != 0).sum())
    assert found["dense"] == weight.numel() * weight.element_size()
    assert found["bitmask"] == (weight.numel() + 7) // 8 + left * weight.element_size()
    assert 0 < found["zstd"] <= found["dense"] + 32


def test_zstd_is_what_zstd_gives() -> None:
    weight = torch.zeros(64, 64)
    weight[::7] = torch.randn(10, 64)
    packed = zstandard.ZstdCompressor().compress(weight.numpy().tobytes())
    assert sizes(weight)["zstd"] == len(packed)
    back = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed)).read()
    assert back == weight.numpy().tobytes()


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1.0, 0.5, 2.0]])
def test_a_plot_of_any_number_of_blocks_is_whole(values: list[float]) -> None:
    svg = ElementTree.fromstring(lines("a & b", [("final <1>", values), ("x", values)]))
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode")
    shown = [e for e in svg.iter() if e.tag.endswith("polyline")]
    assert [len(e.attrib["points"].split()) for e in shown] == [len(values)] * 2
