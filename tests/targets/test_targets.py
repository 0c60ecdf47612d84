"""Targets: complete, sourced, refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edgelm.errors import TargetError
from edgelm.targets import FAMILIES, RIVALS, Target, list_targets, load_target
from edgelm.targets.board import releases

NAMES = list_targets()


def numbers(value: Any, path: str = "") -> list[str]:
    """Paths of all fields that hold a number, or name a version or capability."""
    if dataclasses.is_dataclass(value):
        found = []
        for field in dataclasses.fields(value):
            if field.name != "sources":
                inner = f"{path}.{field.name}" if path else field.name
                found += numbers(getattr(value, field.name), inner)
        return found
    facts = (
        "engine.tensorrt",
        "engine.jetpack",
        "gpu.compute_capability",
        "gpu.sparse_2_4",
        "gpu.formats",
        "board.modules",
        "power_modes",
    )
    counted = isinstance(value, (int, float)) or (
        isinstance(value, tuple) and value and isinstance(value[0], int)
    )
    return [path] if counted or (path in facts and value != ()) else []


def test_the_first_targets_are_there() -> None:
    assert {
        "cpu",
        "cpu-arm64",
        "cpu-openvino",
        "jetson-orin-nano",
        "jetson-orin-nano-4gb",
        "jetson-orin-nx",
        "jetson-orin-nx-8gb",
        "jetson-agx-orin",
        "jetson-agx-orin-32gb",
        "jetson-thor-t4000",
        "jetson-thor-t5000",
        "jetson-xavier-nx",
        "nvidia-gpu",
        "nvidia-gpu-sm80",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str) -> None:
    target = load_target(name)
    covered = {field for source in target.sources for field in source.fields}
    assert set(numbers(target)) <= covered
    assert covered <= set(numbers(target)), "a source names a field that is not there"
    assert all(
        source.what and len(source.checked_on) == 10 for source in target.sources
    )


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_coherent(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.default_precision in target.precisions
    assert (target.engine is not None) == (target.runtime == "tensorrt")
    if target.engine is not None:
        assert len(target.engine.batch) == 3
        assert list(target.engine.batch) == sorted(target.engine.batch)
        assert list(target.engine.sequence) == sorted(target.engine.sequence)
        assert target.gpu is not None
        if target.family == "jetson":
            pairs = zip(target.engine.jetpack, target.engine.tensorrt, strict=True)
            known = {r.jetpack: r for r in releases()}
            assert all(known[jp].tensorrt == trt for jp, trt in pairs)
            assert all(known[jp].runs for jp in target.engine.jetpack)
    if target.family == "jetson":
        assert target.memory is not None
        assert target.board is not None
        modes = target.power_modes
        assert len({m.id for m in modes}) == len({m.name for m in modes}) == len(modes)


def test_what_a_target_has_been_measured_with_says_so() -> None:
    """No number is claimed that nobody has a document for."""
    kinds = {s.confidence for name in NAMES for s in load_target(name).sources}
    assert kinds <= {"official", "measured", "community", "unverified", "choice"}
    orin = load_target("jetson-orin-nx-8gb")
    by_field = {f: s.confidence for s in orin.sources for f in s.fields}
    assert by_field["memory.bandwidth_gbs"] == "unverified"
    assert by_field["memory.total_mib"] == "official"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_stands_for_its_smallest_member(family: str) -> None:
    member = load_target(family)
    kin = [load_target(n) for n in NAMES if load_target(n).family == family]
    assert member in kin
    memories = [t.memory.total_mib for t in kin if t.memory]
    assert member.memory is not None
    assert member.memory.total_mib == min(memories)


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(
        TargetError, match=r"no target 'jetson-nono'\. Known targets: .*cpu.*jetson"
    ):
        load_target("jetson-nono")


def test_a_target_is_frozen() -> None:
    target: Any = load_target("cpu")
    assert isinstance(target, Target)
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.opset = 1


def test_rivals_are_targets_of_one_machine_and_no_target() -> None:
    for name, members in RIVALS.items():
        targets = [load_target(member) for member in members]
        assert len({(t.default_precision, t.opset, t.arch) for t in targets}) == 1
        with pytest.raises(TargetError, match="Name one of them"):
            load_target(name)
