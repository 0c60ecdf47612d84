"""Domain experts: neurons that every text uses, and for each domain some of its own.

Which expert is on is decided by the domain's name when the model is loaded, not token by token:
a device holds shared neurons and its domain's alone, as an ordinary dense network. In closed form,
block by block: the shared neurons by optimal brain surgery on the mean of the sets'
statistics, each expert by the same on its own set's with the shared ones given, and the
projections of all of them at once by ridge regression. A bias is each domain's own. The general
text is a set like the domains: its expert is the one for text of no domain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from edgelm import layers, schema, widths
from edgelm.compress import least_squares, obs, sequential
from edgelm.compress.layer import Layer, LayerReport
from edgelm.compress.observe import OpenBlock
from edgelm.compress.sizes import sizes
from edgelm.errors import CompressionError, ConfigError
from edgelm.streaming import set_parameters_

if TYPE_CHECKING:
    from edgelm.calibration import Batch
    from edgelm.compress.blocks import Blocks

Progress = Callable[[str, int, int], None]
GENERAL = "general"


@dataclass(frozen=True)
class Domains:
    """Give each domain neurons of its own.

    Attributes:
        texts: Name of each domain to the file of its text, as for a calibration.
        keep: Share of a network's neurons that one domain uses.
        shared: Share of them that all domains use.
        multiple: Both numbers of neurons are rounded to multiples of this.
        drift: Share of the drift that the projections make up for.
    """

    version: ClassVar[int] = 1

    texts: Mapping[str, str] = field(default_factory=dict)
    keep: float = 0.5
    shared: float = 0.25
    multiple: int = 16
    drift: float = 0.5

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range, or there is no domain.
        """
        if not self.texts or GENERAL in self.texts:
            raise ConfigError(
                "Domains needs a text file for each domain, by name; "
                f"the name '{GENERAL}' is taken by text of no domain."
            )
        if not 0 < self.shared < self.keep <= 1:
            raise ConfigError(
                f"Domains needs 0 < shared < keep <= 1. Got shared {self.shared} and keep {self.keep} instead."
            )
        if self.multiple < 1 or not 0 <= self.drift <= 1:
            raise ConfigError(
                "Domains needs 'multiple' at least 1 and 'drift' in [0, 1]."
            )


