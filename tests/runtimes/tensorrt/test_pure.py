"""What needs no TensorRT: plans' headers, logs, inspectors, retries, the cache."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm import schema
from edgelm.bundle import file_digest
from edgelm.errors import SessionError
from edgelm.runtimes.tensorrt import cache
from edgelm.runtimes.tensorrt.cache import Key, Record, find, keep
from edgelm.runtimes.tensorrt.header import TAG, plan_version
from edgelm.runtimes.tensorrt.inspector import (
    check_precision,
    count_types,
    read_layers,
)
from edgelm.runtimes.tensorrt.ladder import (
    LEAST_WORKSPACE_MIB,
    Attempt,
    attempts,
)
from edgelm.runtimes.tensorrt.log import (
    Sparsity,
    ran_out_of_memory,
    read_sparsity,
)
from edgelm.runtimes.tensorrt.plan import Profile

RECORDED = Path(__file__).parents[2] / "data" / "tensorrt"


def plan_bytes(version: tuple[int, int, int, int] = (10, 3, 0, 30)) -> bytes:
    return struct.pack("<II16x4B", TAG, 0, *version) + b"code"


def test_the_version_stands_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(plan_bytes((11, 4, 1, 106)))
    assert path.read_bytes()[:4] == b"ftrt"
    assert plan_version(path) == "11.4.1.106"


@pytest.mark.parametrize(
    "data", [b"", plan_bytes()[:27], b"\x08\x07" + plan_bytes()[2:], struct.pack("<II20x", TAG, 1)]
)  # fmt: skip
def test_what_is_no_plan(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(SessionError, match="is no TensorRT plan"):
        plan_version(tmp_path / "p")


def test_sparse_layers_in_a_log() -> None:
    log = (RECORDED / "sparse.log").read_text(encoding="utf-8")
    assert read_sparsity(log) == Sparsity(
        ("node_linear_3", "node_linear_4", "node_linear_5"), ("node_linear_4",)
    )
    assert read_sparsity("[I] nothing of the kind") == Sparsity((), ())
    assert read_sparsity(log + log) == read_sparsity(log)
    assert not ran_out_of_memory(log)


@pytest.mark.parametrize(
    "line",
    [
        "[E] 1: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "[W] [TRT] Tactic Device request: 4286MB Available: 2878MB. ... insufficient memory on requested size",
        "[E] 2: [virtualMemoryBuffer.cpp::resizePhysical::140] Error Code 2: OutOfMemory",
        "[E] Error Code 10: Could not find any implementation for node {ForeignNode[...]}",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
def test_want_of_memory_in_a_log(line: str) -> None:
    assert ran_out_of_memory(line)


def test_the_precision_is_that_of_the_products() -> None:
    layers = read_layers((RECORDED / "layers-10.json").read_text(encoding="utf-8"))
    assert [layer.product for layer in layers] == [False, True]
    assert count_types(layers) == {"fp16": 1, "fp32": 1, "other": 1}
    check_precision(layers, "fp16")
    for wrong in ("fp32", "int8"):
        with pytest.raises(SessionError, match=f"The engine is not {wrong}: of 1 mat"):
            check_precision(layers, wrong)


@pytest.mark.parametrize("written", ["BFloat16", "Row major linear BF16", "BFP16"])
def test_bfloat16_is_not_taken_for_float16(written: str) -> None:
    tensor = f'[{{"Format/Datatype": "{written}"}}]'
    text = f'{{"Layers": [{{"Name": "m", "LayerType": "gemm", "Inputs": {tensor}}}]}}'
    layers = read_layers(text)
    check_precision(layers, "bf16")
    with pytest.raises(SessionError, match="not fp16"):
        check_precision(layers, "fp16")


def test_an_engine_that_silently_is_fp32_is_refused() -> None:
    layers = read_layers((RECORDED / "layers-8.json").read_text(encoding="utf-8"))
    check_precision(layers, "fp32")
    with pytest.raises(SessionError, match="not fp16"):
        check_precision(layers, "fp16")


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": ["a", "b"]}', '{"layers": []}'])
def test_an_inspector_that_does_not_tell(text: str) -> None:
    with pytest.raises(SessionError, match="engine inspector gives n"):
        read_layers(text)


def test_smaller_workspaces_come_before_lower_levels() -> None:
    assert list(attempts(1024, 2, 0)) == [
        Attempt(1024, 2),
        Attempt(512, 2),
        Attempt(256, 2),
        Attempt(128, 2),
        Attempt(128, 1),
        Attempt(128, 0),
    ]
    assert next(attempts(4096, 3, 3000)) == Attempt(1500, 3)


@given(st.integers(1, 100_000), st.integers(0, 5), st.integers(0, 100_000))
def test_the_ladder_only_goes_down_and_ends(size: int, level: int, free: int) -> None:
    steps = list(attempts(size, level, free))
    assert len(set(steps)) == len(steps) <= 20
    pairs = [(a.optimization_level, a.workspace_mib) for a in steps]
    assert pairs == sorted(pairs, reverse=True)
    assert steps[-1] == Attempt(LEAST_WORKSPACE_MIB, 0)
    assert all(a.workspace_mib <= max(size, LEAST_WORKSPACE_MIB) for a in steps)


KEY = Key(
    graph="ab" * 32,
    tensorrt="10.3.0",
    compute_capability="8.7",
    device="Orin",
    cuda="12.6",
    profiles=(Profile((1, 1), (8, 32), (32, 32)),),
    flags={"sparse": False},
)
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"graph": "cd" * 32}, "another graph"),
    ({"tensorrt": "10.16.2"}, "tensorrt 10.3.0; this is 10.16.2"),
    ({"compute_capability": "11.0"}, "compute capability 8.7; this is 11.0"),
    ({"device": "Thor"}, "device Orin; this is Thor"),
    ({"cuda": "13.2"}, "cuda 12.6; this is 13.2"),
    ({"profiles": (Profile((1, 1), (8, 64), (32, 64)),)}, "another profile"),
    ({"flags": {"sparse": True}}, "another flag"),
]


def record(plan: Path, key: Key = KEY) -> Record:
    return Record(
        1, key, file_digest(plan), 42.0, {"fp16": 3}, (), (), {"dense": 1.0}, 9.0
    )


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A cache with one engine."""
    plan = tmp_path / "built.plan"
    plan.write_bytes(plan_bytes())
    keep(plan, record(plan), "bundle", tmp_path / "engines")
    return tmp_path / "engines"


