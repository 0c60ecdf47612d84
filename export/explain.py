"""What a bundle's graph consists of, what its runtime makes of it, and why each product is what it is."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import Bundle
from edgelm.errors import require
from edgelm.export.audit import Weighted, audit
from edgelm.targets import load_target


@dataclass(frozen=True)
class Explanation:
    """A graph, explained.

    Attributes:
        precision: The bundle's.
        operators: How often each operator stands in the graph.
        optimiser: What optimised it here; empty where only the device can.
        optimised: How often each operator is left, or was made, by that.
        weights: Everything with weights, in the graph's order.
        why: Reasons for what stayed in float, by layer.
    """

    precision: str
    operators: Mapping[str, int]
    optimiser: str
    optimised: Mapping[str, int]
    weights: tuple[Weighted, ...]
    why: Mapping[str, str]

    @property
    def fused(self) -> dict[str, int]:
        """Operators that the optimiser made, and how many of each."""
        return {k: n for k, n in self.optimised.items() if k not in self.operators}

    def reason(self, entry: Weighted) -> str:
        """Why something is in float32 though the graph is not; empty where it is not so."""
        if entry.precision != "fp32" or self.precision == "fp32":
            return ""
        if entry.kind == "head":
            return "gives the answer; every error in it would be one of the answer"
        if entry.kind == "table" and not self.why.get(entry.layer):
            return "small"
        return self.why.get(entry.layer, "")


def explain(bundle: Bundle) -> Explanation:
    """Explain a bundle that was made on this machine.

    A graph for a CPU is optimised here, by the runtime of its target; what GPUs and TensorRT fuse, only
    the device shows.

    Raises:
        MissingExtraError: The target's runtime is not installed.
    """
    onnx = require("onnx", "export")
    path = bundle.file(bundle.manifest.graph.file)
    target = load_target(bundle.manifest.target)
    optimiser, optimised = "", dict[str, int]()
    if target.provider == "CPUExecutionProvider":
        optimiser, optimised = _onnxruntime(path)
    elif target.runtime == "openvino":
        optimiser, optimised = _openvino(path, bundle.manifest.precision == "fp32")
    proto = onnx.load(path, load_external_data=False)
    return Explanation(
        bundle.manifest.precision,
        dict(bundle.manifest.graph.operators),
        optimiser,
        optimised,
        tuple(audit(proto)),
        _reasons(bundle),
    )


def _onnxruntime(path: Path) -> tuple[str, dict[str, int]]:
    onnx, ort = require("onnx", "export"), require("onnxruntime", "ort")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as work:
        saved = Path(work) / "optimised.onnx"
        options.optimized_model_filepath = str(saved)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        proto = onnx.load(saved, load_external_data=False)
    return f"ONNX Runtime {ort.__version__} CPU", _counted(
        node.op_type for node in proto.graph.node
    )


def _openvino(path: Path, exact: bool) -> tuple[str, dict[str, int]]:
    openvino = require("openvino", "openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    kinds = (
        str(op.get_rt_info()["layerType"].value)
        for op in model.get_runtime_model().get_ops()
    )
    version = openvino.__version__.split("-")[0]
    return f"OpenVINO {version} CPU", _counted(kinds)


def _counted(kinds: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))


def _reasons(bundle: Bundle) -> dict[str, str]:
    """By layer, what the manifest says of what stayed in float."""
    about = bundle.manifest.provenance.get("precision", {})
    why = {
        name.rsplit(" (", 1)[0]: str(reason)
        for name, reason in about.get("fp32", {}).items()
    }
    for choice in about.get("layers", ()):
        if choice["precision"] == "fp32":
            reason = f"int8 would cost {choice['drop']:.2g}"
            why |= dict.fromkeys(choice["layers"], reason)
    return why
