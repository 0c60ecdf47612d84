"""Dynamic int8: ranges of activations are taken at each call."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from edgelm.export.audit import wanted_precisions, write
from edgelm.export.editor import Editor
from edgelm.export.graph import weighted_products
from edgelm.export.rounding import quantise_weights
from edgelm.manifest import Graph


def quantize_dynamic(
    source: Path, path: Path, keep: Collection[str] = (), table_bits: int = 8
) -> Graph:
    """Weights per channel, symmetric; activations by what each call brings.

    Every input is DynamicQuantizeLinear once, however many products read it, and a product is
    MatMulInteger and the multiplication by both scales, as ONNX Runtime joins them into one kernel.

    Args:
        source: A float32 graph.
        path: The file to write.
        keep: Names of products that stay float32.
        table_bits: 8, or 4 for large embedding tables.

    Returns:
        The new graph's interface.

    Raises:
        ExportError: A weight is not finite, or the graph is not what was asked for.
    """
    editor = Editor(source)
    wanted = wanted_precisions(editor, "int8", keep, table_bits=table_bits)
    done = set()
    for product in weighted_products(editor.proto)[0]:
        if product.name in keep:
            continue
        x, out, name = product.input[0], product.output[0], product.name
        levels, scale, zero = f"{x}.uint8", f"{x}.step", f"{x}.zero"
        if x not in done:
            made = editor.node("DynamicQuantizeLinear", [x], levels)
            made.output.extend([scale, zero])
            editor.follow(x, made)
            done.add(x)
        whole, steps = quantise_weights(editor.constants[product.input[1]])
        weight = editor.constant(f"{name}.weight.int8", whole)
        step = editor.constant(f"{name}.weight.step", steps)
        none = editor.constant(f"{name}.weight.zero", np.zeros(len(steps), np.int8))
        editor.replace(
            product,
            editor.node("MatMulInteger", [levels, weight, zero, none], f"{out}.int32"),
            editor.node("Cast", [f"{out}.int32"], f"{out}.levels", to=1),
            editor.node("Mul", [scale, step], f"{out}.step"),
            editor.node("Mul", [f"{out}.levels", f"{out}.step"], out),
        )
    editor.quantise_tables(table_bits)
    return write(editor.finish(), path, wanted)
