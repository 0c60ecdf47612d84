"""NVML through a real library: a stand-in with nvml.h's own symbols."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edgelm.runtimes.nvml import GpuReading, read_gpus

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
        GpuReading("NVIDIA H100", 71250.0, 41.0),
        GpuReading("NVIDIA Thor", None, 41.0),
    ]
    assert read_gpus(path) == due
    assert read_gpus(path) == due


def test_without_a_driver_or_gpus_there_is_nothing(tmp_path: Path) -> None:
    assert read_gpus("libnothing-of-the-kind.so.1") == []
    assert read_gpus("libc.so.6") == []  # a library, but another one
    assert read_gpus(library(tmp_path, start=9)) == []  # the driver is not loaded
