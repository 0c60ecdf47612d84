"""torch -> ONNX: a graph with sensible names, whose batch and sequence stay dynamic."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgelm.errors import ExportError, SessionError, require
from edgelm.export.attention import plain_attention
from edgelm.export.integers import plain_integers
from edgelm.export.modules import interface, wrap
from edgelm.manifest import Graph, Tensor
from edgelm.metrics import snr_db
from edgelm.models import LoadedModel
from edgelm.runtimes.session import OnnxSession

if TYPE_CHECKING:
    import onnx

# ONNX Runtime 1.17, the oldest that knows opset 20, reads IR versions up to 9; the
# graph uses nothing newer.
IR_VERSION = 9
# A float32 graph differs from torch by the order of its sums only.
MIN_SNR_DB = 80.0
# A protobuf file ends at 2 GiB; leave room for what quantisation adds.
PROTOBUF_LIMIT = 1 << 30
# Batch and sequence lengths to check, none of them the example's.
_SHAPES = ((1, 3), (2, 33), (5, 8), (1, 64))


def export_graph(
    loaded: LoadedModel, path: Path, opset: int, *, token_embeddings: int | None = None
) -> Graph:
    """Write a float32 ONNX graph and check it against torch.

    Args:
        loaded: The model.
        path: The file to write.
        opset: Of the graph.
        token_embeddings: The layer whose token vectors are the second output, if
            there shall be one; -1 for the last.

    Returns:
        Its interface.

    Raises:
        ExportError: torch cannot export the model, an axis became fixed, or the
            graph does not compute what torch does.
    """
    onnx = require("onnx", "export")
    require("onnxscript", "export")
    if loaded.routing is not None:  # the graph of all experts for all tokens
        with loaded.routing.detached(loaded.model):
            dense = replace(loaded, routing=None)
            return export_graph(dense, path, opset, token_embeddings=token_embeddings)
    module = wrap(loaded, layer=token_embeddings)
    wanted = interface(loaded, tokens=token_embeddings is not None)
    names = [tensor.name for tensor in wanted.inputs]
    vocabulary = int(loaded.model.config.vocab_size)
    # Of the example only the ranks matter, but its padding must be real: under an
    # all-ones mask the exporter finds that masking does nothing, and leaves it out.
    example = random_inputs(names, 3, 17, vocabulary)
    axes = {
        0: torch.export.Dim("batch", min=1, max=1 << 12),
        1: torch.export.Dim("sequence", min=1, max=loaded.max_length),
    }
    try:
        with _quiet(), plain_attention(loaded.model):
            program = torch.onnx.export(
                module,
                tuple(torch.from_numpy(example[name]) for name in names),
                dynamo=True,
                dynamic_shapes=tuple(axes for _ in names),
                input_names=names,
                output_names=[tensor.name for tensor in wanted.outputs],
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"torch {torch.__version__} cannot export {loaded.name} ({loaded.architecture}): {reason}"
        ) from error
    assert program is not None
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    plain_integers(proto)
    save(proto, path)
    onnx.checker.check_model(str(path))
    graph = describe(proto, path.name)
    _check_interface(graph, wanted, loaded.name)
    _check_values(module, path, wanted, vocabulary, loaded)
    return graph


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph; weights that no protobuf holds go to a file beside it."""
    onnx = require("onnx", "export")
    if proto.ByteSize() < PROTOBUF_LIMIT:
        onnx.save_model(proto, path)
    else:
        onnx.save_model(
            proto, path, save_as_external_data=True, location=f"{path.name}.data"
        )


def read_graph(path: Path) -> Graph:
    """The interface of a graph's file; its weights are not read where they lie beside it."""
    onnx = require("onnx", "export")
    return describe(onnx.load(path, load_external_data=False), path.name)


