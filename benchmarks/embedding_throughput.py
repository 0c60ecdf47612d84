r"""edgelm's embedding bundles against its peers, on the same texts, taking turns in one run.

    pip install openvino nncf sentence-transformers
    python benchmarks/embedding_throughput.py --work peers --stsb stsb/test.jsonl --beir scifact -o peers.json \
        --texts crossner-politics-test.jsonl --texts wikigold-test.jsonl --texts wnut17-test.jsonl

Every contender runs in a process of its own, is given raw texts and gives vectors; tokenisation and pooling
are inside the clock. The peers, and the settings they run in, are in peers.py. edgelm's bundles are made with
its commands; `balanced` has half the feed-forward neurons and int8. fastembed may live in an environment of
its own: `--fastembed-python env/bin/python`; where it is missing it is left out.
"""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
import ir_measures
import numpy as np
from peers import CORES, PEERS, prepare_fastembed, prepare_peers
from scipy.stats import spearmanr

from edgelm.calibration import Calibration, load_texts, read_texts
from edgelm.evaluate.accuracy import Dataset, load_dataset
from edgelm.evaluate.contender import answer
from edgelm.models import locate

EDGELM = {  # name: model, target, precision
    "edgelm fp32 (ONNX Runtime)": ("minilm", "cpu", "fp32"),
    "edgelm half, fp32 (ONNX Runtime)": ("half", "cpu", "fp32"),
    "edgelm int8 (ONNX Runtime)": ("minilm", "cpu", "int8"),
    "edgelm int8 (OpenVINO)": ("minilm", "cpu-openvino", "int8"),
    "edgelm balanced (ONNX Runtime)": ("half", "cpu", "int8"),
    "edgelm balanced (OpenVINO)": ("half", "cpu-openvino", "int8"),
}

FASTEMBED = "fastembed fp32"


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
    prepare_peers(work)


def _edgelm(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "edgelm", *arguments], check=True)


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
    if name == FASTEMBED:
        return (work / "onnxruntime-fp32.onnx").stat().st_size / 1e6
    file = PEERS[name][1]
    if file:
        return (work / file).stat().st_size / 1e6
    return (locate("minilm") / "model.safetensors").stat().st_size / 1e6


def has_fastembed(python: str) -> bool:
    """Whether a Python has fastembed."""
    found = subprocess.run([python, "-c", "import fastembed"], capture_output=True)
    return found.returncode == 0


def ndcg(data: Dataset, documents: np.ndarray, queries: np.ndarray) -> float:
    """nDCG@10 by cosine, in percent; both are unit vectors."""
    names = [str(row["_id"]) for row in data.documents]
    run = {
        str(row["_id"]): {names[i]: float(scores[i]) for i in np.argsort(-scores)[:100]}
        for row, scores in zip(data.rows, queries @ documents.T, strict=True)
    }
    measure = ir_measures.nDCG @ 10
    return 100 * float(
        ir_measures.calc_aggregate([measure], data.relevance, run)[measure]
    )


def ask(child: subprocess.Popen[str], **request: Any) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(request) + "\n")
    child.stdin.flush()
    result: dict[str, Any] = json.loads(child.stdout.readline())
    return result


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option(
    "--texts",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help=".txt or .jsonl; repeatable; else the built-in sample.",
)
@click.option(
    "--words", type=int, help="Join and cut the texts to this many words each."
)
@click.option("--stsb", type=click.Path(path_type=Path, exists=True))
@click.option("--beir", type=click.Path(path_type=Path, exists=True), help="A folder.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--count", default=1000, show_default=True, help="Texts a round.")
@click.option("--only", help="Contenders, by ; (default: all).")
@click.option(
    "--fastembed-python",
    default=sys.executable,
    show_default=True,
    help="The Python that has fastembed.",
)
@click.option("--child", hidden=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    work: Path,
    texts: tuple[Path, ...],
    words: int | None,
    stsb: Path | None,
    beir: Path | None,
    rounds: int,
    count: int,
    only: str | None,
    fastembed_python: str,
    child: str | None,
    output: Path | None,
) -> None:
    """Prepare, measure in turns, print a table, write JSON."""
    if child is not None:
        serve(child, work)
        return
    prepare(work)
    source = [text for path in texts for text in read_texts(path)]
    source = source or load_texts(Calibration())
    random.Random(0).shuffle(source)
    chosen = source[:count]
    if words is not None:
        stream = " ".join(source).split()
        stream *= 1 + count * words // len(stream)
        chosen = [
            " ".join(stream[i * words : (i + 1) * words])
            for i in range(min(count, 20_000 // words))
        ]
    names = only.split(";") if only else [*PEERS, FASTEMBED, *EDGELM]
    if FASTEMBED in names and not has_fastembed(fastembed_python):
        print(f"{FASTEMBED} is left out: {fastembed_python} has no fastembed.")
        names.remove(FASTEMBED)
    script = [sys.executable, __file__, "--work", str(work), "--child"]
    commands = {name: [*script, name] for name in names}
    if FASTEMBED in names:
        peer = Path(__file__).with_name("fastembed_peer.py")
        folder = prepare_fastembed(work)
        commands[FASTEMBED] = [fastembed_python, str(peer), str(folder)]
    children = {
        name: subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, command in commands.items()
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
    search = load_dataset(beir) if beir else Dataset("none", "retrieval", ())
    documents = [
        " ".join(filter(None, (row.get("title"), row["text"])))
        for row in search.documents
    ]
    asked = [row["text"] for row in search.rows]
    ends = np.cumsum([len(chosen), len(pairs), len(documents)])
    vectors = {}
    for name, running in children.items():
        path = work / "vectors.npy"
        ask(running, texts=[*chosen, *pairs, *documents, *asked], save=str(path))
        vectors[name] = np.load(path)
        running.communicate()  # its stdin ends, and so does it
    found = {}
    for name in names:
        of_texts, of_pairs, *of_search = np.split(vectors[name], ends)
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
        if beir:
            found[name]["ndcg@10"] = round(ndcg(search, *of_search), 2)
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
