"""What a board says of itself while it works: power mode, power, clocks, temperatures, swap.

Everything is read below ``root`` from files that need no privileges; tegrastats' lines are read too, for logs.
Where there is no board's monitor, the driver of an NVIDIA card tells of the card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.runtimes.nvml import read_gpus
from edgelm.targets.board import ROOT, read_text

# Rails that hold the whole module's or board's input; without one, the rails add up.
_TOTALS = ("VDD_IN", "POM_5V_IN")


@dataclass(frozen=True)
class Clock:
    """The GPU's clock, MHz: now, and the limits that the governor keeps to."""

    now: float
    least: float
    most: float

    @property
    def locked(self) -> bool:
        """Whether it cannot change, as after ``jetson_clocks``."""
        return self.least == self.most


@dataclass(frozen=True)
class CpuClock:
    """The first core's clock, MHz, and who sets it; None for what the system does not tell.

    Attributes:
        governor: The kernel's governor, such as ``performance``.
        now: At this moment.
        least: Lower limit.
        most: Upper limit.
    """

    governor: str | None
    now: float | None
    least: float | None
    most: float | None


@dataclass(frozen=True)
class DeviceState:
    """A board at one moment.

    Attributes:
        power_mode: Name of the power mode (nvpmodel); None if it has none or tells none.
        power_mode_id: Its number.
        gpu_clock: The GPU's clock, if the board tells it.
        power_mw: Power by rail, mW, from the INA3221 monitors; without any, of each NVIDIA card.
        temperatures_c: By thermal zone, and of each such card, degrees Celsius.
    """

    power_mode: str | None
    power_mode_id: int | None
    gpu_clock: Clock | None
    power_mw: Mapping[str, float]
    temperatures_c: Mapping[str, float]

    @property
    def total_mw(self) -> float | None:
        """Power of the module, mW: its input rail, else the sum of its rails; or of the cards alone."""
        return total_power(self.power_mw)


def device_state(root: Path = ROOT) -> DeviceState:
    """Read everything that a board tells.

    Args:
        root: Where its file system begins.
    """
    number, name = power_mode(root)
    rails, zones = power_rails(root), temperatures(root)
    if not rails and root == ROOT:
        for i, gpu in enumerate(read_gpus()):
            if gpu.power_mw is not None:
                rails[f"{gpu.name} ({i})"] = gpu.power_mw
            if gpu.temperature_c is not None:
                zones[f"{gpu.name} ({i})"] = gpu.temperature_c
    return DeviceState(name, number, gpu_clock(root), rails, zones)


