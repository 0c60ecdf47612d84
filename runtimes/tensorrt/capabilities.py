"""What of TensorRT and Jetson this edgelm does, and how far each part has been checked.

The table of docs/jetson.md is this list; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# hardware: run on such a device. modules: checked against TensorRT's real Python modules 10.13.3.9 and
# 11.4.0.106, with stub libraries. recorded: tested on recorded or assembled inputs, or on a stand-in for a library.
# cpu: run in ONNX Runtime on a CPU. rules: checked by the linter's rules alone. none: written to the documented
# interface and run by nothing.
Checked = Literal["hardware", "modules", "recorded", "cpu", "rules", "none"]


@dataclass(frozen=True)
class Capability:
    """Something that edgelm does with TensorRT or on a Jetson.

    Attributes:
        what: It, for people.
        checked: How far it has been checked.
    """

    what: str
    checked: Checked


CAPABILITIES = (
    Capability("fp32 graph", "cpu"),
    Capability("fp16 graph, typed by casts", "cpu"),
    Capability("bf16 graph, as float32 with its roundings", "cpu"),
    Capability("int8 graph, symmetric QuantizeLinear and DequantizeLinear", "cpu"),
    Capability("parser's rules on every encoder", "rules"),
    Capability("board and JetPack detection", "recorded"),
    Capability("fit check", "recorded"),
    Capability("doctor on a Jetson", "recorded"),
    Capability("plan header, engine cache, retry ladder", "recorded"),
    Capability("builder log and engine inspector", "recorded"),
    Capability("power, clocks, temperatures, tegrastats", "recorded"),
    Capability("power and temperature of cards by NVML", "recorded"),
    Capability("contexts, buffers and CUDA graphs of the session", "recorded"),
    Capability("names and arguments of TensorRT and polygraphy", "modules"),
    Capability("builder settings through polygraphy", "none"),
    Capability("child process of the build, up to TensorRT's first call", "modules"),
    Capability("engine build", "none"),
    Capability("engine session, CUDA graphs, pinned memory", "none"),
    Capability("golden verification of an engine", "none"),
    Capability("2:4 sparse kernels", "none"),
    Capability("timing cache", "none"),
    Capability("ONNX Runtime's CUDA and TensorRT providers", "none"),
)
