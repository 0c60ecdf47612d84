"""The pytest plug-in and the ready-made suites, in pytest processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib

Bundles = Callable[..., Path]
ROOT = Path(__file__).parent.parent.parent
SUITES = ["--pyargs", "edgelm.suites.accuracy", "edgelm.suites.latency"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the entry point of pyproject.toml, as an installation writes it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    points = project["project"]["entry-points"]["pytest11"]
    folder = tmp_path_factory.mktemp("site")
    info = folder / "edgelm_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: edgelm-plugin\nVersion: 1\n"
    )
    lines = [f"{name} = {module}" for name, module in points.items()]
    (info / "entry_points.txt").write_text("[pytest11]\n" + "\n".join(lines) + "\n")
    return folder


def run(site: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder, as a user calls it; the plug-in comes by its entry point."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join((str(site), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "-rs", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = ("plays", "reads", "runs", "paris", "river", "book")
    rows = [{"text1": f"the man {w}", "text2": w, "score": i} for i, w in enumerate(words)]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "texts.txt").write_text("the man plays\nparis\n", encoding="utf-8")
    return path


def test_the_suites_pass_and_fail(site: Path, bundles: Bundles, data: Path) -> None:
    bundle, dense = str(bundles("embedding", "int8")), str(bundles("embedding"))
    texts = ["--edgelm-texts", str(data.with_name("texts.txt")), "--edgelm-rounds", "1"]
    options = ["--edgelm-bundle", bundle, *texts]
    beside = ["--edgelm-against", dense, "--edgelm-data", str(data)]
    gates = ["--edgelm-max-drop", "1000%", "--edgelm-min-speedup", "0.001x"]
    gates += ["--edgelm-max-p95-ms", "100000"]
    done = run(site, data.parent, *SUITES, *options, *beside, *gates)
    assert (done.returncode, "5 passed" in done.stdout) == (0, True), done.stdout
    alone = [*options, "--edgelm-data", str(data), "--edgelm-max-p95-ms", "0.0001"]
    done = run(site, data.parent, *SUITES, *alone)
    counts = "1 failed, 2 passed, 2 skipped"
    assert (done.returncode, counts in done.stdout) == (1, True), done.stdout
    assert "at most 0.0001 ms are allowed" in done.stdout
    assert "needs --edgelm-max-drop and --edgelm-against" in done.stdout


def test_a_users_own_tests(site: Path, bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "def test_alone(bundle):\n"
        "    assert bundle.encode(['the man']).shape == (1, 32)\n"
        "def test_both(bundle, against):\n"
        "    a, b = (m.encode(['the man'])[0] for m in (bundle, against))\n"
        "    assert abs(a - b).max() < 1e-6\n"
    )
    bundle = str(bundles("embedding"))
    done = run(
        site,
        tmp_path,
        "test_mine.py",
        "--edgelm-bundle",
        bundle,
        "--edgelm-against",
        bundle,
    )
    assert (done.returncode, "2 passed" in done.stdout) == (0, True), done.stdout
    done = run(site, tmp_path, "-p", "edgelm.pytest_plugin", "test_mine.py", *SUITES)
    assert (done.returncode, "7 skipped" in done.stdout) == (0, True), done.stdout
    assert "needs --edgelm-bundle" in done.stdout
    done = run(
        site,
        tmp_path,
        "test_mine.py",
        "--edgelm-bundle",
        bundle,
        "--edgelm-threads",
        "many",
    )
    assert "--edgelm-threads takes a number. Got many." in done.stdout


def test_pytest_starts_without_what_is_heavy() -> None:
    code = "import sys, edgelm.pytest_plugin; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # fmt: skip
    heavy = {"torch", "transformers", "scipy", "onnxruntime", "onnx", "ir_measures"}
    assert not heavy & set(eval(done.stdout))
