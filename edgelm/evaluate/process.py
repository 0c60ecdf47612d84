"""The side of the latency suite that asks: a process for each contender, watched while it works."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from edgelm.errors import EdgelmError
from edgelm.evaluate.contender import memory_mib
from edgelm.runtimes.sensors import cpu_energy, power_rails, total_power
from edgelm.targets.board import ROOT

_EVERY_S = 0.1


class Process:
    """A process that runs one bundle or model.

    Attributes:
        name: What it opened.
        cold_start_ms: From its start to its first answer.
        about: What it says of the model.
    """

    def __init__(self, reference: str, threads: int | None, first: str) -> None:
        """Start it and have it answer one text.

        Raises:
            EdgelmError: The model cannot be opened.
        """
        self.name = reference
        command = [sys.executable, "-m", "edgelm.evaluate.contender", reference]
        if threads is not None:
            command.append(str(threads))
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.ask(texts=[first])
            self.cold_start_ms = (time.perf_counter() - began) * 1e3
            self.about = self.ask(describe=True)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """Have it do something, and give what it measured.

        Raises:
            EdgelmError: It refuses, or it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EdgelmError(
                f"The process that measures {self.name} ended (exit {self._process.wait()})."
            )
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EdgelmError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Meter:
    """Memory of a process and energy of the machine, while something is done in it.

    Attributes:
        memory_mib: Largest proportional set size seen, MiB; 0 where the system does not tell.
        joules: Energy that the machine took meanwhile: of its CPU packages by their
            counters, else by the power of its rails; None where there is no sensor.
    """

    def __init__(self, pid: int, root: Path = ROOT) -> None:
        """Watch a process; ``root`` is where the sensors' file system begins."""
        self.memory_mib = 0.0
        self.joules: float | None = None
        self._pid, self._root = pid, root
        self._watts: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._counter = cpu_energy(self._root)
        self._began = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.perf_counter() - self._began
        self._done.set()
        self._thread.join()
        self._sample()
        after = cpu_energy(self._root)
        if after is not None and self._counter is not None:
            self.joules = after - self._counter if after >= self._counter else None
        elif self._watts:
            self.joules = statistics.fmean(self._watts) * seconds

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        self.memory_mib = max(self.memory_mib, memory_mib(self._pid))
        power = total_power(power_rails(self._root))
        if power is not None:
            self._watts.append(power / 1e3)