def add_domains(
    blocks: Blocks,
    number: int,
    step: Domains,
    sets: tuple[Sequence[Batch], Sequence[Batch]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Make a model's networks of shared neurons and experts by domain.

    Args:
        blocks: The model; afterwards it is the one for text of no domain, and
            ``blocks.experts`` holds what the others have instead.
        number: The step's number.
        step: What to do.
        sets: Batches to compute with and to judge by; each says its domain.
        progress: As for `edgelm.compress.compress`.

    Returns:
        A row a network; its errors are means over the sets, ``tried`` has each set's.

    Raises:
        CompressionError: A domain has no text, or weights are not finite.
    """
    where = layers.of_config(blocks.model.config)
    names = [GENERAL, *step.texts]
    now: dict[str, list[list[sequential.Flow]]] = {}
    with blocks.around(), blocks.open(number, 0):
        for name in names:
            own = [
                [b for b in s if b.domain == name.replace(GENERAL, "")] for s in sets
            ]
            if not all(own):
                raise CompressionError(f"There is no calibration text for '{name}'.")
            now[name] = [sequential.start(blocks.model, b, blocks.spill) for b in own]
    before = {
        n: [sequential.copies(f, blocks.spill) for f in flows]
        for n, flows in now.items()
    }
    rows = []
    for index, path in enumerate(blocks.names):
        began = time.monotonic()
        with blocks.open(number, index) as block:
            dense = {k: p.detach() for k, p in block.named_parameters()}
            opened = [
                OpenBlock(
                    path,
                    index,
                    block,
                    block,
                    where,
                    blocks.model.config,
                    now[n],
                    before[n],
                )
                for n in names
            ]
            report, made, shared = _split(opened, names, step)
            for name in reversed(names):  # the general one last: it stays
                set_parameters_(block, made[name])
                for flows in now[name]:
                    sequential.advance_(block, index, flows)
            for name in names[1:]:
                part = widths.expert_of(made[name], where, shared)
                blocks.experts |= {
                    f"{name}/{path}.{k}": t.cpu() for k, t in part.items()
                }
            set_parameters_(
                block, {k: p.to(dense[k].dtype) for k, p in made[GENERAL].items()}
            )
            stored = [
                sizes(blocks.stored_weight(index, block.get_submodule(n)))
                for n in (*where.ffn_in, where.ffn_out)
            ]
            row = {
                **schema.plain(report),
                "step": number,
                "seconds": round(time.monotonic() - began, 3),
                "bytes": {way: sum(s[way] for s in stored) for way in stored[0]},
            }
            blocks.finish(number, index, [row])
        rows.append(row)
        progress("domains", index + 1, len(blocks))
    return rows


def _split(
    opened: Sequence[OpenBlock], names: Sequence[str], step: Domains
) -> tuple[LayerReport, dict[str, dict[str, torch.Tensor]], int]:
    """Choose and solve one block: its report, each set's weights, how many are shared."""
    first = opened[0]
    where, name = first.where, first.where.ffn_out
    module = first.layer(name)
    matrix, bias = layers.weight_matrix(module).float(), getattr(module, "bias", None)
    if not bool(torch.isfinite(matrix).all()):
        raise CompressionError(f"The weights of {first.full(name)} are not finite.")
    found = {}
    for n, one in zip(names, opened, strict=True):
        fit, held_out = one.observe([name], final=True)
        found[n] = Layer(
            matrix, bias is not None, fit[name], held_out[name], step.drift
        )
    neurons, grain = matrix.shape[1], step.multiple
    shared = max(round(neurons * step.shared / grain), 1) * grain
    keep = min(max(round(neurons * step.keep / grain) * grain, shared + grain), neurons)
    if keep <= shared:
        raise CompressionError(
            f"{first.full(name)} has {neurons} neurons: too few for {shared} shared ones and an expert."
        )
    mean = torch.stack([layer.gram for layer in found.values()]).mean(dim=0)
    always = obs.remove_units(matrix, mean, 1, shared)[0]
    kept = {
        n: obs.remove_units(layer.aim, layer.gram, 1, keep, always)[0]
        for n, layer in found.items()
    }
    orders = {
        n: torch.cat([always, k[~torch.isin(k, always)]]) for n, k in kept.items()
    }
    solved = solve_experts(
        [(layer.aim, layer.gram, orders[n]) for n, layer in found.items()], shared
    )
    made, errors, dropped = {}, {}, []
    dense = {key: p.detach() for key, p in first.module.named_parameters()}
    for (n, layer), projection in zip(found.items(), solved, strict=True):
        own = torch.zeros_like(matrix)
        own[:, orders[n]] = projection
        errors[n] = layer.error(own)
        only = torch.zeros_like(matrix)
        only[:, orders[n]] = layer.aim[:, orders[n]]
        dropped.append(layer.error(only))
        new = widths.map_units(dense, where, "neurons", neurons, widths.take(orders[n]))
        new[f"{name}.weight"] = projection.T if where.transposed else projection
        shift = layer.shift(own)
        if bias is not None and shift is not None:
            new[f"{name}.bias"] = bias.detach() + shift
        made[n] = new
    error, initial = (sum(e) / len(names) for e in (errors.values(), dropped))
    report = LayerReport(
        first.full(name),
        (matrix.shape[0], keep),
        1 - keep / neurons,
        initial,
        initial,
        error,
        "domains",
        "least squares",
        errors,
        tuple(first.full(n) for n in (*where.ffn_in, name)),
    )
    return report, made, shared


def solve_experts(
    problems: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], shared: int
) -> list[torch.Tensor]:
    """The projections that come nearest to what each set wants, the shared one the same in all.

    Least squares over all sets, which count alike: in ``sum_d E|aim_d x - W_S x_S - W_d x_d|^2``
    experts meet only through the shared weights.

    Args:
        problems: For each set the dense weight that would do best, ``[out, F]``; its Gram
            matrix, ``[F, F]``; and its neurons, int64, the shared ones first.
        shared: How many are shared.

    Returns:
        For each set ``[out, neurons]``.
    """
    sizes_ = [len(order) - shared for *_, order in problems]
    whole = shared + sum(sizes_)
    aim, gram, _ = problems[0]
    start, target = (aim.new_zeros(len(aim), whole) for _ in range(2))
    joint = gram.new_zeros(whole, whole)
    places, end = [], shared
    for (aim, gram, order), size in zip(problems, sizes_, strict=True):
        place = torch.cat([torch.arange(shared), torch.arange(end, end + size)])
        place = place.to(order.device)
        joint[place.unsqueeze(1), place] += gram[order][:, order]
        target[:, place] += aim @ gram[:, order]
        start[:, place[:shared]] += aim[:, order[:shared]] / len(problems)
        start[:, place[shared:]] = aim[:, order[shared:]]
        places.append(place)
        end += size
    new = start + least_squares.solve(joint, target - start @ joint)
    return [new[:, place] for place in places]
