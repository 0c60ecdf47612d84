"""A TensorRT engine as a session: tensors by name, device buffers and streams by polygraphy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError, SessionError, require
from edgelm.runtimes.session import Arrays
from edgelm.runtimes.tensorrt.plan import BuildPlan

if TYPE_CHECKING:
    import polygraphy.cuda
    import tensorrt

PROVIDER = "TensorRT"


class TensorRtSession:
    """An engine on this machine's GPU; the contract is `edgelm.runtimes.session.Session`.

    Attributes:
        provider: ``TensorRT``.
        runtime: TensorRT's version, for people.
        batch_tokens: As many as the engine's largest profile takes.
        length_step: Lengths are not rounded: an engine takes any within its profiles.
    """

    length_step = 1

    def __init__(self, path: Path, plan: BuildPlan, workers: int = 1) -> None:
        """Load a plan, which is code: the caller has checked where it is from.

        Args:
            path: The plan.
            plan: How it was built.
            workers: Inferences that may run at once; each has its own context, stream
                and buffers.

        Raises:
            SessionError: TensorRT refuses the plan, or its tensors are not the graph's.
            MissingExtraError: TensorRT or polygraphy is not installed.
        """
        trt = require("tensorrt", "tensorrt")
        logger: tensorrt.Logger = trt.Logger(trt.Logger.WARNING)
        runtime: tensorrt.Runtime = trt.Runtime(logger)
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(
            path.read_bytes()
        )
        if engine is None:
            raise SessionError(
                f"TensorRT {trt.__version__} refuses the plan {path}. Build it again with edgelm build --force."
            )
        self.provider = PROVIDER
        self.runtime = f"TensorRT {trt.__version__}"
        self._plan = plan
        self.batch_tokens = plan.largest_batch * plan.longest
        self._keep = (logger, runtime, engine)  # in the order in which they are freed
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [
            n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT
        ]
        self._outputs = {
            n: np.dtype(trt.nptype(engine.get_tensor_dtype(n)))
            for n in names
            if n not in inputs
        }
        if set(inputs) != set(plan.inputs):
            raise SessionError(
                f"The plan {path} takes {', '.join(inputs)}; its graph takes {', '.join(plan.inputs)}."
            )
        if engine.num_optimization_profiles != len(plan.profiles):
            raise SessionError(
                f"The plan {path} has {engine.num_optimization_profiles} profiles; {len(plan.profiles)} are due."
            )
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(workers):
            context: tensorrt.IExecutionContext | None = (
                engine.create_execution_context()
            )
            if context is None:
                raise SessionError(
                    "TensorRT has no memory for another context. Use fewer workers, or end other programs."
                )
            self._lanes.put(_Lane(context, [*plan.inputs, *self._outputs]))

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the engine on any number of rows; more than a profile takes go in turns."""
        rows, length = next(iter(feeds.values())).shape
        index = choose_profile(self._plan, length)
        step = self._plan.profiles[index].max[0]
        lane = self._lanes.get()
        try:
            parts = [
                lane.run(
                    {
                        n: np.ascontiguousarray(v[i : i + step])
                        for n, v in feeds.items()
                    },
                    self._outputs,
                    index,
                )
                for i in range(0, rows, step)
            ]
        finally:
            self._lanes.put(lane)
        return {
            name: np.concatenate([p[name] for p in parts]) for name in self._outputs
        }


def choose_profile(plan: BuildPlan, length: int) -> int:
    """The first profile that takes inputs of some length.

    Raises:
        InputError: None does.
    """
    for i, profile in enumerate(plan.profiles):
        if profile.min[1] <= length <= profile.max[1]:
            return i
    raise InputError(
        f"The engine takes 1 to {plan.longest} tokens. Got {length} instead."
    )


class _Lane:
    """A context with its stream and its buffers on the device."""

    def __init__(self, context: Any, names: list[str]) -> None:
        cuda = require("polygraphy.cuda", "tensorrt")
        self._context = context
        self._stream = cuda.Stream()
        self._buffers = {name: cuda.DeviceArray() for name in names}
        self._profile = -1

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, np.dtype[Any]],
        profile: int,
    ) -> Arrays:
        """Run once: copy in, execute, copy out, wait."""
        context: tensorrt.IExecutionContext = self._context
        stream: polygraphy.cuda.Stream = self._stream
        buffer: polygraphy.cuda.DeviceArray
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, stream.ptr):
                raise SessionError(f"TensorRT cannot switch to profile {profile}.")
            self._profile = profile
        for name, value in feeds.items():
            if not context.set_input_shape(name, value.shape):
                raise SessionError(
                    f"TensorRT refuses the shape {value.shape} for {name}."
                )
            buffer = self._buffers[name]
            buffer.dtype = value.dtype
            buffer.resize(value.shape)
            buffer.copy_from(value, stream)
            context.set_tensor_address(name, buffer.ptr)
        results = {}
        for name, dtype in outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            buffer = self._buffers[name]
            buffer.dtype = dtype
            buffer.resize(shape)
            context.set_tensor_address(name, buffer.ptr)
            results[name] = np.empty(shape, dtype)
        if not context.execute_async_v3(stream.ptr):
            raise SessionError("TensorRT cannot run the engine; its log says why.")
        for name, result in results.items():
            buffer = self._buffers[name]
            buffer.copy_to(result, stream)
        stream.synchronize()
        return results
