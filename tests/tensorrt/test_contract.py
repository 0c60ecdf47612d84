"""edgelm against TensorRT's real Python modules, 10 and 11: what it uses is there, and it runs up to the first call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtimes.tensorrt.gpu import GpuInfo
from tests.tensorrt.bindings import environment, missing
from tests.tensorrt.names import uses

ROOT = Path(__file__).parents[2]
CODE = ROOT / "runtimes" / "tensorrt"
Bundles = Any


@pytest.fixture(params=["10", "11"])
def major(request: pytest.FixtureRequest) -> str:
    """A major version whose modules are here."""
    why = missing(request.param)
    if why:
        pytest.skip(why)
    return str(request.param)


def python(major: str, *args: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A process that can import tensorrt."""
    done = subprocess.run(
        [sys.executable, *args],
        env=environment(major),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def check(major: str, folder: Path) -> dict[str, Any]:
    script = str(Path(__file__).parent / "names.py")
    found: dict[str, Any] = json.loads(python(major, script, str(folder)).stdout)
    return found


def test_everything_that_is_used_is_there(major: str) -> None:
    found = check(major, CODE)
    assert found["wrong"] == []
    names = {(module, path) for module, path, *_ in found["used"]}
    assert names >= {
        ("tensorrt", "IExecutionContext.execute_async_v3"),
        ("tensorrt", "IExecutionContext.set_tensor_address"),
        ("tensorrt", "EngineInspector.get_engine_information"),
        ("polygraphy.backend.trt", "CreateConfig"),
        ("polygraphy.backend.trt", "Profile.add"),
        ("polygraphy.cuda", "DeviceArray.copy_from"),
    }


def test_no_file_uses_tensorrt_unseen() -> None:
    """Whatever `require` gives, or an annotation names, is collected from every module."""
    seen = {use.where.split(":")[0] for use in uses(CODE)}
    for file in CODE.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert ("import tensorrt" in text) <= (file.name in seen), file.name


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (
            "context.execute_async_v2([], 0)",
            "has no IExecutionContext.execute_async_v2",
        ),
        ("context.execute_async_v3()", ""),
        ("context.set_input_shape('x', (1,), 3)", "set_input_shape takes"),
        ("context.set_input_shape(title='x')", "set_input_shape takes"),
        ("trt.BuilderFlag.SPARSE_WEIGHT", "has no BuilderFlag.SPARSE_WEIGHT"),
        ("driver.CreateConfig(sparsity=True)", "CreateConfig takes"),
        ("driver.CreateConfig(tf32=True)", ""),
    ],
)
def test_what_is_not_there_is_found(
    major: str, tmp_path: Path, line: str, wrong: str
) -> None:
    (tmp_path / "m.py").write_text(
        "def f():\n"
        "    trt = require('tensorrt', 'tensorrt')\n"
        "    driver = require('polygraphy.backend.trt', 'tensorrt')\n"
        "    context: tensorrt.IExecutionContext = g()\n"
        f"    {line}\n",
        encoding="utf-8",
    )
    found = check(major, tmp_path)["wrong"]
    assert wrong in found[0] if wrong else found == []


def test_the_driver_is_asked_for_the_gpu(major: str) -> None:
    """A real library, loaded by its name: the stub of the driver."""
    code = "from edgelm.runtimes.tensorrt.gpu import gpu_info; print(gpu_info())"
    found = python(major, "-c", code).stdout.strip()
    assert found == str(GpuInfo("Orin", "8.7", "12.6"))


def test_a_build_runs_up_to_the_first_call_and_leaves_nothing(
    major: str, bundles: Bundles, tmp_path: Path
) -> None:
    """The stub aborts in createInferBuilder: the child ends, the command says so, the cache stays empty."""
    bundle = bundles("embedding", "fp16", "jetson-orin-nano")
    env = {**environment(major), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "edgelm", "build", str(bundle)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "No engine has been built for this bundle." in done.stderr
    assert "building the dense engine: workspace" in done.stderr
    assert "The process that builds the engine ended" in done.stderr
    assert not list(tmp_path.rglob("*.plan"))


def test_without_an_engine_a_bundle_says_how_to_build_it(
    major: str, bundles: Bundles, tmp_path: Path
) -> None:
    bundle = bundles("embedding", "fp16", "jetson-orin-nano")
    env = {**environment(major), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "edgelm", "run", str(bundle), "text"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"Build it here with: edgelm build {bundle}" in done.stderr


def test_a_bundle_may_build_its_engine_when_it_is_opened(
    major: str, bundles: Bundles, tmp_path: Path
) -> None:
    """By the command and by the library: the same build, up to TensorRT's first call."""
    bundle = bundles("embedding", "fp16", "jetson-orin-nano")
    env = {**environment(major), "XDG_CACHE_HOME": str(tmp_path)}
    code = "import sys, edgelm; edgelm.load(sys.argv[1], build=lambda what: print('told', what))"
    for args in (
        ["-m", "edgelm", "run", str(bundle), "text", "--build"],
        ["-c", code, str(bundle)],
    ):
        done = subprocess.run(
            [sys.executable, *args],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        said = done.stdout + done.stderr
        assert "building the dense engine: workspace" in said
        assert "The process that builds the engine ended" in said
    assert "told building" in said


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"), "CUDAExecutionProvider"),
        (("TensorrtExecutionProvider", "CPUExecutionProvider"), "TensorrtExecutionProvider"),
        (("CPUExecutionProvider",), "its engine is built on the device"),
    ],
)  # fmt: skip
def test_without_tensorrt_onnx_runtime_takes_its_gpu_but_no_cpu(
    bundles: Bundles, tmp_path: Path, offered: tuple[str, ...], chosen: str
) -> None:
    """A module in the place of onnxruntime-gpu, which needs a GPU to offer anything."""
    bundle = bundles("embedding", "fp16", "jetson-orin-nano")
    (tmp_path / "onnxruntime.py").write_text(
        f"__version__ = '1.23'\ndef get_available_providers(): return {list(offered)}\n",
        encoding="utf-8",
    )
    code = (
        "import sys; from edgelm.bundle import open_bundle\n"
        "from edgelm.runtimes.engine import chosen_provider\n"
        "print(chosen_provider(open_bundle(sys.argv[1]), None))"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert chosen in done.stdout + done.stderr


def test_the_doctor_imports_it(major: str) -> None:
    shown = python(major, "-m", "edgelm", "doctor", "--json").stdout
    rows = {row["what"]: row for row in map(json.loads, shown.strip().split("\n"))}
    assert rows["TensorRT"]["state"] == "ok"
    assert rows["TensorRT"]["found"].startswith(f"{major}.")