def power_mode(root: Path = ROOT) -> tuple[int | None, str | None]:
    """Number and name of the power mode; None where the board does not tell."""
    status = read_text(root / "var" / "lib" / "nvpmodel" / "status")
    found = re.search(r"pmode:\s*(\d+)", status)
    if found is None:
        return None, None
    number = int(found[1])
    table = read_text(root / "etc" / "nvpmodel.conf")
    names = dict(re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=([^\s>]+)", table))
    return number, names.get(str(number))


def power_rails(root: Path = ROOT) -> dict[str, float]:
    """Power of each rail that an INA3221 watches, mW: millivolts times milliamperes."""
    rails = {}
    for folder in _numbered(root / "sys" / "class" / "hwmon"):
        if read_text(folder / "name").strip() != "ina3221":
            continue
        for label in sorted(folder.glob("in*_label")):
            number = label.name.removeprefix("in").removesuffix("_label")
            name = read_text(label).strip()
            millivolts = _number(folder / f"in{number}_input")
            milliamperes = _number(folder / f"curr{number}_input")
            if name and name != "NC" and None not in (millivolts, milliamperes):
                assert millivolts is not None
                assert milliamperes is not None
                rails[name] = millivolts * milliamperes / 1000
    return rails


def total_power(rails: Mapping[str, float]) -> float | None:
    """Power of the module, mW; None without any rail."""
    for name in _TOTALS:
        if name in rails:
            return rails[name]
    return sum(rails.values()) if rails else None


def gpu_clock(root: Path = ROOT) -> Clock | None:
    """The GPU's clock, if the board tells it."""
    for folder in sorted((root / "sys" / "class" / "devfreq").glob("*")):
        kind = folder.name.rsplit(".", 1)[-1]
        if kind not in ("gpu", "ga10b", "gv11b", "gpu-gpc-0"):
            continue
        values = [_number(folder / f"{n}_freq") for n in ("cur", "min", "max")]
        if None not in values:
            return Clock(*(value / 1e6 for value in values if value is not None))
    return None


def cpu_clock(root: Path = ROOT) -> CpuClock:
    """The first core's clock and governor, as cpufreq tells; else its clock of ``/proc/cpuinfo``."""
    folder = root / "sys" / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    khz = {
        name: _number(folder / name)
        for name in ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq")
    }
    now, least, most = (None if v is None else v / 1e3 for v in khz.values())
    if now is None:
        found = re.search(
            r"^cpu MHz\s*:\s*([\d.]+)",
            read_text(root / "proc" / "cpuinfo"),
            re.MULTILINE,
        )
        now = float(found[1]) if found else None
    governor = read_text(folder / "scaling_governor").strip()
    return CpuClock(governor or None, now, least, most)


def cpu_energy(root: Path = ROOT) -> float | None:
    """Joules that the CPU packages took since some moment; None where the counters cannot be read.

    The counters (RAPL) begin anew now and then: a difference below 0 says nothing.
    """
    folder = root / "sys" / "class" / "powercap"
    found = [
        joules / 1e6
        for path in sorted(folder.glob("intel-rapl:*/energy_uj"))
        if path.parent.name.count(":") == 1 and (joules := _number(path)) is not None
    ]
    return sum(found) if found else None


def temperatures(root: Path = ROOT) -> dict[str, float]:
    """Temperature by thermal zone, degrees Celsius."""
    found = {}
    for folder in _numbered(root / "sys" / "class" / "thermal"):
        name, value = read_text(folder / "type").strip(), _number(folder / "temp")
        if folder.name.startswith("thermal_zone") and name and value is not None:
            found[name] = value / 1000
    return found


def swap_mib(root: Path = ROOT) -> dict[str, int]:
    """Size of each swap area, MiB, by name; ``/dev/zram*`` lies in memory itself."""
    lines = read_text(root / "proc" / "swaps").split("\n")[1:]
    rows = [line.split() for line in lines if len(line.split()) >= 3]
    return {row[0]: int(row[2]) // 1024 for row in rows if row[2].isdigit()}


@dataclass(frozen=True)
class Tegrastats:
    """One line of tegrastats.

    Attributes:
        ram_mib: Memory in use.
        gpu_percent: Load of the GPU, if the line has it.
        power_mw: Power by rail at that moment, mW.
        temperatures_c: By zone, degrees Celsius.
    """

    ram_mib: int
    gpu_percent: int | None
    power_mw: Mapping[str, float]
    temperatures_c: Mapping[str, float]


def read_tegrastats(line: str) -> Tegrastats | None:
    """Read a line of tegrastats of any release; None if it is none.

    A rail is ``NAME now/average`` (``mW`` behind each since JetPack 5); of the two the
    present one is taken. A sensor that reads nothing (``-256C``) is left out.
    """
    ram = re.search(r"\bRAM (\d+)/\d+MB", line)
    if ram is None:
        return None
    gpu = re.search(r"\bGR3D_FREQ (\d+)%", line)
    rails = re.findall(r"\b((?:VDD|VIN|POM)\w*) (\d+)(?:mW)?/\d+", line)
    zones = re.findall(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C", line)
    return Tegrastats(
        int(ram[1]),
        int(gpu[1]) if gpu else None,
        {name: float(value) for name, value in rails},
        {name: float(value) for name, value in zones if float(value) > -200},
    )


def _numbered(folder: Path) -> list[Path]:
    """Folders such as ``hwmon10``, by their number."""

    def key(path: Path) -> tuple[str, int]:
        digits = re.search(r"(\d+)$", path.name)
        return path.name.rstrip("0123456789"), int(digits[1]) if digits else 0

    return sorted(folder.glob("*"), key=key)


def _number(path: Path) -> float | None:
    try:
        return float(read_text(path).strip())
    except ValueError:
        return None
