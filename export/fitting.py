"""What a loaded model needs of a device."""

from __future__ import annotations

from typing import Any

from torch import nn

from edgelm import layers
from edgelm.models import LoadedModel
from edgelm.targets import Target
from edgelm.targets.fit import Fit, Network, check_fit


def fit(loaded: LoadedModel, target: Target, precision: str) -> Fit:
    """Predict what a model needs on a device. Errors are those of `check_fit`."""
    return check_fit(target, network(loaded), precision, sparse_2_4=is_sparse(loaded))


def is_sparse(loaded: LoadedModel) -> bool:
    """Whether a model's weights were made 2:4 sparse."""
    return any(step.get("sparsity") == "2:4" for step in loaded.steps)


def network(loaded: LoadedModel) -> Network:
    """A model's sizes, from its weights and its config."""
    model, config = loaded.model, loaded.model.config
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]

    def number(*names: str) -> int:
        values: list[Any] = [getattr(config, name, None) for name in names]
        return next((value for value in values if isinstance(value, int)), 0)

    known = layers.ARCHITECTURES.get(loaded.architecture)
    inner = (known.ffn_width,) if known else ()
    hidden = number("hidden_size", "d_model", "dim", "n_embd")
    return Network(
        parameters=sum(p.numel() for p in model.parameters()),
        table_parameters=sum(int(table.numel()) for table in tables),
        hidden=hidden,
        inner=number(*inner, "intermediate_size") or 4 * hidden,
        heads=number("num_attention_heads", "n_heads", "num_heads", "n_head"),
        longest=loaded.max_length,
    )