def describe(proto: onnx.ModelProto, file: str) -> Graph:
    """A graph's interface and what it consists of."""
    onnx = require("onnx", "export")
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))

    def tensor(value: Any) -> Tensor:
        kind = value.type.tensor_type
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
        return Tensor(value.name, dtype, shape)  # type: ignore[arg-type]

    counts = Counter(node.op_type for node in proto.graph.node)
    return Graph(
        file,
        opset,
        tuple(tensor(value) for value in proto.graph.input),
        tuple(tensor(value) for value in proto.graph.output),
        dict(sorted(counts.items())),
    )


def weighted_products(proto: onnx.ModelProto) -> tuple[list[Any], list[Any]]:
    """The matrix products with constant weights: those that may become int8, and the heads.

    A head is a Gemm (one row a text), or what gives the graph's output but for a
    bias. Heads are small, and every error in them is an error of the answer.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    last = {output.name for output in proto.graph.output}
    for node in reversed(proto.graph.node):
        if node.op_type == "Add" and node.output[0] in last:
            last.update(node.input)
    products: list[Any] = []
    heads: list[Any] = []
    for node in proto.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants:
            head = node.op_type == "Gemm" or node.output[0] in last
            (heads if head else products).append(node)
    return products, heads


def random_inputs(
    names: list[str], batch: int, sequence: int, vocabulary: int
) -> dict[str, Any]:
    """Random token ids; every row but the first is padded."""
    draw = np.random.default_rng(batch * 1000 + sequence)
    mask = np.ones((batch, sequence), np.int64)
    for row in range(1, batch):
        mask[row, max(1, sequence * row // (batch + 1)) :] = 0
    feeds = {
        "input_ids": draw.integers(0, vocabulary, (batch, sequence)) * mask,
        "attention_mask": mask,
        "token_type_ids": np.zeros((batch, sequence), np.int64),
    }
    return {name: feeds[name] for name in names}


def _check_interface(graph: Graph, wanted: Graph, name: str) -> None:
    for tensor, due in zip(
        (*graph.inputs, *graph.outputs), (*wanted.inputs, *wanted.outputs), strict=True
    ):
        if tensor != due:
            raise ExportError(
                f"The exporter made {tensor.name} of {name} {tensor.dtype} {list(tensor.shape)}; "
                f"{due.name}, {due.dtype} {list(due.shape)} is due."
            )


def _check_values(
    module: nn.Module,
    path: Path,
    wanted: Graph,
    vocabulary: int,
    loaded: LoadedModel,
) -> None:
    """Compare with torch on padded batches of other shapes than the example's."""
    try:
        session = OnnxSession(path, "CPUExecutionProvider")
    except SessionError as error:
        raise ExportError(f"The exported graph does not load: {error}") from error
    names = [tensor.name for tensor in wanted.inputs]
    expected: dict[str, list[Any]] = {tensor.name: [] for tensor in wanted.outputs}
    found: dict[str, list[Any]] = {tensor.name: [] for tensor in wanted.outputs}
    for batch, sequence in _SHAPES:
        feeds = random_inputs(
            names, batch, min(sequence, loaded.max_length), vocabulary
        )
        with torch.no_grad():
            given = module(*(torch.from_numpy(feeds[name]) for name in names))
        dues = given if isinstance(given, tuple) else (given,)
        outputs = session.run(feeds)
        for tensor, due in zip(wanted.outputs, dues, strict=True):
            # What stands at a padding token means nothing.
            per_token = "sequence" in tensor.shape
            real = feeds["attention_mask"][..., None] if per_token else 1
            expected[tensor.name].append((due.numpy() * real).ravel())
            found[tensor.name].append((outputs[tensor.name] * real).ravel())
    # All shapes together: one logit near zero alone has no ratio worth the name.
    for name, parts in expected.items():
        measured = snr_db(np.concatenate(parts), np.concatenate(found[name]))
        if not measured >= MIN_SNR_DB:
            raise ExportError(
                f"The exported graph of {loaded.name} does not compute what torch does: its {name} have "
                f"{measured:.1f} dB signal to noise over padded batches of several shapes; "
                f"at least {MIN_SNR_DB:.0f} dB are due."
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals; what matters is checked afterwards."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
