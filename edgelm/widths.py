"""Inner widths of blocks: neurons of the feed-forward network, heads of attention.

A compressed model may have fewer of them, and not as many in every block. Its files hold
what every loader can read, blocks of one width: where there are fewer units, the rest are
zeros, which add nothing. `edgelm.json` says how many are real, and edgelm's loader leaves
the others out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgelm import layers
from edgelm.streaming import set_parameters_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Widths = Mapping[layers.Part, Sequence[int]]


def map_units(
    tensors: Mapping[str, torch.Tensor],
    where: layers.Architecture,
    part: layers.Part,
    units: int,
    change: Callable[[torch.Tensor, int], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Change the inner units of a block: what one layer puts out and the next takes in.

    Args:
        tensors: A block's weights, by name in it.
        where: The model's architecture.
        part: ``neurons`` of the feed-forward network, or ``heads`` of attention: key and
            value heads, with all query heads that go with each.
        units: How many there are.
        change: From a tensor and the axis of its units to another one.

    Returns:
        All tensors; those that have such an axis changed.
    """
    if part == "neurons":
        producers, runs, consumer = where.ffn_in, 1 + where.fused_gate, where.ffn_out
    else:
        fused = len(where.attention_in) == 1
        producers, runs, consumer = (
            where.attention_in,
            3 if fused else 1,
            where.attention_out,
        )
    changed = dict(tensors)

    def replace_(name: str, axis: int, runs: int) -> None:
        if name in changed:
            parts = changed[name].chunk(runs, axis)
            split = (
                p.reshape(*p.shape[:axis], units, -1, *p.shape[axis + 1 :])
                for p in parts
            )
            done = [change(p, axis).flatten(axis, axis + 1) for p in split]
            changed[name] = torch.cat(done, axis)

    for name in producers:
        replace_(f"{name}.weight", 1 if where.transposed else 0, runs)
        replace_(f"{name}.bias", 0, runs)
    replace_(f"{consumer}.weight", 0 if where.transposed else 1, 1)
    return changed


def of_config(config: Any, part: layers.Part) -> int:
    """How many units a block has by a model's config."""
    if part == "neurons":
        where = layers.of_config(config)
        width = getattr(config, where.ffn_width)
        return int(width if width is not None else 4 * config.hidden_size)
    heads = getattr(config, "num_key_value_heads", None)
    return int(heads or config.num_attention_heads)


def of_block(config: Any, block: nn.Module, part: layers.Part) -> int:
    """How many units a block has."""
    where = layers.of_config(config)
    name = where.ffn_out if part == "neurons" else where.attention_out
    inputs = layers.weight_matrix(block.get_submodule(name)).shape[1]
    if part == "neurons":
        return int(inputs)
    own = getattr(config, "head_dim", None)
    size = own or config.hidden_size // config.num_attention_heads
    together = config.num_attention_heads // of_config(config, part)
    return int(inputs // (size * together))


def of_model(model: PreTrainedModel) -> Widths:
    """Units of every block, of the parts that are not as the config says."""
    free = layers.of_config(model.config).free_heads
    parts: tuple[layers.Part, ...] = ("neurons", "heads") if free else ("neurons",)
    found = {
        part: [of_block(model.config, block, part) for _, block in layers.blocks(model)]
        for part in parts
    }
    return {
        part: counts
        for part, counts in found.items()
        if set(counts) != {of_config(model.config, part)}
    }


def take(units: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A change for `map_units`: these units alone, in this order."""
    return lambda tensor, axis: tensor.index_select(axis, units.to(tensor.device))


def first(count: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A change for `map_units`: the first units."""
    return lambda tensor, axis: tensor.narrow(axis, 0, count)


def padded(count: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A change for `map_units`: zeros behind, up to a number of units."""

    def pad(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[axis] = count - shape[axis]
        return torch.cat([tensor, tensor.new_zeros(shape)], axis)

    return pad


def expert_of(
    tensors: Mapping[str, torch.Tensor], where: layers.Architecture, shared: int
) -> dict[str, torch.Tensor]:
    """What of a block's weights is a domain's own: neurons behind the shared ones, and the bias."""
    projection = f"{where.ffn_out}.weight"
    width = tensors[projection].shape[0 if where.transposed else 1]

    def rest(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.narrow(axis, shared, width - shared)

    made = map_units(tensors, where, "neurons", width, rest)
    bias = f"{where.ffn_out}.bias"
    return {k: t for k, t in made.items() if t.shape != tensors[k].shape or k == bias}


def with_expert(
    tensors: Mapping[str, torch.Tensor],
    expert: Mapping[str, torch.Tensor],
    where: layers.Architecture,
) -> dict[str, torch.Tensor]:
    """A block's weights with another expert behind the shared neurons: `expert_of` reversed."""
    projection = f"{where.ffn_out}.weight"
    axis = 0 if where.transposed else 1
    parts: list[torch.Tensor] = []
    units, own = (t[projection].shape[axis] for t in (tensors, expert))

    def note(tensor: torch.Tensor, _: int) -> torch.Tensor:
        parts.append(tensor)
        return tensor

    map_units(expert, where, "neurons", own, note)

    def put(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        new = parts.pop(0).to(tensor.dtype)
        return torch.cat([tensor.narrow(axis, 0, units - own), new], axis)

    made = map_units(tensors, where, "neurons", units, put)
    bias = f"{where.ffn_out}.bias"
    if bias in expert:
        made[bias] = expert[bias].to(tensors[bias].dtype)
    return made


def stored_width(config: Any, part: layers.Part, counts: Sequence[int]) -> int:
    """How many units blocks have in the files: what the config can say."""
    return max(counts) if part == "neurons" else of_config(config, part)


def padding(config: Any, widths: Widths) -> Widths:
    """Of these units of every block, the parts that the files pad."""
    return {
        part: counts
        for part, counts in widths.items()
        if set(counts) != {stored_width(config, part, counts)}
    }


def make_loadable(
    tensors: Mapping[str, torch.Tensor], config: Any, widths: Widths, index: int
) -> dict[str, torch.Tensor]:
    """A block's weights as they go to the files.

    Args:
        tensors: By name in the block.
        config: The model's.
        widths: What `of_model` gives.
        index: Which block.
    """
    where, made = layers.of_config(config), dict(tensors)
    for part, counts in widths.items():
        full = stored_width(config, part, counts)
        made = map_units(made, where, part, counts[index], padded(full))
    return made


def make_loadable_(model: PreTrainedModel, widths: Widths) -> None:
    """Bring the blocks of a model to the widths that its files have, in place."""
    for index, (_, block) in enumerate(layers.blocks(model)):
        weights = {name: p.detach() for name, p in block.named_parameters()}
        set_parameters_(block, make_loadable(weights, model.config, widths, index))


def describe_(config: Any, widths: Widths) -> None:
    """Make a config say the widths of the files, in place."""
    if "neurons" in widths:
        where = layers.of_config(config)
        setattr(config, where.ffn_width, max(widths["neurons"]))


def trim_(model: PreTrainedModel, widths: Widths) -> None:
    """Leave out the units of a loaded model that are padding, in place."""
    where = layers.of_config(model.config)
    for part, counts in widths.items():
        for (_, block), count in zip(layers.blocks(model), counts, strict=True):
            weights = {name: p.detach() for name, p in block.named_parameters()}
            units = of_block(model.config, block, part)
            set_parameters_(block, map_units(weights, where, part, units, first(count)))
