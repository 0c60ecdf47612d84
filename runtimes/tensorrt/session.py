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
from edgelm.runtimes.tensorrt.cudart import capture, pinned
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
            workers: Inferences that may run at once; each has its own contexts, stream
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
        types = {n: np.dtype(trt.nptype(engine.get_tensor_dtype(n))) for n in names}
        inputs = [
            n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT
        ]
        if set(inputs) != set(plan.inputs):
            raise SessionError(
                f"The plan {path} takes {', '.join(inputs)}; its graph takes {', '.join(plan.inputs)}."
            )
        if engine.num_optimization_profiles != len(plan.profiles):
            raise SessionError(
                f"The plan {path} has {engine.num_optimization_profiles} profiles; {len(plan.profiles)} are due."
            )
        outputs = {n: kind for n, kind in types.items() if n not in inputs}
        # The axis of tokens is open in the engine, the other axes are not.
        self._per_token = {
            n for n in outputs if tuple(engine.get_tensor_shape(n))[1:2] == (-1,)
        }
        self._outputs = outputs
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(workers):
            self._lanes.put(
                _Lane(engine, plan, {n: types[n] for n in plan.inputs}, outputs)
            )

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the engine on any number of rows; more than a profile takes go in turns.

        One row alone is filled up to its profile's length, and runs as a CUDA graph.
        """
        rows, length = next(iter(feeds.values())).shape
        index = choose_profile(self._plan, length)
        step = self._plan.profiles[index].max[0]
        lane = self._lanes.get()
        try:
            if rows == 1:
                found = lane.run_alone(feeds, index)
                return {
                    name: value[:, :length] if name in self._per_token else value
                    for name, value in found.items()
                }
            parts = [
                lane.run({n: v[i : i + step] for n, v in feeds.items()}, index)
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
    """A stream, and the contexts that take turns on it in one piece of scratch memory."""

    def __init__(
        self,
        engine: tensorrt.ICudaEngine,
        plan: BuildPlan,
        inputs: Mapping[str, np.dtype[Any]],
        outputs: Mapping[str, np.dtype[Any]],
    ) -> None:
        cuda = require("polygraphy.cuda", "tensorrt")
        opened: tensorrt.ICudaEngine = engine
        self._engine, self._plan = opened, plan
        self._inputs, self._outputs = inputs, outputs
        self._stream = cuda.Stream()
        size = max(1, opened.device_memory_size_v2)
        self._scratch = cuda.DeviceArray((size,), np.uint8)
        self._buffers = {name: cuda.DeviceArray() for name in (*inputs, *outputs)}
        self._context = self._new_context()
        self._profile = -1
        self._alone: dict[int, _Alone] = {}

    def _new_context(self) -> tensorrt.IExecutionContext:
        trt = require("tensorrt", "tensorrt")
        engine: tensorrt.ICudaEngine = self._engine
        scratch: polygraphy.cuda.DeviceArray = self._scratch
        context: tensorrt.IExecutionContext | None = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise SessionError(
                "TensorRT has no memory for another context. Use fewer workers, or end other programs."
            )
        context.set_device_memory(scratch.ptr, scratch.nbytes)
        return context

    def run_alone(self, feeds: Mapping[str, NDArray[Any]], profile: int) -> Arrays:
        """Run one row, filled up with zeros, which the mask hides."""
        if profile not in self._alone:
            length = self._plan.profiles[profile].max[1]
            context = self._new_context()
            self._alone[profile] = _Alone(
                context, self._stream, profile, (1, length), self._inputs, self._outputs
            )
        return self._alone[profile].run(feeds)

    def run(self, feeds: Mapping[str, NDArray[Any]], profile: int) -> Arrays:
        """Run once: copy in, execute, copy out, wait."""
        context: tensorrt.IExecutionContext = self._context
        stream: polygraphy.cuda.Stream = self._stream
        buffer: polygraphy.cuda.DeviceArray
        if profile != self._profile:
            _choose(context, profile, stream.ptr)
            self._profile = profile
        for name, given in feeds.items():
            value = np.ascontiguousarray(given)
            _shape(context, name, value.shape)
            buffer = self._buffers[name]
            buffer.dtype = value.dtype
            buffer.resize(value.shape)
            buffer.copy_from(value, stream)
            context.set_tensor_address(name, buffer.ptr)
        results = {}
        for name, dtype in self._outputs.items():
            due = tuple(context.get_tensor_shape(name))
            buffer = self._buffers[name]
            buffer.dtype = dtype
            buffer.resize(due)
            context.set_tensor_address(name, buffer.ptr)
            results[name] = np.empty(due, dtype)
        _execute(context, stream.ptr)
        for name, result in results.items():
            buffer = self._buffers[name]
            buffer.copy_to(result, stream)
        stream.synchronize()
        return results


class _Alone:
    """One row of a profile's greatest length: copies and kernels as one CUDA graph.

    A graph holds addresses and the context's state, so both are its own.
    """

    def __init__(
        self,
        context: tensorrt.IExecutionContext,
        stream: Any,
        profile: int,
        size: tuple[int, int],
        inputs: Mapping[str, np.dtype[Any]],
        outputs: Mapping[str, np.dtype[Any]],
    ) -> None:
        cuda = require("polygraphy.cuda", "tensorrt")
        opened: tensorrt.IExecutionContext = context
        on: polygraphy.cuda.Stream = stream
        self._context, self._stream = opened, on
        _choose(opened, profile, on.ptr)
        for name in inputs:
            _shape(opened, name, size)
        self._given = {name: pinned(size, kind) for name, kind in inputs.items()}
        self._found = {
            name: pinned(tuple(opened.get_tensor_shape(name)), kind)
            for name, kind in outputs.items()
        }
        self._buffers = {
            name: cuda.DeviceArray(array.shape, array.dtype)
            for name, array in (self._given | self._found).items()
        }
        for name, buffer in self._buffers.items():
            opened.set_tensor_address(name, buffer.ptr)
        # In a new shape TensorRT has to run once before it can be recorded.
        self._send()
        on.synchronize()
        self._graph = capture(on.ptr, self._send)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Copy in, start the graph, wait, copy out."""
        stream: polygraphy.cuda.Stream = self._stream
        for name, array in self._given.items():
            value = feeds[name]
            array[:, : value.shape[1]] = value
            array[:, value.shape[1] :] = 0
        if self._graph is None:
            self._send()
        else:
            self._graph.launch(stream.ptr)
        stream.synchronize()
        return {name: array.copy() for name, array in self._found.items()}

    def _send(self) -> None:
        cuda: polygraphy.cuda.Cuda = require("polygraphy.cuda", "tensorrt").wrapper()
        kinds = require("polygraphy.cuda", "tensorrt").MemcpyKind
        stream: polygraphy.cuda.Stream = self._stream
        buffer: polygraphy.cuda.DeviceArray
        for name, array in self._given.items():
            buffer = self._buffers[name]
            cuda.memcpy(
                buffer.ptr,
                array.ctypes.data,
                array.nbytes,
                kinds.HostToDevice,
                stream.ptr,
            )
        _execute(self._context, stream.ptr)
        for name, array in self._found.items():
            buffer = self._buffers[name]
            cuda.memcpy(
                array.ctypes.data,
                buffer.ptr,
                array.nbytes,
                kinds.DeviceToHost,
                stream.ptr,
            )


def _choose(context: Any, profile: int, stream: int) -> None:
    """Switch a context to a profile."""
    opened: tensorrt.IExecutionContext = context
    if not opened.set_optimization_profile_async(profile, stream):
        raise SessionError(f"TensorRT cannot switch to profile {profile}.")


def _shape(context: Any, name: str, size: tuple[int, ...]) -> None:
    """Set the shape of an input."""
    opened: tensorrt.IExecutionContext = context
    if not opened.set_input_shape(name, size):
        raise SessionError(f"TensorRT refuses the shape {size} for {name}.")


def _execute(context: Any, stream: int) -> None:
    """Send the engine's work to a stream."""
    opened: tensorrt.IExecutionContext = context
    if not opened.execute_async_v3(stream):
        raise SessionError("TensorRT cannot run the engine; its log says why.")
