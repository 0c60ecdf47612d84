"""The GPU at hand, as the CUDA driver tells it; no CUDA toolkit or Python package is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from edgelm.errors import SessionError

# CUdevice_attribute of cuda.h.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class GpuInfo:
    """A GPU.

    Attributes:
        name: Its name, for example ``Orin``.
        compute_capability: For example ``"8.7"``.
        cuda: The newest CUDA that its driver runs, for example ``"12.6"``.
    """

    name: str
    compute_capability: str
    cuda: str


def gpu_info(library: str = "libcuda.so.1") -> GpuInfo:
    """Ask the driver about the first GPU.

    Args:
        library: The driver's library.

    Raises:
        SessionError: There is no driver or no GPU.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise SessionError(f"There is no CUDA driver here: {error}.") from error

    def call(name: str, *args: object) -> None:
        status = getattr(driver, name)(*args)
        if status:
            raise SessionError(f"The CUDA driver finds no GPU: {name} gives {status}.")

    call("cuInit", 0)
    device, value = ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(device), 0)
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(str(value.value))
    call("cuDriverGetVersion", ctypes.byref(value))
    cuda = f"{value.value // 1000}.{value.value % 1000 // 10}"
    return GpuInfo(name.value.decode(errors="replace"), ".".join(capability), cuda)
