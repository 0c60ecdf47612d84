"""Devices that edgelm exports for: one TOML file each, every number with its source."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from edgelm import schema
from edgelm.errors import TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "FAMILIES",
    "RIVALS",
    "BoardNames",
    "EngineBuild",
    "Gpu",
    "Memory",
    "PowerMode",
    "Source",
    "Target",
    "list_targets",
    "load_target",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "none"]
NumberFormat = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "fp4"]

# A family stands for the device at hand if that is a member, else for its most
# conservative member (`edgelm.targets.board`).
FAMILIES = {"jetson": "jetson-orin-nano-4gb"}
# Targets for the same machines: export measures them here, side by side, and keeps the fastest.
RIVALS = {"cpu-fastest": ("cpu", "cpu-openvino")}


@dataclass(frozen=True)
class BoardNames:
    """How a board names itself.

    Attributes:
        model: Part of the model in its device tree.
        modules: NVIDIA's numbers of the modules, as its device tree has them.
    """

    model: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class PowerMode:
    """A power mode: what bounds clocks and cores, so what every time depends on.

    Attributes:
        id: Its number for ``nvpmodel -m``; the same number is another mode on other boards.
        name: Its name.
    """

    id: int
    name: str


@dataclass(frozen=True)
class Memory:
    """Memory of a device.

    Attributes:
        total_mib: All of it; on a Jetson the CPU and the GPU share it.
        bandwidth_gbs: Peak bandwidth in the default power mode, GB/s.
    """

    total_mib: int
    bandwidth_gbs: float | None = None


@dataclass(frozen=True)
class Gpu:
    """GPU of a device.

    Attributes:
        compute_capability: As CUDA names it, for example ``"8.7"``.
        sparse_2_4: Whether its tensor cores have 2:4 sparse kernels.
        dla_cores: Deep-learning accelerators beside the GPU.
        multiprocessors: Streaming multiprocessors, where the source states them.
        formats: Number formats that it computes in.
    """

    compute_capability: str
    sparse_2_4: bool
    formats: tuple[NumberFormat, ...]
    dla_cores: int | None = None
    multiprocessors: int | None = None


@dataclass(frozen=True)
class EngineBuild:
    """How an engine is built on a device.

    Attributes:
        tensorrt: TensorRT versions that the device can have, oldest first.
        jetpack: JetPack versions, in the same order as ``tensorrt``; none for what is
            no Jetson.
        workspace_mib: Memory that the builder may use for tactics.
        optimization_level: TensorRT's builder optimisation level, 0 to 5.
        reserved_mib: Memory that the system and other programs keep.
        batch: Batch sizes (smallest, usual, largest) of every profile.
        sequence: Sequence lengths; one profile each, from 1 up to the length.
    """

    tensorrt: tuple[str, ...]
    jetpack: tuple[str, ...]
    workspace_mib: int
    optimization_level: int
    reserved_mib: int
    batch: tuple[int, ...]
    sequence: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where numbers of a target come from.

    Attributes:
        fields: The fields it covers, for example ``"memory.total_mib"``.
        what: The document or the command.
        checked_on: The day it was read, ISO 8601.
        confidence: ``official`` (the maker says so), ``measured`` (by this
            project), ``community`` (somebody else measured), ``unverified`` (from
            memory: no document was at hand), ``choice`` (a decision of this project,
            not a fact).
    """

    fields: tuple[str, ...]
    what: str
    checked_on: str
    confidence: Literal["official", "measured", "community", "unverified", "choice"]


@dataclass(frozen=True)
class Target:
    """A device, described; no behaviour.

    Attributes:
        name: The file's name without ``.toml``.
        title: For people.
        arch: Machine name as ``uname -m`` prints it, or ``any``.
        runtime: What runs the graph; ``none`` where edgelm has no runtime for the device.
        provider: Execution provider of ONNX Runtime, or the name of the other runtime.
        precisions: What may be exported for it.
        default_precision: What ``--precision auto`` means.
        opset: ONNX opset of the graph.
        sources: Where the numbers come from.
        memory: Memory, if the target is one device.
        gpu: GPU, if it has one.
        engine: How to build an engine, if the runtime needs one.
        family: Name of the family it belongs to.
        board: How it names itself, if it is a board.
        power_modes: Its power modes, where a source states them.
    """

    name: str
    title: str
    arch: Literal["any", "x86_64", "aarch64"]
    runtime: Runtime
    provider: str
    precisions: tuple[Precision, ...]
    default_precision: Precision
    opset: int
    sources: tuple[Source, ...]
    memory: Memory | None = None
    gpu: Gpu | None = None
    engine: EngineBuild | None = None
    family: str | None = None
    board: BoardNames | None = None
    power_modes: tuple[PowerMode, ...] = ()


def list_targets() -> tuple[str, ...]:
    """Names of all targets, sorted; families are not among them."""
    files = (entry.name for entry in resources.files(__name__).iterdir())
    return tuple(sorted(f.removesuffix(".toml") for f in files if f.endswith(".toml")))


@cache
def load_target(name: str) -> Target:
    """Read a target.

    Args:
        name: Name of a target, or of a family (the device at hand if it is a member,
            else its most conservative member).

    Raises:
        TargetError: There is none of that name, or its file is not valid.
    """
    if name in RIVALS:
        raise TargetError(
            f"{name} is whichever of {' and '.join(RIVALS[name])} export measures to be faster. Name one of them."
        )
    member = name
    if name in FAMILIES:
        from edgelm.targets.board import family_member

        member = family_member(name).target
    known = list_targets()
    if member not in known:
        names = ", ".join((*known, *FAMILIES, *RIVALS))
        raise TargetError(f"There is no target '{name}'. Known targets: {names}.")
    text = target_text(member)
    data = {"name": member, **tomllib.loads(text)}
    return schema.build(Target, data, f"targets/{member}.toml", TargetError)


def target_text(name: str) -> str:
    """The TOML text of a target, as a bundle for it carries it."""
    return (resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8")
