"""Products of 2:4 weights in torch: dense against cuSPARSELt. A part of `benchmarks/gpu.py`.

The same pruned weight both ways: against the product in float64, and by the clock, in turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from edgelm import layers
from edgelm.compress.patterns import make_mask, parse_pattern
from edgelm.models import LoadedModel, load_model

Row = dict[str, Any]
WARM_UP = 3
# Calls between two CUDA events, so that what is timed is not their resolution.
CALLS = 10
# Rows of a product that are compared.
COMPARED = 1024
EXACT_DB = 300.0


def weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """The linear layers' weights ``[out, in]`` by name."""
    return {
        f"{path}.{name}": layers.weight_matrix(module)
        for path, block in layers.blocks(loaded.model)
        for name, module in layers.linears(loaded.model, block)
    }


def layer_weights(
    checkpoint: Path, shapes: Sequence[tuple[int, int]]
) -> list[tuple[str, torch.Tensor]]:
    """A 2:4 weight of each shape of a checkpoint, and seeded ones pruned by magnitude."""
    found: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}
    for name, weight in weights(load_model(str(checkpoint))).items():
        found.setdefault((weight.shape[0], weight.shape[1]), (name, weight.float()))
    generator = torch.Generator().manual_seed(0)
    for rows, columns in shapes:
        weight = torch.randn(rows, columns, generator=generator) * 0.02
        keep = make_mask(weight.abs(), parse_pattern("2:4"))
        found.setdefault((rows, columns), ("random, by magnitude", weight * keep))
    return list(found.values())


def layer_rows(
    found: Iterable[tuple[str, torch.Tensor]],
    device: str,
    tokens: list[int],
    rounds: int,
) -> list[Row]:
    """Dense against 2:4, for each weight, format and number of tokens."""
    rows = []
    for name, weight in found:
        for kind in ("fp16", "bf16", "int8"):
            for count in tokens:
                row: Row = {
                    "layer": name,
                    "out": weight.shape[0],
                    "in": weight.shape[1],
                    "format": kind,
                    "tokens": count,
                }
                rows.append(row)
                try:
                    row |= compare(weight, kind, count, device, rounds)
                except (RuntimeError, ValueError, AssertionError) as error:
                    row["reason"] = str(error).split("\n")[0]
    return rows


def compare(
    weight: torch.Tensor, kind: str, tokens: int, device: str, rounds: int
) -> Row:
    """One product, dense and 2:4 with cuSPARSELt's usual and its fastest algorithm."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, weight.shape[1], generator=generator)
    if kind == "int8":
        w = (weight / weight.abs().amax() * 127).round().to(torch.int8).to(device)
        x = inputs.mul(32).clamp(-127, 127).round().to(torch.int8).to(device)
        dense = lambda: torch._int_mm(x, w.t())  # noqa: E731
    else:
        form = torch.float16 if kind == "fp16" else torch.bfloat16
        w, x = weight.to(device, form), inputs.to(device, form)
        dense = lambda: torch.nn.functional.linear(x, w)  # noqa: E731
    contenders: dict[str, Callable[[], torch.Tensor]] = {"dense": dense}
    row: Row = {}
    if device == "cuda":
        try:
            contenders["2:4"] = sparse(w, x, 0)
            transposed = kind != "int8"
            out = None if transposed else torch.int32
            row["algorithm"] = torch._cslt_sparse_mm_search(
                torch._cslt_compress(w),
                x.t(),
                out_dtype=out,
                transpose_result=transposed,
            )
            contenders["2:4, searched"] = sparse(w, x, row["algorithm"])
        except (RuntimeError, ValueError, AssertionError) as error:
            row["reason"] = str(error).split("\n")[0]
    else:
        row["reason"] = "2:4 kernels need a CUDA device"
    due = x[:COMPARED].double() @ w.double().t()
    row["db"] = {name: noise(due, act()[:COMPARED]) for name, act in contenders.items()}
    row["ms"] = times(contenders, device, rounds)
    return row


def sparse(
    w: torch.Tensor, x: torch.Tensor, algorithm: int
) -> Callable[[], torch.Tensor]:
    """A product with a compressed weight, tried once; int8 sums in int32, as the dense one does."""
    if w.dtype == torch.int8:
        packed = torch._cslt_compress(w)
        act = lambda: torch._cslt_sparse_mm(  # noqa: E731
            packed, x.t(), out_dtype=torch.int32, alg_id=algorithm
        ).t()
    else:
        packed = torch.sparse.to_sparse_semi_structured(w, alg_id=algorithm)
        act = lambda: torch.nn.functional.linear(x, packed)  # noqa: E731
    act()
    return act


def noise(due: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to noise of a product against the same one in float64, dB."""
    lost = float(((due - found.double()) ** 2).sum())
    if not math.isfinite(lost):
        raise ValueError("the product is not finite")
    if lost == 0:
        return EXACT_DB
    return min(float(10 * torch.log10((due**2).sum() / lost)), EXACT_DB)


def times(
    contenders: dict[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, float]:
    """The p50 of each, ms, in turns; on a GPU by CUDA events."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + rounds):
        for name, act in contenders.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(CALLS):
                    act()
                end.record()
                end.synchronize()
                took = start.elapsed_time(end) / CALLS
            else:
                began = time.perf_counter()
                act()
                took = (time.perf_counter() - began) * 1e3
            if turn >= WARM_UP:
                found[name].append(took)
    return {name: median(values) for name, values in found.items()}
