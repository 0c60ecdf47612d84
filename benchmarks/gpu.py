"""What an NVIDIA GPU does with edgelm's graphs and 2:4 layers: parity and speed, in one run.

    python benchmarks/gpu.py -o gpu.json
    python benchmarks/gpu.py -o cpu.json --device cpu --tokens 64 --shapes 512x512

Three parts, each written to the file as soon as it is done:

- compress: `edgelm compress MODEL --sparsity 2:4` on the CPU and on the device; masks, outputs, seconds;
- graphs: MODEL exported in every precision, in ONNX Runtime on its CUDA provider; parity with the golden
  examples, the ms of a batch in turns, and the operators that ran on the CPU in spite of it;
- layers: a 2:4 weight of every shape of MODEL's layers, as compressed, and some of a language model's, in torch:
  dense against cuSPARSELt.

What cannot run is a row that says why. `--device cpu` does what a CPU can do of it.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from gpu_tables import tables
from numpy.typing import NDArray
from sparse_products import EXACT_DB, WARM_UP, layer_rows, layer_weights, weights

from edgelm.bundle import Bundle
from edgelm.calibration import Calibration
from edgelm.compress import Sparsify
from edgelm.doctor import examine
from edgelm.errors import EdgelmError
from edgelm.export import export
from edgelm.export.exporter import golden_examples
from edgelm.golden import load_golden
from edgelm.metrics import cosine, snr_db
from edgelm.models import load_model
from edgelm.pipeline import compress_model
from edgelm.recipe import Recipe
from edgelm.runtimes.engine import Engine, chosen_provider, open_engine
from edgelm.runtimes.nvml import driver_version, read_gpus
from edgelm.runtimes.session import OnnxSession
from edgelm.runtimes.verification import measure_snr
from edgelm.targets import load_target

Row = dict[str, Any]
Array = NDArray[np.float32]
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# The first that has the precision; where both have it, their graphs are the same bytes.
TARGETS = ("nvidia-gpu", "nvidia-gpu-sm80")


def missing() -> str:
    """What a run on a GPU lacks here, each with its remedy; empty if nothing."""
    found = []
    if torch.version.cuda is None:
        found.append(
            f"torch {torch.__version__} is built without CUDA (install one with it: pytorch.org/get-started)"
        )
    elif not torch.cuda.is_available():
        found.append(
            f"torch {torch.__version__} finds no CUDA {torch.version.cuda} device (does nvidia-smi list one?)"
        )
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        found.append(
            f"ONNX Runtime {onnxruntime.__version__} has no {PROVIDERS['cuda']} "
            "(pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]')"
        )
    found += [
        f"{f.what}: {f.found} ({f.fix})"
        for f in examine()
        if f.what in ("ONNX Runtime", PROVIDERS["cuda"]) and f.state == "broken"
    ]
    return "; ".join(found)


def about(device: str) -> Row:
    """The machine and the versions."""
    found: Row = {
        "device": platform.processor() or platform.machine(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime CUDA": getattr(onnxruntime, "cuda_version", "") or None,
        "edgelm": metadata.version("edgelm"),
        "driver": driver_version(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        sparse = torch.backends.cusparselt
        found |= {
            "device": torch.cuda.get_device_name(),
            "compute capability": ".".join(
                map(str, torch.cuda.get_device_capability())
            ),
            "cuDNN": torch.backends.cudnn.version(),
            "cuSPARSELt": sparse.version() if sparse.is_available() else None,
        }
    return found


def clocks() -> list[Row]:
    """Clock, power and temperature of every GPU, as NVML tells them now."""
    return [asdict(gpu) for gpu in read_gpus()]


# --- compress ---------------------------------------------------------------------------


def compress_parts(model: str, texts: int, device: str, work: Path) -> Row:
    """The same compression on the CPU and on the device; checkpoints in ``work``."""
    recipe = Recipe(Calibration(max_texts=texts), (Sparsify(sparsity="2:4"),))
    seconds: dict[str, float] = {}
    made = {}
    for name, on in (("cpu", "cpu"), ("device", device)):
        report = compress_model(model, recipe, work / name, device=on)
        seconds[name] = report.cost["seconds"]
        made[name] = load_model(str(work / name))
    mine, other = (weights(made[name]) for name in ("cpu", "device"))
    equal = sum(int(((mine[n] != 0) == (other[n] != 0)).sum()) for n in mine)
    due, found = (
        [e.output for e in golden_examples(made[name])] for name in ("cpu", "device")
    )
    return {
        "model": model,
        "texts": texts,
        "equal_mask": equal / sum(w.numel() for w in mine.values()),
        "seconds": seconds,
        **agreement(due, found),
    }


def agreement(due: Sequence[Array], found: Sequence[Array]) -> Row:
    """Of one output a text: signal to noise over all, cosines of each."""
    pairs = [
        (a.reshape(1, -1), b.reshape(1, -1)) for a, b in zip(due, found, strict=True)
    ]
    alike = [float(cosine(a, b)[0]) for a, b in pairs]
    flat = (np.concatenate([pair[i][0] for pair in pairs]) for i in (0, 1))
    return {
        "examples": len(pairs),
        "db": min(snr_db(*flat), EXACT_DB),
        "mean_cosine": float(np.mean(alike)),
        "least_cosine": min(alike),
    }


# --- graphs -----------------------------------------------------------------------------


class Placed(OnnxSession):
    """A session that tells where its operators ran."""

    def __init__(self, graph: Path, provider: str, work: Path) -> None:
        self._work = work
        super().__init__(graph, provider)

    def _options(self, ort: Any, threads: int | None) -> Any:
        options = super()._options(ort, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(self._work / "profile")
        return options

    def placement(self) -> dict[str, dict[str, int]]:
        """Operators by provider and kind, over all calls so far."""
        events = json.loads(Path(self._session.end_profiling()).read_text("utf-8"))
        found: dict[str, Counter[str]] = {}
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                where = event["args"].get("provider") or "unknown"
                found.setdefault(where, Counter())[event["args"]["op_name"]] += 1
        return {where: dict(kinds.most_common()) for where, kinds in found.items()}


def batch(bundle: Bundle, rows: int, length: int, words: int) -> dict[str, Any]:
    """Inputs of one shape, full of random tokens."""
    ids = np.random.default_rng(0).integers(0, words, (rows, length), np.int64)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return {
        t.name: given.get(t.name, np.zeros_like(ids))
        for t in bundle.manifest.graph.inputs
    }


def graph_rows(
    model: str, texts: int, device: str, shapes: list[Any], rounds: int, work: Path
) -> list[Row]:
    """A row for each precision: parity and the ms of each shape."""
    provider = PROVIDERS[device]
    rows: list[Row] = []
    opened: list[tuple[Row, Engine, Bundle]] = []
    for precision in PRECISIONS:
        target = next(t for t in TARGETS if precision in load_target(t).precisions)
        row: Row = {"precision": precision, "target": target, "ms": {}}
        rows.append(row)
        try:
            bundle = export(
                load_model(model),
                target,
                work / precision,
                precision=precision,
                calibration=Calibration(max_texts=texts, max_tokens=128),
            )
            # What a bundle would run on unasked; none but a CPU may be at hand.
            row["chosen"] = reason_of(lambda b=bundle: chosen_provider(b, None))
            engine = open_engine(bundle, provider=provider)
            row |= parity(engine, bundle)
            opened.append((row, engine, bundle))
            if device == "cuda" and precision == "fp32":
                # What ONNX Runtime does where nobody asks for float32.
                row = {"precision": "fp32 in TF32", "target": target, "ms": {}}
                rows.append(row)
                session = OnnxSession(bundle.file(bundle.manifest.graph.file), provider)
                engine = open_engine(bundle, session=session)
                row |= parity(engine, bundle)
                opened.append((row, engine, bundle))
        except Exception as error:  # ONNX Runtime's own have no common base
            row["reason"] = str(error)
    for rows_, length in shapes:
        time_shape(opened, rows_, length, rounds)
    for row, engine, bundle in opened:
        try:
            placed = Placed(bundle.file(bundle.manifest.graph.file), provider, work)
            placed.run(batch(bundle, 2, 8, engine.tokenizer.get_vocab_size()))
            row["operators"] = placed.placement()
        except Exception as error:  # as above
            row["operators_reason"] = str(error)
    return rows


def reason_of(act: Callable[[], str]) -> str:
    """What a call gives, or why it refuses."""
    try:
        return act()
    except EdgelmError as error:
        return str(error)


def parity(engine: Engine, bundle: Bundle) -> Row:
    """Agreement with the original model's float32 answers."""
    examples = load_golden(bundle)
    measure_snr(engine, examples)  # refuses other tokens, and what is not finite
    pairs = [str(e.pair) for e in examples if e.pair is not None]
    found = engine.run(engine.tokenize([e.text for e in examples], pairs or None))
    return {
        "provider": engine.session.provider,
        "graph": bundle.manifest.files[bundle.manifest.graph.file].sha256,
        **agreement([e.output for e in examples], found),
    }


