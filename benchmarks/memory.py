"""Peak memory and time of compressing a model larger than memory should be.

    python benchmarks/memory.py --blocks 4,8,16,22 -o memory.json

Makes LLaMA-shaped checkpoints of random float16 weights (22 blocks: 1.1 billion parameters), compresses
each in a process of its own and reads the peak that the process reports. Needs 3 GB of disk a checkpoint.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from edgelm.models import locate


def make_model(folder: Path, blocks: int) -> int:
    """Write a checkpoint, a block a file; gives its number of parameters."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype=torch.float16,
    )
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir()
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate("minilm")).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
    torch.manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    weight_map = {}
    for file, members in files.items():
        tensors = {
            name: torch.ones(shape, dtype=torch.float16)
            if len(shape) == 1
            else (torch.randn(shape) * 0.02).half()
            for name, shape in members.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(members, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


def processor_seconds() -> float:
    """What finished child processes have used: does not grow with what else runs here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@click.command()
@click.option("--blocks", default="4,8,16,22", show_default=True)
@click.option("--texts", default=64, show_default=True)
@click.option("--sparsity", default="2:4", show_default=True)
@click.option("--refine", default="dsnot", show_default=True)
@click.option("--repair", default="none", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON to write.")
def main(
    blocks: str,
    texts: int,
    sparsity: str,
    refine: str,
    repair: str,
    output: Path | None,
) -> None:
    """Compress models of several depths; print peak memory and seconds."""
    rows: list[dict[str, Any]] = []
    for count in map(int, blocks.split(",")):
        with tempfile.TemporaryDirectory() as work:
            model, checkpoint = Path(work) / "model", Path(work) / "checkpoint"
            parameters = make_model(model, count)
            command = [
                sys.executable,
                "-m",
                "edgelm",
                "compress",
                str(model),
                "-o",
                str(checkpoint),
            ]
            flags = ["--sparsity", sparsity, "--refine", refine, "--repair", repair]
            began, worked = time.monotonic(), processor_seconds()
            subprocess.run(
                [*command, *flags, "--max-texts", str(texts), "--json"],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            cost = json.loads((checkpoint / "edgelm.json").read_text())["cost"]
            rows.append(
                {
                    "blocks": count,
                    "parameters": parameters,
                    "peak_mib": cost["peak_mib"],
                    "seconds": round(time.monotonic() - began, 1),
                    "processor_seconds": round(processor_seconds() - worked, 1),
                }
            )
        row = rows[-1]
        click.echo(
            f"{count:3} blocks, {parameters / 1e9:.2f} billion parameters: "
            f"{row['peak_mib']:.0f} MiB, {row['seconds']:.0f} s, {row['processor_seconds']:.0f} s of a "
            f"core, {row['processor_seconds'] / count:.1f} a block"
        )
    if output:
        about = {"texts": texts, "steps": [sparsity, refine, repair], "rows": rows}
        output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
