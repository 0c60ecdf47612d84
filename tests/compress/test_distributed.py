"""Two real processes that share the calibration text, over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgelm.statistics import ActivationStatistics

SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from edgelm.calibration import Calibration, load_texts, make_batches, split
from edgelm.compress import Blocks, Sparsify, compress, distributed
from edgelm.models import load_model

torch.set_num_threads(1)
loaded = load_model(sys.argv[1])
texts = load_texts(Calibration(max_texts=40))
with distributed.process_group("cpu"):
    sets = [make_batches(distributed.share(p), loaded.tokenizer, 32) for p in split(texts)]
    step = Sparsify(sparsity=sys.argv[3] if ":" in sys.argv[3] else float(sys.argv[3]),
                    allocation=sys.argv[4])
    compress(Blocks(loaded.model), [step], *sets)
state = {k: v.contiguous() for k, v in loaded.model.state_dict().items()}
save_file(state, f"{sys.argv[2]}/{distributed.rank()}.safetensors")
"""


def launch(world: int, *command: str) -> None:
    """As torchrun does: one process a rank, a common address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **where, "WORLD_SIZE": str(world), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


@pytest.mark.parametrize(
    ("pattern", "allocation"),
    [("2:4", "uniform"), pytest.param("0.6", "owl", marks=pytest.mark.slow)],
)
def test_two_processes_make_identical_masks(
    tiny_embedding: Path, tmp_path: Path, pattern: str, allocation: str
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    for folder, world in ((two, 2), (one, 1)):
        folder.mkdir()
        launch(
            world, "-c", SCRIPT, str(tiny_embedding), str(folder), pattern, allocation
        )
    first, second = (load_file(two / f"{rank}.safetensors") for rank in (0, 1))
    alone = load_file(one / "0.safetensors")
    same = count = 0
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        same += int(((weight == 0) == (alone[name] == 0)).sum())
        count += weight.numel()
    # The order of the sums differs from one process: a near tie may fall otherwise.
    assert same / count > 0.999


def test_the_command_runs_in_two_processes_and_writes_one_checkpoint(
    tiny_embedding: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ck"
    flags = ["--sparsity", "2:4", "--max-texts", "40"]
    launch(
        2, "-m", "edgelm", "compress", str(tiny_embedding), "-o", str(output), *flags
    )
    assert (output / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".ck*"))


def test_sums_over_processes_are_the_statistics_of_all_tokens() -> None:
    """Against one pass over everything; parts of unlike size and mean, one empty."""
    inputs = torch.randn(7, 5, 6) + 50 * torch.arange(7)[:, None, None]
    weights = torch.ones(7, 5)
    weights[3, 2:] = 0
    cuts = (slice(0, 1), slice(1, 7), slice(7, 7))
    parts = [ActivationStatistics.of(inputs[c], weights[c], gram=True) for c in cuts]
    meet, slots = threading.Barrier(3), [torch.empty(0)] * 3

    def member(i: int) -> ActivationStatistics:
        def total(tensor: torch.Tensor) -> torch.Tensor:
            slots[i] = tensor
            meet.wait()
            result = torch.stack(slots).sum(dim=0)
            meet.wait()
            return result

        return parts[i].summed(total)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(member, range(3)))
    due = ActivationStatistics.of(inputs, weights, gram=True)
    for statistics in found:
        assert (statistics.count, statistics.sequences) == (due.count, due.sequences)
        assert torch.allclose(statistics.mean, due.mean, rtol=1e-5)
        assert torch.allclose(statistics.gram(), due.gram(), rtol=1e-5)
        assert torch.allclose(
            statistics.within_variance, due.within_variance, rtol=1e-4
        )
