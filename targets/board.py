"""The board at hand: what it says of itself, which target it is, and what its JetPack brings.

Everything is read below ``root``, so that recorded trees are read as a device is.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from edgelm import schema
from edgelm.errors import TargetError
from edgelm.targets import FAMILIES, Target, list_targets, load_target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path("/")
# The first TensorRT whose Python API edgelm drives.
OLDEST_TENSORRT = (10, 3)


@dataclass(frozen=True)
class Release:
    """A JetPack release and what it installs.

    Attributes:
        jetpack: Its version.
        l4t: Prefixes of the versions of Jetson Linux that are this release.
        cuda: CUDA's version.
        tensorrt: TensorRT's version.
        python: The system's Python.
        ubuntu: The system.
        soc: Chips that it runs on, as the device tree names them.
        what: Where this is from.
        checked_on: The day it was read, ISO 8601.
        confidence: As for `edgelm.targets.Source`.
    """

    jetpack: str
    l4t: tuple[str, ...]
    cuda: str
    tensorrt: str
    python: str
    ubuntu: str
    soc: tuple[str, ...]
    what: str
    checked_on: str
    confidence: str

    @property
    def runs(self) -> bool:
        """Whether edgelm's runtime runs on it."""
        return version_numbers(self.tensorrt) >= OLDEST_TENSORRT


@dataclass(frozen=True)
class Board:
    """What a Jetson says of itself.

    Attributes:
        model: The model in its device tree; empty if it has none.
        compatible: What its device tree is compatible with, the module's number among it.
        memory_mib: Memory that the system sees; 0 if unknown.
        l4t: Version of Jetson Linux, for example ``36.4.3``; empty if unknown.
        release: Its JetPack, if known.
        target: Name of the target that it is, if it is one.
    """

    model: str
    compatible: tuple[str, ...]
    memory_mib: int
    l4t: str
    release: Release | None
    target: str | None


@dataclass(frozen=True)
class Member:
    """The member of a family that stands for it here.

    Attributes:
        target: Its name.
        why: Why it and no other, for people.
    """

    target: str
    why: str


@cache
def releases() -> tuple[Release, ...]:
    """All JetPack releases that are known, oldest first."""
    folder = resources.files("edgelm.targets") / "jetpack"
    data = tomllib.loads((folder / "releases.toml").read_text(encoding="utf-8"))
    return tuple(
        schema.build(Release, row, f"targets/jetpack/releases.toml, {i}", TargetError)
        for i, row in enumerate(data["release"])
    )


def find_release(l4t: str) -> Release | None:
    """The JetPack release of a version of Jetson Linux; None if it is not known."""
    fitting = [
        (len(prefix), release)
        for release in releases()
        for prefix in release.l4t
        if f"{l4t}.".startswith(f"{prefix}.")
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def detect(root: Path = ROOT) -> Board | None:
    """What the machine is; None if it is no Jetson.

    Args:
        root: Where its file system begins.
    """
    tree = root / "proc" / "device-tree"
    text = read_text(root / "etc" / "nv_tegra_release")
    compatible = tuple(filter(None, read_text(tree / "compatible").split("\0")))
    if not text and not any("tegra" in entry for entry in compatible):
        return None
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    l4t = f"{found[1]}.{found[2].rstrip('.')}" if found else ""
    model = read_text(tree / "model").strip("\0\n ")
    memory = memory_mib(root, "MemTotal")
    return Board(
        model,
        compatible,
        memory,
        l4t,
        find_release(l4t),
        _match(model, compatible, memory),
    )


def _match(model: str, compatible: tuple[str, ...], memory: int) -> str | None:
    """The target of that module; where several have it, the smallest that has the memory."""
    boards = [t for t in map(load_target, list_targets()) if t.board is not None]
    words = " ".join(compatible)
    by_module = [
        t for t in boards if t.board and any(m in words for m in t.board.modules)
    ]
    named = by_module or [
        t for t in boards if t.board and re.search(rf"\b{t.board.model}\b", model)
    ]
    fitting = [t for t in named if _total(t) >= memory]
    return min(fitting, key=_total).name if fitting else None


def _total(target: Target) -> int:
    return target.memory.total_mib if target.memory else 0


def family_member(family: str, root: Path = ROOT) -> Member:
    """Which member of a family a command means here.

    Args:
        family: Name of the family.
        root: Where the machine's file system begins.

    Returns:
        The machine itself if it is a member, else the most conservative one.
    """
    least = FAMILIES[family]
    board = detect(root)
    if board is None:
        return Member(least, "this machine is no member; the most conservative member")
    if board.target is not None and load_target(board.target).family == family:
        return Member(board.target, f"this machine: {board.model}")
    known = board.model or "a board without a model in its device tree"
    return Member(
        least,
        f"this machine ({known}, {board.memory_mib} MiB) is not among the known boards; the most conservative member",
    )


def memory_mib(root: Path, name: str) -> int:
    """A line of ``/proc/meminfo``, for example ``MemAvailable``, MiB; 0 if it is not there."""
    found = re.search(
        rf"^{name}:\s+(\d+) kB", read_text(root / "proc" / "meminfo"), re.MULTILINE
    )
    return int(found[1]) // 1024 if found else 0


def read_text(path: Path) -> str:
    """A file's text; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def version_numbers(text: str) -> tuple[int, ...]:
    """``"10.16.2"`` as ``(10, 16, 2)``, to compare versions by."""
    return tuple(int(part) for part in re.findall(r"\d+", text))
