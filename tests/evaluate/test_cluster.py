"""The accuracy suite on Ray says what it says here, also when a worker is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelm.cli import cli
from tests.ray_cluster import ENV, kill_a_worker, two_workers, wait_for

Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with two_workers() as found:
        yield found


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"text1": f"the {i} cats", "text2": "cats " * (1 + i % 7), "score": i % 11}
        for i in range(3000)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def spearman(output: str) -> Any:
    return json.loads(output)["spearman"]


@pytest.mark.slow
def test_a_lost_worker_changes_no_digit(
    bundles: Bundles, pairs: Path, address: str
) -> None:
    command = [sys.executable, "-m", "edgelm", "eval", str(bundles("embedding"))]
    command += ["--data", str(pairs), "--json"]
    here = subprocess.run(command, check=True, capture_output=True, text=True)
    far = [*command, "--ray", address]
    whole = subprocess.run(far, check=True, capture_output=True, text=True, env=ENV)
    process = subprocess.Popen(far, stdout=subprocess.PIPE, text=True, env=ENV)
    killed = []
    wait_for(
        lambda: (
            killed.append(kill_a_worker("answer_shard"))
            or any(killed)
            or process.poll() is not None
        )
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert any(killed)
    assert spearman(output) == spearman(whole.stdout)
    # Here batches are made of other neighbours, which is worth a last digit.
    assert spearman(output) == pytest.approx(spearman(here.stdout), abs=1e-4)


def test_an_address_where_nobody_listens_is_said(bundles: Bundles, pairs: Path) -> None:
    pytest.importorskip("ray")
    command = ["eval", str(bundles("embedding")), "--data", str(pairs)]
    result = CliRunner().invoke(cli, [*command, "--ray", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert "There is no Ray cluster at 127.0.0.1:1" in result.stderr
