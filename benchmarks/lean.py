"""Start, memory and size of a bundle in edgelm, against a bare script on ONNX Runtime.

    python benchmarks/lean.py BUNDLE             # ratios, taking turns in one run
    python benchmarks/lean.py BUNDLE --soak 1000000

The bare script imports numpy, onnxruntime and tokenizers, and makes one vector of the same
graph with the same session options; nothing of edgelm is in it. `--soak` encodes texts for
as long as it takes and reads the memory of the process ten times.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path

import click

TEXT = "A man is playing a flute."
MEMORY = r"""
import re
def pss():
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"^Pss:\s+(\d+)", file.read(), re.M)[1]) / 1024
"""
SCRIPTS = {
    "bare": """
import sys
import numpy as np, onnxruntime as ort
from tokenizers import Tokenizer
folder = sys.argv[1]
options = ort.SessionOptions()
options.inter_op_num_threads = 1
options.log_severity_level = 3
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
tokens = Tokenizer.from_file(folder + "/tokenizer.json").encode(sys.argv[2])
feeds = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask, "token_type_ids": tokens.type_ids}
names = [i.name for i in session.get_inputs()]
vector = session.run(None, {n: np.array([feeds[n]], np.int64) for n in names})[0]
""",
    "edgelm": """
import sys
import edgelm
vector = edgelm.load(sys.argv[1]).encode([sys.argv[2]])
""",
}
TAIL = """
import time
print(time.time(), pss(), vector.shape[1])
"""
SOAK = """
import sys, time
import edgelm
model = edgelm.load(sys.argv[1])
count = int(sys.argv[2])
rest = [" ".join(f"word{i * 7919 % 9973} and {i * 31 % 811}" for _ in range(1 + i % 12)) for i in range(64)]
for part in range(10):
    for _ in range(max(1, count // (10 * len(rest)))):
        model.encode(rest)
    print(pss(), flush=True)
"""


def start(kind: str, bundle: Path, cache: str) -> tuple[float, float, float]:
    """Seconds from the start of a process to its first vector, MiB then, seconds of a core in all."""
    # As installed: with compiled modules, which a checkout need not have.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = MEMORY + SCRIPTS[kind] + TAIL
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle), TEXT],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ended, memory, _ = map(float, done.stdout.split())
    return ended - began, memory, worked


def installed_mib() -> dict[str, float]:
    """Size of edgelm and of what `edgelm[ort]` brings, by package."""
    wanted, sizes = ["edgelm", "onnxruntime"], {}
    while wanted:
        name = wanted.pop()
        if name in sizes:
            continue
        try:
            found = distribution(name)
        except ModuleNotFoundError:
            continue
        files = [Path(str(found.locate_file(f))) for f in found.files or ()]
        sizes[name] = sum(f.stat().st_size for f in files if f.is_file()) / 2**20
        for requirement in found.requires or ():
            if "extra ==" not in requirement:
                match = re.match(r"[\w.-]+", requirement)
                wanted += [match[0].lower()] if match else []
    return {name: round(size, 1) for name, size in sorted(sizes.items())}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--turns", default=7, show_default=True)
@click.option("--soak", type=int, help="Encode so many texts instead.")
@click.option("--sizes", is_flag=True, help="Sizes of the installed packages too.")
def main(bundle: Path, turns: int, soak: int | None, sizes: bool) -> None:
    """Print a JSON line."""
    if soak:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY + SOAK, str(bundle), str(soak)],
            check=True,
            capture_output=True,
            text=True,
        )
        mib = [round(float(line), 1) for line in done.stdout.split()]
        click.echo(json.dumps({"texts": soak, "pss_mib": mib}))
        return
    rows: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in SCRIPTS}
    with tempfile.TemporaryDirectory() as cache:
        for turn in range(turns + 1):
            for kind in SCRIPTS:
                found = start(kind, bundle, cache)
                if turn:  # the first fills the caches
                    rows[kind].append(found)
    result: dict[str, object] = {}
    for kind, found_rows in rows.items():
        seconds, memory, worked = zip(*found_rows, strict=True)
        result[f"{kind}_start_s"] = round(statistics.median(seconds), 3)
        result[f"{kind}_least_s"] = round(min(seconds), 3)
        result[f"{kind}_processor_s"] = round(statistics.median(worked), 3)
        result[f"{kind}_pss_mib"] = round(statistics.median(memory), 1)
    both = list(zip(rows["bare"], rows["edgelm"], strict=True))
    for name, i in (("start_ratio", 0), ("processor_ratio", 2)):
        ratio = statistics.median(e[i] / b[i] for b, e in both)
        result[name] = round(ratio, 2)
    if sizes:
        result["installed_mib"] = installed_mib()
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
