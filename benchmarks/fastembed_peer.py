"""fastembed as a contender of embedding_throughput.py, run by a Python that has it and not edgelm.

    python fastembed_peer.py FOLDER

FOLDER holds `minilm` as `prepare_fastembed` of peers.py lays it out. Batches and threads are fastembed's
defaults. Reads and answers requests as `edgelm.evaluate.contender` does.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType


def memory_mib() -> float:
    """Proportional set size of this process, MiB."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) / 1024


def open_model(folder: str) -> TextEmbedding:
    TextEmbedding.add_custom_model(
        model="minilm",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local"),  # not read: the files are at hand
        dim=384,
        model_file="model.onnx",
    )
    return TextEmbedding(
        "minilm",
        specific_model_path=folder,
        local_files_only=True,
        providers=["CPUExecutionProvider"],
    )


def main() -> None:
    model = open_model(sys.argv[1])

    def encode(texts: list[str]) -> np.ndarray:
        return np.stack(list(model.embed(texts)))

    for line in sys.stdin:
        request = json.loads(line)
        texts = request["texts"]
        if "save" in request:
            np.save(request["save"], encode(texts))
        latencies = []
        began = time.perf_counter()
        for batch in [[text] for text in texts] if request.get("single") else [texts]:
            start = time.perf_counter()
            encode(batch)
            latencies.append((time.perf_counter() - start) * 1e3)
        answer = {
            "seconds": time.perf_counter() - began,
            "latencies_ms": latencies,
            "memory_mib": memory_mib(),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
