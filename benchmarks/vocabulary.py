"""What a smaller vocabulary costs: the table of docs/throughput.md.

    python benchmarks/vocabulary.py --work vocabulary --wiki wikitext2/train.txt \
        --stsb-train stsb/train.jsonl --stsb-test stsb/test.jsonl -o vocabulary.json

`balanced` with the whole vocabulary, with the tokens most frequent in WikiText-2, and with those of WikiText-2
and the domain's own training texts, each as often as `TIMES` says, so that their words count. No vocabulary is
chosen on the test split. Everything runs one after the other, by edgelm's commands; what is there already is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

TIMES = 8


def write_mix(wiki: Path, pairs: Path, path: Path) -> None:
    """A text a line: the pairs' texts `TIMES` times, then the lines of the encyclopedia."""
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    own = [row[key] for row in rows for key in ("text1", "text2")]
    general = wiki.read_text(encoding="utf-8").split("\n")
    lines = (" ".join(text.split()) for text in own * TIMES + general)
    text = "".join(f"{line}\n" for line in lines if line)
    path.write_text(text, encoding="utf-8")


def edgelm(*arguments: object) -> str:
    """What a command of edgelm prints on stdout."""
    command = [sys.executable, "-m", "edgelm", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(
    name: str, texts: Path | None, size: int, target: str, test: Path, work: Path
) -> dict[str, Any]:
    """Make one bundle and measure it."""
    checkpoint, archive = work / name, work / f"{name}.tar.zst"
    chosen = ["--vocab", texts, "--vocab-size", size] if texts else []
    if not checkpoint.exists():
        edgelm("compress", "minilm", "--preset", "balanced", *chosen, "-o", checkpoint)
    made = edgelm(
        *("export", checkpoint, "--target", target, "--precision", "int8"),
        *("-o", archive, "--force", "--json"),
    )
    about = json.loads(made)
    scores = json.loads(edgelm("eval", archive, "--data", test, "--json"))
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    return {
        "vocabulary": name,
        "tokens": len(vocabulary["model"]["vocab"]),
        "archive_mb": round(about["archive_bytes"] / 1e6, 1),
        "unpacked_mb": round(about["size_bytes"] / 1e6, 1),
        "stsb_test": round(scores["spearman"], 2),
    }


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--wiki", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--stsb-train", type=click.Path(path_type=Path, exists=True), required=True
)
@click.option(
    "--stsb-test", type=click.Path(path_type=Path, exists=True), required=True
)
@click.option("--size", default=16_000, show_default=True)
@click.option("--target", default="cpu-openvino", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    work: Path,
    wiki: Path,
    stsb_train: Path,
    stsb_test: Path,
    size: int,
    target: str,
    output: Path | None,
) -> None:
    """Make the three bundles, measure them, print a table, write JSON."""
    work.mkdir(parents=True, exist_ok=True)
    mix = work / "mix.txt"
    write_mix(wiki, stsb_train, mix)
    rows = []
    for name, texts in (("whole", None), ("wiki", wiki), ("mix", mix)):
        rows.append(measure(name, texts, size, target, stsb_test, work))
        if len(rows) == 1:
            print(f"| {' | '.join(rows[0])} |", "---".join("|" * 6), sep="\n")
        print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    if output is not None:
        output.write_text(json.dumps({"target": target, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
