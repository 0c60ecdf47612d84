"""Sessions: a graph that runs. One contract for every runtime."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from edgelm.errors import SessionError, require

Arrays = dict[str, NDArray[Any]]
# Providers that need CUDA's libraries.
_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
# Tokens of one call there: a choice, not yet measured on a GPU; a CPU's 512 would leave one idle.
_CUDA_BATCH_TOKENS = 8192


class Session(Protocol):
    """A graph that runs: arrays by name in, arrays by name out.

    Attributes:
        provider: The execution provider, or the device.
        runtime: What runs the graph, with its version, for people.
        batch_tokens: Tokens of one call, padding included, beyond which a batch gains
            nothing.
        length_step: What the length of a single input is rounded up to a multiple of.
    """

    provider: str
    runtime: str
    batch_tokens: int
    length_step: int

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph once."""
        ...


class OnnxSession:
    """A graph in ONNX Runtime.

    Attributes:
        provider: The execution provider that the session really got.
        runtime: ONNX Runtime's version and the provider, for people.
        batch_tokens: On a CPU more than 512 is slower, not faster: the activations of a layer
            no longer fit its cache, and memory grows. A GPU takes more.
    """

    batch_tokens = 512
    length_step = 1

    def __init__(
        self,
        graph: Path,
        provider: str,
        threads: int | None = None,
        *,
        exact: bool = False,
    ) -> None:
        """Open a graph.

        Args:
            graph: The ONNX file.
            provider: The execution provider to use; no other will do.
            threads: Threads of one inference; all cores if not given.
            exact: Compute float32 products in float32: on CUDA, ONNX Runtime would take
                TF32, with 10 bits of mantissa (its pull request 19357).

        Raises:
            SessionError: The provider is not there or was lost (ONNX Runtime
                would fall back to the CPU without a word), or the graph cannot
                be loaded.
            MissingExtraError: ONNX Runtime is not installed.
        """
        ort = require("onnxruntime", "ort")
        missing = _preload(ort) if provider in _CUDA else ""
        available = ort.get_available_providers()
        if provider not in available:
            raise SessionError(
                f"ONNX Runtime {ort.__version__} has no {provider} here. It has: {', '.join(available)}. "
                "Choose one of these with --provider, or install edgelm[ort-gpu] for CUDA."
            )
        plain = not (exact and provider == "CUDAExecutionProvider")
        options = self._options(ort, threads)
        chosen = [provider if plain else (provider, {"use_tf32": "0"})]

        def open_graph(*disabled: str) -> Any:
            # Its Python wrapper would go over to the CPU when a call fails, too.
            return ort.InferenceSession(
                str(graph),
                options,
                providers=chosen,
                disabled_optimizers=list(disabled),
                enable_fallback=0,
            )

        try:
            try:
                self._session = open_graph()
            except Exception:
                if not saturates(_cpu_flags()):
                    raise
                # What makes int8 exact there trips over a folded constant that several products read.
                self._session = open_graph("ConstantFolding")
            self._session.disable_fallback()
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            raise SessionError(
                f"ONNX Runtime {ort.__version__} cannot load {graph}: {error}"
            ) from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != provider:
            raise SessionError(
                f"ONNX Runtime fell back from {provider} to {self.provider}. "
                f"Mend the installation of {provider}, or ask for --provider {self.provider}.{missing}"
            )
        if provider in _CUDA:
            self.batch_tokens = _CUDA_BATCH_TOKENS
        short = self.provider.removesuffix("ExecutionProvider")
        self.runtime = f"ONNX Runtime {ort.__version__} {short}"
        self._outputs = [output.name for output in self._session.get_outputs()]

    def _options(self, ort: Any, threads: int | None) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors are raised, not printed
        # Threads wait for each other awake while an inference runs. Idle threads that
        # spin would take the cores from whatever else the device does.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if saturates(_cpu_flags()):
            options.add_session_config_entry("session.x64quantprecision", "1")
        return options

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph once.

        Args:
            feeds: Every input of the graph by name.

        Returns:
            Every output of the graph by name.
        """
        values = self._session.run(self._outputs, dict(feeds))
        return dict(zip(self._outputs, values, strict=True))


def _preload(ort: Any) -> str:
    """Load CUDA and cuDNN from NVIDIA's Python packages, where ONNX Runtime does not look by itself.

    Returns:
        What it could not load, for an error; it prints that, and results may go to the same place.
    """
    said = io.StringIO()
    with suppress(AttributeError), redirect_stdout(said):  # new in 1.21
        ort.preload_dlls()
    return f" It said: {' '.join(said.getvalue().split())}" if said.getvalue() else ""


def saturates(flags: str) -> bool:
    """Whether sums of two int8 products may saturate at 16 bits: x86 without VNNI.

    ONNX Runtime then has slower products that do not (its pull request 12088); asked for, it takes
    them on any x86 CPU, at half the speed.

    Args:
        flags: The CPU's, as Linux lists them; empty where they are not known.
    """
    return "sse2" in flags.split() and "vnni" not in flags


@cache
def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n")
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")
