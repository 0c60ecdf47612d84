"""What a model of sentence-transformers has between pooling and its embeddings, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from edgelm.errors import ModelError
from edgelm.schema import read_json
from edgelm.sentence import Module, read_modules, without_dropout

# Functions behind a Dense module, by the names of their classes.
_FUNCTIONS: Mapping[str, type[nn.Module]] = {
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid,
    "Identity": nn.Identity,
}


class UnitLength(nn.Module):
    """Vectors to vectors of length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """``[batch, width]`` to the same."""
        return nn.functional.normalize(vectors, dim=-1)


def load_behind(folder: Path, name: str) -> nn.Sequential | None:
    """What stands between pooling and the last normalisation; None where nothing does.

    Returns:
        A module from pooled vectors ``[batch, width]`` to embeddings ``[batch, dimension]``, float32.

    Raises:
        ModelError: A module is not one that edgelm exports, or its weights are incomplete.
    """
    modules = without_dropout(read_modules(folder, name, "embedding"))[2:]
    made: list[nn.Module] = []
    for i, module in enumerate(modules):
        config = read_json(folder / module.path / "config.json")
        for end in ("module_input_name", "module_output_name"):
            if (config.get(end) or "sentence_embedding") != "sentence_embedding":
                raise ModelError(
                    f"The module {module.kind} of {name} is for {config[end]}; edgelm exports those of embeddings."
                )
        if module.kind == "Normalize":
            if i < len(modules) - 1:
                made.append(UnitLength())
        elif module.kind == "LayerNorm":
            norm = nn.LayerNorm(int(config["dimension"]))
            made.append(_filled(norm, folder, module, "norm", name))
        else:
            made += _dense(folder, module, config, name)
    return nn.Sequential(*made).eval().requires_grad_(False) if made else None


def _dense(
    folder: Path, module: Module, config: Mapping[str, Any], name: str
) -> Iterator[nn.Module]:
    if config.get("use_residual"):
        raise ModelError(
            f"A Dense module of {name} adds what it was given (use_residual), which edgelm does not export."
        )
    sizes = int(config["in_features"]), int(config["out_features"])
    linear = nn.Linear(*sizes, bias=config.get("bias", True))
    yield _filled(linear, folder, module, "linear", name)
    path = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    kind = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or kind not in _FUNCTIONS:
        raise ModelError(
            f"A Dense module of {name} has the activation {path}; edgelm exports {', '.join(_FUNCTIONS)}."
        )
    yield _FUNCTIONS[kind]()


def _filled(
    layer: nn.Module, folder: Path, module: Module, prefix: str, name: str
) -> nn.Module:
    """A layer with its weights from a module's folder."""
    path = folder / module.path / "model.safetensors"
    if not path.is_file():
        raise ModelError(
            f"The module {module.kind} of {name} has no weights: there is no {module.path}/model.safetensors. "
            "Save the model again with a newer sentence-transformers where you trust it."
        )
    stored = {
        key.removeprefix(f"{prefix}."): tensor.float()
        for key, tensor in load_file(path).items()
    }
    try:
        layer.load_state_dict(stored)
    except RuntimeError as error:
        raise ModelError(
            f"The weights of the module {module.kind} of {name} are not those that its config.json describes."
        ) from error
    return layer
