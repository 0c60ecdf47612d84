"""What fits a device: refusals name the field, before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgelm.errors import TargetError
from edgelm.export.fitting import network
from edgelm.models import load_model
from edgelm.targets import list_targets, load_target
from edgelm.targets.fit import BASE_MIB, Network, check_fit

MINILM = Network(22_713_216, 11_920_896, 384, 1536, 12, 256)
LARGE = Network(335_000_000, 31_000_000, 1024, 4096, 16, 512)


def test_the_small_model_fits_every_device() -> None:
    for name in list_targets():
        target = load_target(name)
        for precision in target.precisions:
            fit = check_fit(target, MINILM, precision)
            assert fit.available_mib is None or fit.run_mib < fit.available_mib
            assert (fit.build_mib > fit.run_mib) == (target.engine is not None)


def test_the_numbers_are_those_of_the_weights() -> None:
    target = load_target("jetson-orin-nano")
    fp32, fp16, int8 = (check_fit(target, MINILM, p) for p in ("fp32", "fp16", "int8"))
    assert fp32.weights_mib == pytest.approx(22_713_216 * 4 / 2**20)
    assert fp16.weights_mib == pytest.approx(fp32.weights_mib / 2)
    products = 22_713_216 - 11_920_896
    assert int8.weights_mib == pytest.approx((products + 2 * 11_920_896) / 2**20)
    # hidden states, the inner layer and two tensors of scores, for 32 texts of 256 tokens
    token = 6 * 384 + 2 * 1536 + 2 * 12 * 256
    work = 4 * 32 * 256 * token / 2**20
    assert fp32.run_mib == pytest.approx(fp32.weights_mib + work + BASE_MIB)


def test_a_model_that_is_too_large_names_the_field() -> None:
    target = load_target("jetson-orin-nano-4gb")
    with pytest.raises(
        TargetError,
        match=r"4 GB is too small: to build the engine, about \d+ MiB .* memory\.total_mib, 4096, 3072 are free",
    ):
        check_fit(target, LARGE, "fp32")
    check_fit(load_target("jetson-agx-orin"), LARGE, "fp32")


def test_a_number_format_that_the_gpu_lacks_names_the_field() -> None:
    target = load_target("jetson-orin-nano")
    assert target.gpu is not None
    poor = replace(target, gpu=replace(target.gpu, formats=("fp32", "fp16")))
    with pytest.raises(TargetError, match=r"not compute in int8: its gpu\.formats"):
        check_fit(poor, MINILM, "int8")


def test_sparsity_that_will_not_help_is_said() -> None:
    assert check_fit(
        load_target("jetson-xavier-nx"), MINILM, "fp32", sparse_2_4=True
    ).notes == (
        "its gpu.sparse_2_4 is false: the 2:4 weights are smaller to store, not faster",
    )
    orin = load_target("jetson-orin-nano")
    (note,) = check_fit(orin, MINILM, "int8", sparse_2_4=True).notes
    assert "4694" in note
    assert check_fit(orin, MINILM, "fp16", sparse_2_4=True).notes == ()


def test_sizes_come_from_the_model(tiny: Any) -> None:
    loaded = load_model(str(tiny("embedding")))
    found = network(loaded)
    count = sum(p.numel() for p in loaded.model.parameters())
    rows = loaded.model.config.vocab_size + 32 + 2
    assert found == Network(count, rows * 32, 32, 64, 4, loaded.max_length)
