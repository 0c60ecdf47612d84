"""edgelm's embedding bundles against its peers, on the same texts, taking turns in one run.

    pip install openvino nncf sentence-transformers
    python benchmarks/embedding_throughput.py --work peers --texts texts.txt --stsb stsb/test.jsonl -o peers.json

Every contender runs in a process of its own, is given raw texts and gives vectors; tokenisation and pooling are inside
the clock. Peers run `minilm` in the best setting that their documents describe:

- sentence-transformers: PyTorch float32, batches of 32 by length (its default).
- torch int8: the same with `torch.ao.quantization.quantize_dynamic` of the linear layers.
- OpenVINO: converted by `openvino.convert_model`, from PyTorch or from the ONNX graph
  below; float32 means its default for the CPU (bfloat16 where
  the CPU computes in it), int8 is NNCF post-training quantisation with the transformer preset; 32 texts a batch by
  length, an asynchronous request for each core.
- ONNX Runtime: `torch.onnx.export` and `quantize_dynamic` per channel; 32 texts a batch by length, all cores.

edgelm's bundles are made with its commands; `balanced` has half the feed-forward neurons and int8.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from edgelm.calibration import Calibration, load_texts, read_texts
from edgelm.evaluate.contender import answer
from edgelm.models import locate

Encode = Callable[[Sequence[str]], np.ndarray]
CORES = len(os.sched_getaffinity(0))
EDGELM = {  # name: model, target, precision
    "edgelm fp32 (ONNX Runtime)": ("minilm", "cpu", "fp32"),
    "edgelm half, fp32 (ONNX Runtime)": ("half", "cpu", "fp32"),
    "edgelm int8 (ONNX Runtime)": ("minilm", "cpu", "int8"),
    "edgelm int8 (OpenVINO)": ("minilm", "cpu-openvino", "int8"),
    "edgelm balanced (ONNX Runtime)": ("half", "cpu", "int8"),
    "edgelm balanced (OpenVINO)": ("half", "cpu-openvino", "int8"),
}
DENSE = "sentence-transformers fp32"


# Peers ------------------------------------------------------------------------------------


def sentence_transformers(work: Path) -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(locate("minilm")), device="cpu")
    return lambda texts: np.asarray(model.encode(list(texts)))


def torch_int8(work: Path) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(locate("minilm")), device="cpu")
    torch.ao.quantization.quantize_dynamic(
        model, {torch.nn.Linear}, torch.qint8, inplace=True
    )
    return lambda texts: np.asarray(model.encode(list(texts)))


def openvino_fp32(work: Path) -> Encode:
    return _openvino(work / "openvino-fp32.xml")


def openvino_int8(work: Path) -> Encode:
    return _openvino(work / "openvino-int8.xml")


def openvino_int8_onnx(work: Path) -> Encode:
    return _openvino(work / "openvino-int8-onnx.xml")


def onnxruntime_fp32(work: Path) -> Encode:
    return _onnxruntime(work / "onnxruntime-fp32.onnx")


def onnxruntime_int8(work: Path) -> Encode:
    return _onnxruntime(work / "onnxruntime-int8.onnx")


PEERS: dict[str, tuple[Callable[[Path], Encode], str]] = {  # and its file
    DENSE: (sentence_transformers, ""),
    "torch int8": (torch_int8, ""),
    "OpenVINO fp32": (openvino_fp32, "openvino-fp32.bin"),
    "OpenVINO int8": (openvino_int8, "openvino-int8.bin"),
    "OpenVINO int8, by way of ONNX": (
        openvino_int8_onnx,
        "openvino-int8-onnx.bin",
    ),
    "ONNX Runtime fp32": (onnxruntime_fp32, "onnxruntime-fp32.onnx"),
    "ONNX Runtime int8": (onnxruntime_int8, "onnxruntime-int8.onnx"),
}


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate("minilm"))


def _tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    return dict(
        tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="np",
        )
    )


def _pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = mask[..., None].astype(np.float32)
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def _chunks(texts: Sequence[str]) -> list[np.ndarray]:
    order = np.argsort([-len(text) for text in texts], kind="stable")
    return [order[i : i + 32] for i in range(0, len(order), 32)]


def _openvino(path: Path) -> Encode:
    import openvino

    model = openvino.Core().compile_model(
        str(path), "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": CORES}
    )
    single = openvino.Core().compile_model(
        str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"}
    )
    tokenizer = _tokenizer()

    def encode(texts: Sequence[str]) -> np.ndarray:
        if len(texts) == 1:
            feeds = _tokens(tokenizer, texts)
            return _pool(single(feeds)[0], feeds["attention_mask"])
        rows = np.zeros((len(texts), 384), np.float32)

        def done(request: Any, given: tuple[np.ndarray, np.ndarray]) -> None:
            rows[given[0]] = _pool(request.get_output_tensor(0).data, given[1])

        requests = openvino.AsyncInferQueue(model, CORES)
        requests.set_callback(done)
        for chunk in _chunks(texts):
            feeds = _tokens(tokenizer, [texts[i] for i in chunk])
            requests.start_async(feeds, (chunk, feeds["attention_mask"]))
        requests.wait_all()
        return rows

    return encode


def _onnxruntime(path: Path) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    tokenizer = _tokenizer()

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 384), np.float32)
        for chunk in _chunks(texts):
            feeds = _tokens(tokenizer, [texts[i] for i in chunk])
            hidden = session.run(None, feeds)[0]
            rows[chunk] = _pool(hidden, feeds["attention_mask"])
        return rows

    return encode


# Preparation ------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Make the files of all contenders that are not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "half").exists():
        _edgelm("compress", "minilm", "-o", str(work / "half"), "--preset", "balanced")
    for name, (model, target, precision) in EDGELM.items():
        bundle = work / name
        if not bundle.exists():
            source = model if model == "minilm" else str(work / model)
            options = ["--target", target, "--precision", precision]
            _edgelm("export", source, *options, "-o", str(bundle))
    if not (work / "onnxruntime-int8.onnx").exists():
        _prepare_onnxruntime(work)
    if not (work / "openvino-int8-onnx.xml").exists():
        _prepare_openvino(work)


def _edgelm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "edgelm", *arguments], check=True)


def _example() -> dict[str, Any]:
    tokenizer = _tokenizer()
    texts = ["An example.", "One that is longer, so that there is padding."]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def _model() -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(locate("minilm")).eval()


def _prepare_onnxruntime(work: Path) -> None:
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    example, axes = (
        _example(),
        {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},
    )
    names = list(example)
    torch.onnx.export(
        _model(),
        kwargs=example,
        dynamo=True,
        f=str(work / "onnxruntime-fp32.onnx"),
        input_names=names,
        dynamic_shapes=dict.fromkeys(names, axes),
        external_data=False,
    )
    quantize_dynamic(
        work / "onnxruntime-fp32.onnx",
        work / "onnxruntime-int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": 1},
    )


def _prepare_openvino(work: Path) -> None:
    import nncf
    import openvino

    tokenizer = _tokenizer()
    texts = load_texts(Calibration(max_texts=300))
    from_torch = openvino.convert_model(_model(), example_input=_example())
    from_onnx = openvino.convert_model(work / "onnxruntime-fp32.onnx")
    openvino.save_model(from_torch, work / "openvino-fp32.xml", compress_to_fp16=False)
    for name, model in (("", from_torch), ("-onnx", from_onnx)):
        quantised = nncf.quantize(
            model,
            nncf.Dataset(texts, lambda text: _tokens(tokenizer, [text])),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(texts),
        )
        openvino.save_model(quantised, work / f"openvino-int8{name}.xml")


# Measuring --------------------------------------------------------------------------------


def serve(name: str, work: Path) -> None:
    """Be a contender: answer requests on stdin, as `edgelm.evaluate.contender` does."""
    quiet, sys.stdout = sys.stdout, sys.stderr
    if name in EDGELM:
        import edgelm

        one = edgelm.load(work / name)
        many = edgelm.load(work / name, workers=CORES)

        def encode(texts: Sequence[str]) -> np.ndarray:
            return (one if len(texts) == 1 else many).encode(texts)
    else:
        encode = PEERS[name][0](work)
    for line in sys.stdin:
        request = json.loads(line)
        if "save" in request:
            np.save(request["save"], encode(request["texts"]))
        print(json.dumps(answer(encode, request)), file=quiet, flush=True)


def size_mb(name: str, work: Path) -> float:
    """Megabytes of what a device needs."""
    if name in EDGELM:
        return sum(f.stat().st_size for f in (work / name).iterdir()) / 1e6
    file = PEERS[name][1]
    if file:
        return (work / file).stat().st_size / 1e6
    return (locate("minilm") / "model.safetensors").stat().st_size / 1e6


def ask(child: subprocess.Popen[str], **request: Any) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(request) + "\n")
    child.stdin.flush()
    result: dict[str, Any] = json.loads(child.stdout.readline())
    return result


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--texts", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--words", type=int, help="Join and cut the texts to this many words each."
)
@click.option("--stsb", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True)
@click.option("--count", default=1000, show_default=True, help="Texts a round.")
@click.option("--only", help="Contenders, by ; (default: all).")
@click.option("--child", hidden=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    work: Path,
    texts: Path | None,
    words: int | None,
    stsb: Path | None,
    rounds: int,
    count: int,
    only: str | None,
    child: str | None,
    output: Path | None,
) -> None:
    """Prepare, measure in turns, print a table, write JSON."""
    if child is not None:
        serve(child, work)
        return
    prepare(work)
    source = load_texts(Calibration()) if texts is None else list(read_texts(texts))
    chosen = source[:count]
    if words is not None:
        stream = " ".join(source).split()
        stream *= 1 + count * words // len(stream)
        chosen = [
            " ".join(stream[i * words : (i + 1) * words])
            for i in range(min(count, 20_000 // words))
        ]
    names = only.split(";") if only else [*PEERS, *EDGELM]
    script = [sys.executable, __file__, "--work", str(work), "--child"]
    children = {
        name: subprocess.Popen(
            [*script, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in names
    }
    for running in children.values():  # opened, and warm
        ask(running, texts=chosen[:64])
        ask(running, texts=chosen[:20], single=True)
    rates: dict[str, list[float]] = {name: [] for name in names}
    latencies: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, float] = {}
    for turn in range(rounds):
        for name, running in children.items():
            result = ask(running, texts=chosen)
            rates[name].append(len(chosen) / result["seconds"])
            single = ask(running, texts=chosen[turn * 30 :][:30], single=True)
            latencies[name] += single["latencies_ms"]
            memory[name] = result["memory_mib"]
    rows = [json.loads(line) for line in stsb.open()] if stsb else []
    pairs = [row[key] for row in rows for key in ("text1", "text2")]
    vectors = {}
    for name, running in children.items():
        path = work / "vectors.npy"
        ask(running, texts=[*chosen, *pairs], save=str(path))
        vectors[name] = np.load(path)
        running.stdin.close()  # type: ignore[union-attr]
    found = {}
    for name in names:
        of_texts, of_pairs = np.split(vectors[name], [len(chosen)])
        cosines = (of_texts * vectors[names[0]][: len(chosen)]).sum(1)
        found[name] = {
            "texts_per_s": round(median(rates[name]), 1),
            "ratio": round(median(np.divide(rates[name], rates[names[0]]).tolist()), 2),
            "by_round": [round(rate, 1) for rate in rates[name]],
            "p50_ms": round(median(latencies[name]), 2),
            "p99_ms": round(float(np.percentile(latencies[name], 99)), 2),
            "memory_mib": round(memory[name]),
            "size_mb": round(size_mb(name, work), 1),
            "cosine_mean": round(float(cosines.mean()), 4),
            "cosine_min": round(float(cosines.min()), 3),
        }
        if rows:
            a, b = of_pairs[::2], of_pairs[1::2]
            scores = [float(row["score"]) for row in rows]
            found[name]["stsb"] = round(
                100 * float(spearmanr((a * b).sum(1), scores).statistic), 2
            )
    columns = list(next(iter(found.values())))
    columns.remove("by_round")
    print(
        f"| | {' | '.join(columns)} |", "---".join("|" * (len(columns) + 2)), sep="\n"
    )
    for name, row in found.items():
        print(f"| {name} | {' | '.join(str(row[column]) for column in columns)} |")
    if output is not None:
        packages = ("torch", "openvino", "nncf", "onnxruntime", "sentence-transformers")
        about = {
            "cores": CORES,
            "machine": platform.processor() or platform.machine(),
            "versions": {name: version(name) for name in packages},
            "texts": len(chosen),
            "words_a_text": sum(len(text.split()) for text in chosen) / len(chosen),
            "date": time.strftime("%Y-%m-%d"),
        }
        output.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
