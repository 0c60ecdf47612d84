"""Several processes share the calibration text: each sees its part, all get the same statistics.

    torchrun --nproc-per-node 2 -m edgelm compress ...

Every process holds the model and computes the same masks; only the forward passes are
shared out. Without a process group, everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from edgelm.errors import CompressionError
from edgelm.statistics import ActivationStatistics


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The group that torchrun's environment speaks of, if it speaks of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(texts: Sequence[str]) -> list[str]:
    """This process's part of the texts.

    Raises:
        CompressionError: There are fewer texts than processes.
    """
    if not dist.is_initialized():
        return list(texts)
    count = dist.get_world_size()
    if len(texts) < count:
        raise CompressionError(
            f"There are {len(texts)} texts to share out among {count} processes. Give more texts."
        )
    return list(texts[rank() :: count])


def all_agree(here: bool) -> bool:
    """Whether something is so in every process."""
    if not dist.is_initialized():
        return here
    flag = torch.tensor(int(here), device=_device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def total(here: int) -> int:
    """A number summed over the processes."""
    if not dist.is_initialized():
        return here
    return int(_sum(torch.tensor(here, device=_device())))


def combine(own: ActivationStatistics) -> ActivationStatistics:
    """Statistics over the tokens of all processes; the same in each, to the last bit."""
    return own.summed(_sum) if dist.is_initialized() else own


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
