"""A graph in OpenVINO: on x86 often the fastest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from numpy.typing import NDArray

from edgelm.errors import SessionError, require
from edgelm.runtimes.session import Arrays

PROVIDER = "OpenVINO"


class OpenVinoSession:
    """A graph on this machine's CPU in OpenVINO; the contract is `Session`.

    Attributes:
        provider: ``OpenVINO``.
        runtime: OpenVINO's version and the device, for people.
        batch_tokens: A call costs more than in ONNX Runtime; larger batches pay.
        length_step: A length that is new to OpenVINO costs more than some padding.
    """

    batch_tokens = 2048
    length_step = 16

    def __init__(
        self,
        graph: Path,
        *,
        threads: int | None = None,
        workers: int = 1,
        exact: bool = False,
    ) -> None:
        """Open a graph.

        Args:
            graph: The ONNX file.
            threads: Threads of one inference; all cores if not given.
            workers: Inferences that may run at once.
            exact: Compute in float32 what is not int8; else in bfloat16 where the
                CPU does.

        Raises:
            SessionError: The graph cannot be loaded.
            MissingExtraError: OpenVINO is not installed.
        """
        openvino = require("openvino", "openvino")
        settings = self._settings(threads, workers, exact)
        version = openvino.__version__.split("-")[0]
        try:
            self._model = openvino.Core().compile_model(str(graph), "CPU", settings)
        except Exception as error:  # OpenVINO's own exceptions have no common base
            raise SessionError(
                f"OpenVINO {version} cannot load {graph}: {error}"
            ) from error
        self.provider = PROVIDER
        self.runtime = f"OpenVINO {version} CPU"
        self._outputs = [output.any_name for output in self._model.outputs]
        self._requests: SimpleQueue[Any] = SimpleQueue()
        for _ in range(workers):
            self._requests.put(self._model.create_infer_request())

    def _settings(
        self, threads: int | None, workers: int, exact: bool
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {"NUM_STREAMS": workers}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads * workers
        if exact:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        return settings

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph once; as many calls as there are workers run at once."""
        request = self._requests.get()
        try:
            request.infer(dict(feeds), share_inputs=True)
            return {
                name: request.get_output_tensor(i).data.copy()
                for i, name in enumerate(self._outputs)
            }
        finally:
            self._requests.put(request)
