"""Power, temperature and clock of NVIDIA GPUs, as NVML, a library of the driver, tells them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

LIBRARY = "libnvidia-ml.so.1"
# NVML_TEMPERATURE_GPU of nvml.h.
_GPU_SENSOR = 0
# NVML_CLOCK_SM of nvml.h.
_SM_CLOCK = 1


@dataclass(frozen=True)
class GpuReading:
    """A GPU at one moment; None where its driver does not tell.

    Attributes:
        name: For example ``NVIDIA H100 80GB HBM3``.
        power_mw: Of the whole card, mW: over the last second, or now, by architecture.
        temperature_c: Degrees Celsius.
        sm_mhz: Clock of the multiprocessors now, MHz.
        sm_most_mhz: The highest that they reach.
    """

    name: str
    power_mw: float | None
    temperature_c: float | None
    sm_mhz: float | None = None
    sm_most_mhz: float | None = None


def read_gpus(library: str = LIBRARY) -> list[GpuReading]:
    """Read every GPU.

    Args:
        library: NVML, which comes with the driver.

    Returns:
        A reading for each GPU; nothing where there is no driver or no GPU.
    """
    try:
        nvml = ctypes.CDLL(library)
        start, stop = nvml.nvmlInit_v2, nvml.nvmlShutdown
    except (OSError, AttributeError):
        return []
    if start():
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        return [_read(nvml, number) for number in range(count.value)]
    finally:
        stop()


def driver_version(library: str = LIBRARY) -> str | None:
    """The version of the driver, such as ``580.65.06``; None without one."""
    try:
        nvml = ctypes.CDLL(library)
        start, stop = nvml.nvmlInit_v2, nvml.nvmlShutdown
        tell = nvml.nvmlSystemGetDriverVersion
    except (OSError, AttributeError):
        return None
    if start():
        return None
    try:
        found = ctypes.create_string_buffer(80)
        failed = tell(found, ctypes.c_uint(len(found)))
        return None if failed else found.value.decode(errors="replace")
    finally:
        stop()


def _read(nvml: ctypes.CDLL, number: int) -> GpuReading:
    device = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(device)):
        return GpuReading(f"GPU {number}", None, None)
    name = ctypes.create_string_buffer(96)
    value = ctypes.c_uint()

    def number_of(status: int) -> float | None:
        return None if status else float(value.value)

    named = nvml.nvmlDeviceGetName(device, name, ctypes.c_uint(len(name))) == 0
    power = number_of(nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(value)))
    sensor = ctypes.c_int(_GPU_SENSOR)
    heat = number_of(nvml.nvmlDeviceGetTemperature(device, sensor, ctypes.byref(value)))
    kind = ctypes.c_int(_SM_CLOCK)
    now = number_of(nvml.nvmlDeviceGetClockInfo(device, kind, ctypes.byref(value)))
    most = number_of(nvml.nvmlDeviceGetMaxClockInfo(device, kind, ctypes.byref(value)))
    title = name.value.decode(errors="replace") if named else f"GPU {number}"
    return GpuReading(title, power, heat, now, most)
