"""Weights of 4 or 8 bits, activations in float: for devices that wait for memory, not for arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgelm.errors import ConfigError
from edgelm.export.audit import wanted_precisions, write
from edgelm.export.editor import VENDOR, Editor
from edgelm.export.graph import weighted_products
from edgelm.export.rounding import pack, quantise_blocks
from edgelm.manifest import Graph

BLOCKS = (32, 64, 128)
# MatMulNBits may round activations to int8 by block where a device has a kernel for it; the drop
# that export measures includes that.
_INT8 = 4


@dataclass(frozen=True)
class WeightOnly:
    """How weights are stored.

    Attributes:
        bits: 4 or 8.
        block: Inputs of an output that share a scale: 32, 64 or 128.
    """

    bits: int = 4
    block: int = 32

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.bits not in (4, 8):
            raise ConfigError(f"Weights have 4 or 8 bits. Got {self.bits} instead.")
        if self.block not in BLOCKS:
            raise ConfigError(
                f"A block of weights has 32, 64 or 128 of them. Got {self.block} instead."
            )


def quantize_weights(
    source: Path, path: Path, config: WeightOnly, table_bits: int = 8
) -> Graph:
    """Write a graph whose weighted products are ONNX Runtime's MatMulNBits.

    The operator's definition: github.com/microsoft/onnxruntime, docs/ContribOperators.md, MatMulNBits.

    Args:
        source: A float32 graph.
        path: The file to write.
        config: How.
        table_bits: 8, or 4 for large embedding tables.

    Returns:
        The new graph's interface.

    Raises:
        ExportError: A weight is not finite, or the graph is not what was asked for.
    """
    editor = Editor(source)
    wanted = wanted_precisions(
        editor, f"int{config.bits}-weights", table_bits=table_bits
    )
    for product in weighted_products(editor.proto)[0]:
        weights = editor.constants[product.input[1]]
        levels, steps = quantise_blocks(weights, config.bits, config.block)
        new = f"{product.name}.weight"
        inputs = [
            product.input[0],
            editor.constant(f"{new}.levels", pack(levels, config.bits)),
            editor.constant(f"{new}.step", steps.reshape(-1)),
        ]
        node = editor.node(
            "MatMulNBits",
            inputs,
            product.output[0],
            domain=VENDOR,
            K=weights.shape[0],
            N=weights.shape[1],
            bits=config.bits,
            block_size=config.block,
            accuracy_level=_INT8,
        )
        editor.replace(product, node)
    editor.quantise_tables(table_bits)
    editor.use_vendor()
    return write(editor.finish(), path, wanted)
