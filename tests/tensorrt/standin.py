"""A session on an engine that is none: `python standin.py LIBRARY [broken]` prints what it computed, as JSON.

polygraphy and TensorRT's Python modules are the real ones; the CUDA runtime is a C library whose device is the host,
which records graphs and replays them as CUDA does: with the addresses and shapes of the recording. In the place of an
engine stands a class that doubles ids and sums them under the mask.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from edgelm.errors import InputError
from edgelm.runtimes.tensorrt.plan import BuildPlan, Profile
from edgelm.runtimes.tensorrt.session import TensorRtSession

WORK = ctypes.CFUNCTYPE(None)
KINDS = {
    "input_ids": trt.int64,
    "attention_mask": trt.int64,
    "tokens": trt.float32,
    "total": trt.float32,
}


class Engine:
    """What `TensorRtSession` asks of an engine."""

    num_io_tensors, num_optimization_profiles, device_memory_size_v2 = 4, 2, 1000

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.contexts = library, list[Context]()

    def get_tensor_name(self, i: int) -> str:
        return list(KINDS)[i]

    def get_tensor_mode(self, name: str) -> Any:
        return (
            trt.TensorIOMode.INPUT
            if KINDS[name] == trt.int64
            else trt.TensorIOMode.OUTPUT
        )

    def get_tensor_dtype(self, name: str) -> Any:
        return KINDS[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (
            (-1, 1) if name == "total" else (-1, -1, 2)[: 3 if name == "tokens" else 2]
        )

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self.library))
        return self.contexts[-1]


class Context:
    """Its scratch memory is written by every run, as by real kernels."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.shapes, self.addresses = library, {}, {}  # type: ignore[var-annotated]
        self.profile, self.scratch, self.kept = -1, 0, list[Any]()

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= 1000
        self.scratch = memory

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream != 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return 1 <= shape[1] <= 8 if self.profile == 0 else 9 <= shape[1] <= 16

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, length = self.shapes["input_ids"]
        return (batch, 1) if name == "total" else (batch, length, 2)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        arrays = {}
        for name, address in self.addresses.items():
            shape = self.shapes.get(name) or self.get_tensor_shape(name)
            kind = np.dtype(trt.nptype(KINDS[name]))
            buffer = (
                ctypes.c_char * (int(np.prod(shape)) * kind.itemsize)
            ).from_address(address)
            arrays[name] = np.ndarray(shape, kind, buffer=buffer)
        scratch = self.scratch

        def work() -> None:
            ctypes.memset(scratch, 1, 1000)
            ids, mask = arrays["input_ids"], arrays["attention_mask"]
            arrays["tokens"][...] = np.stack([2 * ids, mask], axis=-1)
            arrays["total"][...] = (ids * mask).sum(axis=1, keepdims=True)

        self.kept.append(WORK(work))
        return self.library.launch(self.kept[-1]) == 0


def main() -> None:
    """Rows of many shapes, in turns and alone."""
    library = ctypes.CDLL(sys.argv[1])
    if sys.argv[2:] == ["broken"]:
        library.break_captures()
    engine = Engine(library)

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, data: bytes) -> Engine:
            return engine

    trt.Runtime = Runtime
    profiles = (Profile((1, 1), (1, 8), (4, 8)), Profile((1, 9), (1, 16), (4, 16)))
    plan = BuildPlan(
        1,
        "g",
        ("input_ids", "attention_mask"),
        "fp16",
        True,
        profiles,
        64,
        3,
        (),
        "8.7",
    )
    session = TensorRtSession(Path(__file__), plan, workers=2)
    draw, wrong = np.random.default_rng(0), []
    shapes = [
        (1, 5),
        (1, 8),
        (3, 7),
        (1, 2),
        (1, 12),
        (9, 16),
        (1, 16),
        (1, 5),
        (2, 9),
        (1, 9),
    ] * 3
    for batch, length in shapes:
        ids = draw.integers(1, 99, (batch, length))
        mask = (draw.random((batch, length)) < 0.8).astype(np.int64)
        found = session.run({"input_ids": ids, "attention_mask": mask})
        tokens = np.stack([2 * ids, mask], axis=-1).astype(np.float32)
        if not np.array_equal(found["tokens"], tokens):
            wrong.append(["tokens", batch, length])
        if not np.array_equal(found["total"], (ids * mask).sum(axis=1, keepdims=True)):
            wrong.append(["total", batch, length])
    try:
        session.run(
            {
                "input_ids": np.ones((1, 17), np.int64),
                "attention_mask": np.ones((1, 17), np.int64),
            }
        )
    except InputError as error:
        wrong += [] if "1 to 16 tokens" in str(error) else [str(error)]
    launches = ctypes.c_int.in_dll(library, "launches").value
    held = ctypes.c_int.in_dll(library, "pinned").value
    contexts = len(engine.contexts)
    scratch = len({context.scratch for context in engine.contexts})
    del session
    left = ctypes.c_int.in_dll(library, "pinned").value
    print(
        json.dumps(
            {
                "wrong": wrong,
                "launches": launches,
                "contexts": contexts,
                "scratch": scratch,
            }
            | {"pinned": [held, left], "alone": sum(batch == 1 for batch, _ in shapes)}
        )
    )


if __name__ == "__main__":
    main()