def time_shape(
    opened: list[tuple[Row, Engine, Bundle]], rows: int, length: int, rounds: int
) -> None:
    """Time one shape in all graphs, in turns; the p50 goes into their rows."""
    key = f"{rows}x{length}"
    times: dict[int, list[float]] = {i: [] for i in range(len(opened))}
    fp32 = next((i for i in times if opened[i][0]["precision"] == "fp32"), None)
    for turn in range(WARM_UP + rounds):
        for i in list(times):
            row, engine, bundle = opened[i]
            feeds = batch(bundle, rows, length, engine.tokenizer.get_vocab_size())
            longest = bundle.manifest.tokenizer.max_length
            try:
                if length > longest:
                    raise ValueError(f"the model takes {longest} tokens")
                began = time.perf_counter()
                engine.session.run(feeds)
                took = time.perf_counter() - began
            except Exception as error:  # ONNX Runtime's own have no common base
                row["ms"][key] = {"reason": str(error)}
                del times[i]
                continue
            if turn >= WARM_UP:
                times[i].append(took)
    for i, found in times.items():
        against = [] if fp32 is None else times.get(fp32, [])
        speed = (
            median(a / b for a, b in zip(against, found, strict=True))
            if against
            else None
        )
        opened[i][0]["ms"][key] = {
            "p50": median(found) * 1e3,
            "times_as_fast_as_fp32": speed,
        }


