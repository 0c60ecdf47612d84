"""Evaluations in processes and on Ray: lost workers change nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelm.tuning.running import processes
from edgelm.tuning.setup import write_texts
from edgelm.tuning.space import Configuration
from edgelm.tuning.trial import Problem, evaluate_trial
from tests.ray_cluster import ENV, kill_a_worker, two_workers
from tests.tuning.test_tune import children

Tiny = Callable[[str], Path]
JOBS = [
    (Configuration(neurons=0.5), "partial"),
    (Configuration(neurons=0.25), "partial"),
    (Configuration(), "partial"),
]


@pytest.fixture
def problem(tiny: Tiny, texts: Path, tmp_path: Path) -> Problem:
    write_texts(str(texts), 0, tmp_path)
    model = str(tiny("embedding"))
    return Problem(model, None, "cpu", str(tmp_path), None, 0, texts=40)


def qualities(results: Any) -> dict[int, float]:
    return {i: result["quality"] for i, result in results}


@pytest.mark.slow
def test_processes_give_what_this_one_gives_also_when_one_is_killed(
    problem: Problem,
) -> None:
    due = {i: evaluate_trial(problem, *job)["quality"] for i, job in enumerate(JOBS)}
    killed = False
    with processes(1) as run:
        found: dict[int, float] = {}
        for i, result in run(problem, JOBS):
            found[i] = result["quality"]
            if not killed:
                killed = kill_a_child()
        assert killed
        assert found == due
        assert qualities(run(problem, JOBS[:1])) == {0: due[0]}


def test_what_cannot_be_evaluated_says_why(problem: Problem) -> None:
    """What a model refuses is one sentence, not the end of the run."""
    broken = Problem("no-such-model", None, "cpu", problem.work, None, 0)
    result = evaluate_trial(broken, Configuration(), "partial")
    assert "no-such-model" in result["error"]


def test_a_worker_that_does_not_see_the_storage_says_so(
    tiny: Tiny, tmp_path: Path
) -> None:
    far = Problem(str(tiny("ner")), None, "cpu", str(tmp_path / "far"), None, 0)
    result = evaluate_trial(far, Configuration(), "partial")
    assert "storage that all workers share" in result["error"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with two_workers() as found:
        yield found


@pytest.mark.slow
def test_a_run_on_ray_that_loses_a_worker_finds_what_a_local_one_finds(
    tiny: Tiny, texts: Path, tmp_path: Path, address: str
) -> None:
    command = [sys.executable, "-m", "edgelm", "tune", str(tiny("embedding"))]
    command += ["--target", "cpu", "--texts", str(texts), "--max-drop", "20%"]
    command += ["--trials", "5", "--json"]
    local = [*command, "--workers", "1", "-o", str(tmp_path / "local")]
    due = subprocess.run(local, check=True, capture_output=True, text=True, env=ENV)
    far = [*command, "--ray", address, "--ray-cpus", "0.5", "-o", str(tmp_path / "ray")]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(far, stdout=pipe, stderr=quiet, text=True, env=ENV)
    end, killed = time.monotonic() + 600, False
    while process.poll() is None and not killed:
        assert time.monotonic() < end
        killed = kill_a_worker("evaluate_trial")
    output, _ = process.communicate(timeout=600)
    assert killed
    assert process.returncode == 0
    rows, expected = (json.loads(text)["rows"] for text in (output, due.stdout))
    assert [(r["name"], r.get("quality"), r["stopped"]) for r in rows] == [
        (r["name"], r.get("quality"), r["stopped"]) for r in expected
    ]


def kill_a_child() -> bool:
    """End a process that this one started to evaluate in."""
    found = children(os.getpid())
    if found:
        os.kill(int(found[0]), signal.SIGKILL)
    return bool(found)
