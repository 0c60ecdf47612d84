"""NVML through a real library: a stand-in with nvml.h's own symbols."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edgelm.runtimes.nvml import GpuReading, driver_version, read_gpus

# Two GPUs: of the second, the driver tells no power (NVML_ERROR_NOT_SUPPORTED is 3).
SOURCE = """
#include <string.h>
static int begun = 0;
int nvmlInit_v2(void) { begun++; return %(start)d; }
int nvmlShutdown(void) { begun--; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return begun == 1 ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = (void *)(0x7fff00000000 + i); return 0; }
static int second(void *device) { return (unsigned long)device & 1; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) {
  strncpy(name, second(device) ? "NVIDIA Thor" : "NVIDIA H100", size);
  return 0;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { *mw = 71250; return second(device) ? 3 : 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *c) { *c = 41; return sensor == 0 ? 0 : 2; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *mhz) { *mhz = 1410; return kind == 1 ? 0 : 2; }
int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned *mhz) {
  *mhz = 1980;
  return second(device) ? 3 : kind != 1;
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) { strncpy(version, "580.65.06", size); return begun != 1; }
"""


def library(folder: Path, start: int = 0) -> str:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    source, made = folder / "nvml.c", folder / "libnvml.so"
    source.write_text(SOURCE % {"start": start}, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", made, source], check=True)
    return str(made)


def test_every_gpu_is_read_and_what_is_not_told_is_none(tmp_path: Path) -> None:
    """Handles are wider than an int; the library is begun and ended each time."""
    path = library(tmp_path)
    due = [
        GpuReading("NVIDIA H100", 71250.0, 41.0, 1410.0, 1980.0),
        GpuReading("NVIDIA Thor", None, 41.0, 1410.0, None),
    ]
    assert read_gpus(path) == due
    assert read_gpus(path) == due
    assert driver_version(path) == "580.65.06"


def test_without_a_driver_or_gpus_there_is_nothing(tmp_path: Path) -> None:
    assert read_gpus("libnothing-of-the-kind.so.1") == []
    assert read_gpus("libc.so.6") == []  # a library, but another one
    unloaded = library(tmp_path, start=9)
    assert read_gpus(unloaded) == []
    for path in ("libnothing-of-the-kind.so.1", "libc.so.6", unloaded):
        assert driver_version(path) is None
