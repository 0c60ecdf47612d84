"""Models larger than memory: everything but the blocks is loaded, blocks on demand."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from edgelm import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_M_MMAP_THRESHOLD = -3  # malloc.h


class WeightFiles:
    """The safetensors files of a model, read tensor by tensor.

    Attributes:
        files: Tensor name to the file that holds it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """List the tensors of files; none is read."""
        self.files: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, "pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        with safe_open(self.files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with safe_open(self.files[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def find(self, name: str, model: PreTrainedModel) -> str | None:
        """What the files call a parameter: with or without the base model's prefix."""
        prefix = model.base_model_prefix + "."
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in self.files:
                return candidate
        return None


def give_memory_back() -> None:
    """Have buffers of 4 MiB and more go back to the system when freed, from now on in this process.

    glibc raises that size to 32 MiB as a program runs, and what blocks leave behind in its heap piles up with
    depth. Other C libraries are left alone.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 4 << 20)


def can_stream(model: PreTrainedModel, files: WeightFiles) -> bool:
    """Whether the files hold every parameter of every block under its own name."""
    for path, block in layers.blocks(model):
        for name, parameter in block.named_parameters():
            stored = files.find(f"{path}.{name}", model)
            if stored is None or files.shape(stored) != tuple(parameter.shape):
                return False
    return True


def shorten(config: Any) -> Any:
    """The config of the same model with as few blocks as show every type of them."""
    short = copy.deepcopy(config)
    types = list(getattr(config, "layer_types", None) or [None])
    few = next(n for n in range(1, len(types) + 1) if set(types[:n]) == set(types))
    short.num_hidden_layers = few
    if types != [None]:
        short.layer_types = types[:few]
    return short


def lengthen_(model: PreTrainedModel, full: PreTrainedModel) -> None:
    """Give a model of few blocks all its blocks, empty, in place.

    Args:
        model: The model with few blocks; everything else is loaded.
        full: The whole model on the meta device.
    """
    few = [block for _, block in layers.blocks(model)]
    where = layers.of_config(model.config).blocks
    container: Any = model.base_model.get_submodule(where)
    for _, block in layers.blocks(full)[len(few) :]:
        # Buffers are not in the files; those of all blocks are alike.
        for name, buffer in few[0].named_buffers():
            owner, leaf = _owner(block, name)
            owner._buffers[leaf] = buffer
        container.append(block)
    for block in few:
        release_(block)
    for name in ("num_hidden_layers", "layer_types"):
        if hasattr(full.config, name):
            setattr(model.config, name, getattr(full.config, name))


def fill_(block: nn.Module, tensors: Mapping[str, torch.Tensor], device: str) -> None:
    """Set parameters of a block, in float32, wherever they were before.

    Args:
        block: The block.
        tensors: Values by name in the block.
        device: Where to put them; the block's buffers follow.
    """
    set_parameters_(
        block, {name: x.to(device, torch.float32) for name, x in tensors.items()}
    )
    for name, buffer in list(block.named_buffers()):
        owner, leaf = _owner(block, name)
        owner._buffers[leaf] = buffer.to(device)


def set_parameters_(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a block other parameters, which may have other shapes and dtypes, in place."""
    for name, tensor in tensors.items():
        owner, leaf = _owner(block, name)
        owner._parameters[leaf] = nn.Parameter(tensor.contiguous(), requires_grad=False)
        if leaf == "weight" and isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = tensor.shape
        elif leaf == "weight" and type(owner).__name__ == "Conv1D":
            owner.__dict__.update(nx=tensor.shape[0], nf=tensor.shape[1])


def release_(block: nn.Module) -> None:
    """Free the parameters of a block: what is left are shapes and dtypes."""
    for name, parameter in list(block.named_parameters()):
        owner, leaf = _owner(block, name)
        owner._parameters[leaf] = nn.Parameter(
            parameter.to("meta"), requires_grad=False
        )


def _owner(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return block.get_submodule(path), leaf