def test_what_was_kept_is_found(kept: Path) -> None:
    found = find(KEY, "bundle", kept)
    assert found.plan == kept / "bundle" / "engine.plan"
    assert found.record is not None
    assert found.record.key == KEY
    assert sorted(p.name for p in found.plan.parent.iterdir()) == ["engine.plan", "record.json"]  # fmt: skip
    assert find(KEY, "other", kept).why == "No engine has been built for this bundle."


@pytest.mark.parametrize(("change", "why"), OTHERS)
def test_a_foreign_engine_is_rebuilt_and_one_line_says_why(
    kept: Path, change: dict[str, Any], why: str
) -> None:
    other = replace(KEY, **change)
    assert other.digest != KEY.digest
    found = find(other, "bundle", kept)
    assert found.plan is None
    assert found.why == f"The engine was built for {why}."


def test_every_field_of_the_key_counts() -> None:
    assert {name for change, _ in OTHERS for name in change} == set(Key.__dataclass_fields__)  # fmt: skip
    text = json.dumps(schema.plain(KEY))
    assert schema.build(Key, json.loads(text), "key", SessionError) == KEY


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: (p / "engine.plan").write_bytes(plan_bytes() + b"!"), "changed since"),
        (lambda p: (p / "engine.plan").write_bytes(plan_bytes((10, 7, 0, 1))), "is of TensorRT 10.7.0.1"),
        (lambda p: (p / "engine.plan").write_bytes(b"x"), "no TensorRT plan"),
        (lambda p: (p / "engine.plan").unlink(), "No such file"),
        (lambda p: (p / "record.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "record.json").write_text("{}"), "lacks the key"),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_rebuilt(kept: Path, damage: Any, why: str) -> None:
    damage(kept / "bundle")
    found = find(KEY, "bundle", kept)
    assert found.plan is None
    assert why in found.why


def test_a_plan_replaced_together_with_its_digest_is_of_no_use(kept: Path) -> None:
    """Its key still names what it was built for."""
    plan = kept / "bundle" / "engine.plan"
    plan.write_bytes(plan_bytes((10, 16, 2, 10)))
    entry = kept / "bundle" / "record.json"
    about = json.loads(entry.read_text(encoding="utf-8"))
    about["plan_sha256"] = file_digest(plan)
    entry.write_text(json.dumps(about), encoding="utf-8")
    assert "is of TensorRT 10.16.2.10" in find(KEY, "bundle", kept).why


@pytest.mark.parametrize(
    ("plan", "installed", "same"),
    [
        ("10.3.0.30", "10.3.0", True),
        ("10.3.0.30", "10.3.0.26", False),
        ("10.16.2.10", "10.16.2.10", True),
        ("11.4.0.106", "10.3.0", False),
    ],
)
def test_versions(plan: str, installed: str, same: bool) -> None:
    assert cache.same_version(plan, installed) is same
