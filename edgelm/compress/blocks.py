"""A model's blocks, one at a time in float32; what is done is kept, so work resumes.

A model is held in one of two ways. In memory, all of it. Streamed, its blocks are
empty shells on the meta device, and `Blocks.open` reads one from the safetensors
files, so memory does not grow with depth. Either way every finished block is written to a
journal folder, with its report; a run that was killed finds them there and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgelm import layers, widths
from edgelm.errors import CompressionError
from edgelm.streaming import WeightFiles, fill_, release_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelm.experts import Routing

Rows = list[dict[str, Any]]


class Blocks:
    """The blocks of a model.

    Attributes:
        model: The model; streamed blocks are on the meta device until opened.
        names: Names of the blocks in it.
        spill: Folder where hidden states rest between blocks; None for memory.
        experts: What domains have instead of the model's own weights
            (`edgelm.compress.domains`), by ``domain/block.parameter``.
        routing: Who chooses among its experts (`edgelm.compress.routed`); None: nobody.
        device: Where to compute.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        source: WeightFiles | None = None,
        journal: Path | None = None,
        device: str = "cpu",
        spill: Path | None = None,
    ) -> None:
        """Hold a model.

        Args:
            model: The model.
            source: Where streamed blocks are read from; None if all is in memory.
            journal: Folder for finished blocks; None to keep none.
            device: Where to compute; what is not open rests on the CPU.
            spill: Folder for hidden states between blocks.
        """
        found = layers.blocks(model)
        self.model = model
        self.names = [name for name, _ in found]
        self.spill = spill
        self.experts: dict[str, torch.Tensor] = {}
        self.routing: Routing | None = None
        self._modules = [block for _, block in found]
        self._source = source
        self._journal = journal
        self.device = device
        self._dtypes: list[dict[str, torch.dtype]] = [{} for _ in found]

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.names)

    @contextmanager
    def open(self, step: int, index: int) -> Iterator[nn.Module]:
        """Have one block in memory and in float32.

        Args:
            step: Which step it is opened for: the block is as the step before left it.
            index: Which block.

        Yields:
            The block. What is done to it lasts in memory, but is lost to a streamed
            model unless `finish` is called.
        """
        block = self._modules[index]
        weights = self._weights(step, index)
        self._dtypes[index] = {name: w.dtype for name, w in weights.items()}
        fill_(block, weights, self.device)
        try:
            yield block
        finally:
            if self._source is not None:
                release_(block)
            else:
                fill_(block, dict(block.named_parameters()), "cpu")
                for name, parameter in block.named_parameters():
                    parameter.data = parameter.data.to(self._dtypes[index][name])

    def is_finished(self, step: int, index: int) -> bool:
        """Whether an earlier run finished a block."""
        return self._journal is not None and self._report(step, index).is_file()

    def restore(self, step: int, index: int) -> Rows:
        """Make the open block what an earlier run made of it; gives its reports."""
        fill_(self._modules[index], self.tensors(step, index), self.device)
        text = self._report(step, index).read_text(encoding="utf-8")
        rows: Rows = json.loads(text)
        return rows

    def finish(self, step: int, index: int, rows: Rows) -> None:
        """Round an open block to the model's dtype and write it to the journal.

        The blocks behind it must see the rounded weights: a run that resumes does.
        """
        block, dtypes = self._modules[index], self._dtypes[index]
        rounded = {
            name: parameter.detach().to("cpu", dtypes[name]).contiguous()
            for name, parameter in block.named_parameters()
        }
        fill_(block, rounded, self.device)
        if self._journal is None:
            return
        path = self._journal / f"{step}-{index}.safetensors"
        _write(path, lambda work: save_file(rounded, work))
        text = json.dumps(rows)
        # The report last: where it is, the weights are whole.
        _write(self._report(step, index), lambda work: work.write_text(text, "utf-8"))

    def stored_weight(self, index: int, layer: nn.Module) -> torch.Tensor:
        """The weight of a layer of an open block as it will be stored: its dtype, on the CPU."""
        names = {id(p): name for name, p in self._modules[index].named_parameters()}
        weight = layer.get_parameter("weight")
        return weight.detach().to("cpu", self._dtypes[index][names[id(weight)]])

    def tensors(self, step: int, index: int) -> dict[str, torch.Tensor]:
        """Finished weights of a block from the journal, by name in the block."""
        assert self._journal is not None
        return load_file(self._journal / f"{step}-{index}.safetensors")

    def stored(self, step: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of a streamed model after a step, by its name in the files."""
        assert self._source is not None
        changed, config = set(), self.model.config
        found = widths.of_model(self.model)
        for index, path in enumerate(self.names):
            made = widths.make_loadable(self.tensors(step, index), config, found, index)
            for name, tensor in made.items():
                stored = self._source.find(f"{path}.{name}", self.model)
                assert stored is not None
                changed.add(stored)
                yield stored, tensor
        for name in self._source.files:
            if name not in changed:
                yield name, self._source.read(name)

    def _report(self, step: int, index: int) -> Path:
        assert self._journal is not None
        return self._journal / f"{step}-{index}.json"

    @contextmanager
    def around(self, *, head: bool = False) -> Iterator[None]:
        """Have everything outside the blocks where the computing is done; the head if asked."""
        inside = {id(p) for block in self._modules for p in block.parameters()}
        base: nn.Module = self.model if head else self.model.base_model
        rest = [p for p in base.parameters() if id(p) not in inside]
        rest += [b for b in base.buffers() if b.device.type != "meta"]  # type: ignore[misc]
        for tensor in rest:
            tensor.data = tensor.data.to(self.device)
        try:
            yield
        finally:
            for tensor in rest:
                tensor.data = tensor.data.cpu()

    def _weights(self, step: int, index: int) -> Mapping[str, torch.Tensor]:
        block = self._modules[index]
        if self._source is None:
            return dict(block.named_parameters())
        if step > 0:
            return self.tensors(step - 1, index)
        tensors = {}
        for name, _ in block.named_parameters():
            stored = self._source.find(f"{self.names[index]}.{name}", self.model)
            assert stored is not None  # can_stream has seen to it
            tensors[name] = self._source.read(stored)
        return tensors


def journal_folder(output: Path, key: Mapping[str, Any]) -> Path:
    """The journal of a run, beside its output.

    Args:
        output: Where the checkpoint will be.
        key: Everything that the result depends on. Another key gets another folder, so
            that no run goes on with what another one began.

    Raises:
        CompressionError: The folder cannot be written.
    """
    text = json.dumps(key, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    path = output.parent / f".{output.name}.{digest}.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressionError(
            f"Cannot write to {output.parent}: {error.strerror}."
        ) from error
    return path


@contextmanager
def kept_if_of_use(journal: Path) -> Iterator[None]:
    """Remove a journal in the end, unless a run that was cut short can go on from it."""
    try:
        yield
    except BaseException as error:
        hopeless = isinstance(error, CompressionError)  # it would only come again
        if not hopeless and any(journal.glob("*.json")):
            raise
        shutil.rmtree(journal)
        raise
    shutil.rmtree(journal)


def _write(path: Path, write: Any) -> None:
    """Write beside, then rename: a file in the journal is whole."""
    work = path.with_suffix(path.suffix + ".part")
    write(work)
    os.replace(work, path)
