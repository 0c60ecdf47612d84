"""Readers of boards: recorded trees and recorded lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgelm.runtimes.sensors import (
    Clock,
    device_state,
    read_tegrastats,
    swap_mib,
    total_power,
)
from tests.boards import lay_out


def test_an_orin_nano(tmp_path: Path) -> None:
    state = device_state(lay_out("orin-nano-super", tmp_path))
    assert (state.power_mode, state.power_mode_id) == ("MAXN_SUPER", 2)
    assert state.gpu_clock == Clock(306.0, 306.0, 1020.0)
    assert state.power_mw["VDD_CPU_GPU_CV"] == pytest.approx(4960 * 1784 / 1000)
    assert state.total_mw == pytest.approx(4968 * 1520 / 1000)
    assert state.temperatures_c["gpu-thermal"] == 50.468


def test_an_agx_orin_without_an_input_rail_adds_its_rails(tmp_path: Path) -> None:
    state = device_state(lay_out("agx-orin", tmp_path))
    assert set(state.power_mw) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}  # fmt: skip
    assert state.total_mw == pytest.approx(sum(state.power_mw.values()))


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    state = device_state(tmp_path)
    assert (state.power_mode, state.power_mode_id, state.gpu_clock) == (None,) * 3
    assert (state.power_mw, state.temperatures_c, state.total_mw) == ({}, {}, None)


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    lay_out("orin-nano-super", tmp_path)
    (tmp_path / "sys/class/hwmon/hwmon1/in1_input").write_text("n/a\n", "utf-8")
    (tmp_path / "sys/class/thermal/thermal_zone1/temp").unlink()
    state = device_state(tmp_path)
    assert set(state.power_mw) == {"VDD_CPU_GPU_CV", "VDD_SOC"}
    assert "gpu-thermal" not in state.temperatures_c


def test_swap_in_memory_and_on_disk(tmp_path: Path) -> None:
    assert swap_mib(lay_out("orin-nano-super", tmp_path)) == {"/dev/zram0": 634}
    assert swap_mib(lay_out("orin-nx-16", tmp_path)) == {"/swapfile": 8191}


NANO = (
    "03-09-2026 14:12:52 RAM 1905/7620MB (lfb 36x4MB) SWAP 320/12002MB (cached 20MB) CPU [0%@729,0%@729,off,off] "
    "GR3D_FREQ 37% cpu@46.125C soc2@45.843C gpu@45.062C tj@46.125C VDD_IN 4742mW/4700mW "
    "VDD_CPU_GPU_CV 482mW/480mW VDD_SOC 1446mW/1446mW"
)
R39 = (
    "09-01-2026 09:25:18 RAM 5739/7546MB (lfb 1x2MB) SWAP 2047/2048MB (cached 209MB) CPU [72%@1728,75%@1728] "
    "GR3D_FREQ 33% cpu@50C/50C gpu@48.75C/48.75C tj@50C/50C VDD_IN 9761mW/9761mW/9761mW "
    "VDD_CPU_GPU_CV 4238mW/4238mW/4238mW"
)
AGX = (
    "RAM 3000/30000MB (lfb 1x1MB) SWAP 0/15000MB CPU [1%@2201] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305] CV0@-256C "
    "VDD_GPU_SOC 4876mW/4876mW VDD_CPU_CV 975mW/975mW VIN_SYS_5V0 4461mW/4461mW"
)
OLD = "RAM 2448/3964MB (lfb 39x4MB) CPU [4%@102] GR3D_FREQ 12% PLL@23C GPU@22.5C POM_5V_IN 1532/1532 POM_5V_GPU 0/0"


@pytest.mark.parametrize(
    ("line", "ram", "gpu", "total", "zone"),
    [
        (NANO, 1905, 37, 4742.0, ("tj", 46.125)),
        (R39, 5739, 33, 9761.0, ("gpu", 48.75)),
        (AGX, 3000, 0, 10312.0, None),
        (OLD, 2448, 12, 1532.0, ("GPU", 22.5)),
    ],
)
def test_lines_of_tegrastats(line: str, ram: int, gpu: int, total: float, zone: Any) -> None:  # fmt: skip
    read = read_tegrastats(line)
    assert read is not None
    assert (read.ram_mib, read.gpu_percent) == (ram, gpu)
    assert total_power(read.power_mw) == total
    assert zone is None or read.temperatures_c[zone[0]] == zone[1]
    assert "CV0" not in read.temperatures_c


@pytest.mark.parametrize("line", ["", "NVPM WARN", "RAM ?"])
def test_other_lines_are_none(line: str) -> None:
    assert read_tegrastats(line) is None
