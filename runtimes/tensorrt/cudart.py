"""What of the CUDA runtime polygraphy does not wrap: pinned memory and graphs, in the library that it has loaded."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgelm.errors import SessionError, require

if TYPE_CHECKING:
    import polygraphy.cuda

# cudaStreamCaptureModeThreadLocal of driver_types.h: what other threads do is no part of it.
_THREAD_LOCAL = ctypes.c_int(1)


def pinned(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros in memory that does not move, which a copy to or from the device needs to be part of a graph.

    Raises:
        SessionError: There is no memory for it.
    """
    library = _library()
    kind, pointer = np.dtype(dtype), ctypes.c_void_p()
    size = max(1, math.prod(shape) * kind.itemsize)
    _check(
        "cudaHostAlloc",
        library.cudaHostAlloc(
            ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(0)
        ),
    )
    memory = (ctypes.c_char * size).from_address(int(pointer.value or 0))
    weakref.finalize(memory, library.cudaFreeHost, ctypes.c_void_p(pointer.value))
    array: NDArray[Any] = np.ndarray(shape, kind, buffer=memory)  # type: ignore[arg-type]
    array[...] = 0
    return array


class CudaGraph:
    """Work on a stream that was recorded, and starts with one call from then on."""

    def __init__(self, executable: ctypes.c_void_p) -> None:
        """Take what `capture` made."""
        self._executable = executable
        weakref.finalize(self, _library().cudaGraphExecDestroy, executable)

    def launch(self, stream: int) -> None:
        """Start it on a stream; returns at once.

        Raises:
            SessionError: CUDA refuses.
        """
        _check(
            "cudaGraphLaunch",
            _library().cudaGraphLaunch(self._executable, ctypes.c_void_p(stream)),
        )


def capture(stream: int, work: Callable[[], None]) -> CudaGraph | None:
    """Record what some work sends to a stream; nothing of it runs.

    Args:
        stream: The stream's handle.
        work: Sends the work; all memory that it names must stay where it is.

    Returns:
        The graph; None where something in the work cannot be recorded.

    Raises:
        SessionError: CUDA fails otherwise.
    """
    library, handle = _library(), ctypes.c_void_p(stream)
    _check(
        "cudaStreamBeginCapture", library.cudaStreamBeginCapture(handle, _THREAD_LOCAL)
    )
    failed = False
    try:
        work()
    except SessionError:  # TensorRT refused; the capture has to end all the same
        failed = True
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    if library.cudaStreamEndCapture(handle, ctypes.byref(graph)) or not graph.value:
        library.cudaGetLastError()  # else the next call would report it
        return None
    try:
        status = library.cudaGraphInstantiateWithFlags(
            ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
        )
    finally:
        library.cudaGraphDestroy(graph)
    if status or failed:
        library.cudaGetLastError()
        return None
    return CudaGraph(executable)


def _library() -> ctypes.CDLL:
    cuda: polygraphy.cuda.Cuda = require("polygraphy.cuda", "tensorrt").wrapper()
    library: ctypes.CDLL = cuda.handle
    return library


def _check(name: str, status: int) -> None:
    if status:
        raise SessionError(f"The CUDA runtime fails: {name} gives {status}.")
