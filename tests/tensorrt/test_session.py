"""The session's buffers, contexts and CUDA graphs, on a stand-in for the CUDA runtime and the engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tensorrt.bindings import environment, missing

STANDIN = Path(__file__).parent / "standin.py"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in, under the name that polygraphy looks for."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("cudart")
    made = folder / "libcudart.so.12"
    command = ["cc", "-shared", "-fPIC", "-w", "-o", made, STANDIN.parent / "cudart.c"]
    subprocess.run(command, check=True)
    return made


@pytest.mark.parametrize("major", ["10", "11"])
@pytest.mark.parametrize("broken", [False, True])
def test_rows_alone_run_as_graphs_and_all_rows_are_right(
    runtime: Path, major: str, broken: bool
) -> None:
    """Shapes in any order: nothing of one run is left in another. Where nothing can be recorded, plain calls do."""
    if missing(major):
        pytest.skip(missing(major))
    env = environment(major)
    env["LD_LIBRARY_PATH"] += f":{runtime.parent}"
    done = subprocess.run(
        [sys.executable, STANDIN, runtime, *(["broken"] if broken else [])],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["launches"] == (0 if broken else found["alone"])
    # Two lanes take turns, each with a context for batches and one for each profile's graph.
    assert found["contexts"] == 6
    assert found["scratch"] == 2
    assert found["pinned"] == [16, 0]
