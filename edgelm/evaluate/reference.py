"""A model that is no bundle, in PyTorch, behind the same faces as a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from edgelm.export.exporter import device_tokenizer, make_manifest
from edgelm.export.modules import OUTPUTS, interface, wrap
from edgelm.models import LoadedModel, load_model
from edgelm.runtimes import Model
from edgelm.runtimes import wrap as wrap_engine
from edgelm.runtimes.engine import Engine
from edgelm.runtimes.session import Arrays
from edgelm.tasks import Task


class TorchSession:
    """A module of PyTorch behind the contract of a session.

    Attributes:
        provider: The device that runs it.
        runtime: What runs it, with its version.
        batch_tokens: PyTorch's best of 256 to 2048 with `minilm`: it is what others are compared with.
    """

    batch_tokens = 1024
    length_step = 1

    def __init__(self, module: nn.Module, output: str) -> None:
        """Wrap a module that takes the graph's inputs by name."""
        self.provider = "CPU"
        self.runtime = f"PyTorch {torch.__version__}"
        self._module = module
        self._output = output

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the module once."""
        with torch.inference_mode():
            output = self._module(**{k: torch.from_numpy(v) for k, v in feeds.items()})
        return {self._output: output.numpy()}


def open_reference(
    reference: str, task: Task | None = None, threads: int | None = None
) -> Model:
    """Open a model in PyTorch, float32.

    Args:
        reference: A built-in name, a folder, or a hub id.
        task: Its task; inferred if not given.
        threads: Threads of PyTorch; its own default if not given.

    Raises:
        EdgelmError: What `load_model` refuses.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    return from_loaded(load_model(reference, task))


def from_loaded(loaded: LoadedModel) -> Model:
    """A loaded model behind the faces of a bundle."""
    session = TorchSession(wrap(loaded), OUTPUTS[loaded.task])
    manifest = make_manifest(loaded, interface(loaded))
    tokenizer = device_tokenizer(loaded)
    return wrap_engine(Engine(loaded.name, manifest, tokenizer, session))