# --- the command ------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """Read ``1,8,64``."""
    return [int(part) for part in text.split(",") if part]


@click.command()
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
@click.option("--model", default="minilm", show_default=True)
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True
)
@click.option("--batches", default="1,8,64", show_default=True)
@click.option("--lengths", default="32,128", show_default=True)
@click.option("--tokens", default="64,256,1024,4096,16384", show_default=True)
@click.option(
    "--shapes",
    default="4096x4096,4096x11008,11008x4096",
    show_default=True,
    help="Layers besides the model's, outputs x inputs.",
)
@click.option("--rounds", default=20, show_default=True)
@click.option("--texts", default=256, show_default=True, help="Calibration texts.")
def main(
    output: Path,
    model: str,
    device: str,
    batches: str,
    lengths: str,
    tokens: str,
    shapes: str,
    rounds: int,
    texts: int,
) -> None:
    """Measure, write JSON and print Markdown."""
    if device == "cuda" and (lacking := missing()):
        raise click.ClickException(
            f"This needs an NVIDIA GPU that torch and ONNX Runtime can use: {lacking}."
        )
    result: Row = {"device": device, "about": about(device), "rounds": rounds}

    def keep(part: str, found: Any) -> None:
        result[part] = found
        result.setdefault("gpus", {})[part] = clocks()
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        click.echo(f"{part}: done", err=True)

    sizes = [(b, length) for b in numbers(batches) for length in numbers(lengths)]
    others = [tuple(map(int, s.split("x"))) for s in shapes.split(",") if s]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            found = compress_parts(model, texts, device, work)
        except (EdgelmError, RuntimeError) as error:
            found = {"reason": str(error)}
        keep("compress", found)
        with torch.no_grad():
            chosen = layer_weights(work / "cpu", others)  # type: ignore[arg-type]
            keep("layers", layer_rows(chosen, device, numbers(tokens), rounds))
        keep("graphs", graph_rows(model, texts, device, sizes, rounds, work))
    click.echo(tables(result))


if __name__ == "__main__":
    main()
