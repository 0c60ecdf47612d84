"""What both adapters share: low-rank adapters on the base model, batches, the loop, files."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from edgelm import adapters
from edgelm.bundle import file_digest
from edgelm.models import locate

BASE = locate("minilm")
TOKENIZER = AutoTokenizer.from_pretrained(BASE)
RANK, ALPHA = 32, 64
IGNORED = -100

# Token ids, and the target: a label a token, or a score.
Example = tuple[list[int], Any]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def adapted(auto: Any, **config: Any) -> PeftModel:
    """The base model with fresh adapters, and a fresh head if it has one."""
    head = None if auto is AutoModel else ["classifier"]
    return get_peft_model(
        auto.from_pretrained(BASE, **config),
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.05,
            target_modules=["query", "key", "value", "dense"],
            modules_to_save=head,
        ),
    )


def batches(
    examples: Sequence[Example], size: int, rng: random.Random | None
) -> Iterator[tuple[list[int], dict[str, torch.Tensor], torch.Tensor]]:
    """Indices, padded inputs and targets; near lengths go together. In order without `rng`."""
    order = list(range(len(examples)))
    if rng:
        rng.shuffle(order)
    span = 50 * size if rng else max(len(order), 1)
    pools = [order[i : i + span] for i in range(0, len(order), span)]
    chunks = []
    for pool in pools:
        pool.sort(key=lambda i: len(examples[i][0]))
        chunks += [pool[i : i + size] for i in range(0, len(pool), size)]
    if rng:
        rng.shuffle(chunks)
    for chunk in chunks:
        longest = max(len(examples[i][0]) for i in chunk)
        ids = torch.zeros(len(chunk), longest, dtype=torch.long)
        for row, i in enumerate(chunk):
            ids[row, : len(examples[i][0])] = torch.tensor(examples[i][0])
        # A pair: what stands behind the first separator is its second text.
        ends = (ids == TOKENIZER.sep_token_id).cumsum(1)
        second = torch.roll(ends, 1, dims=1).clamp(max=1) * (ids != 0)
        second[:, 0] = 0
        inputs = {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "token_type_ids": second,
        }
        targets = [examples[i][1] for i in chunk]
        if isinstance(targets[0], list):
            padded = torch.full_like(ids, IGNORED)
            for row, labels in enumerate(targets):
                padded[row, : len(labels)] = torch.tensor(labels)
            yield chunk, inputs, padded
        else:
            yield chunk, inputs, torch.tensor(targets, dtype=torch.float32)


def fit(
    model: Any,
    examples: Callable[[], Sequence[Example]],
    forward: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor],
    loss: Loss,
    *,
    epochs: int,
    rate: float,
    size: int,
    rng: random.Random,
) -> None:
    """AdamW, linear warm-up over a tenth of the steps and linear decay; bfloat16 products."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    total = epochs * math.ceil(len(examples()) / size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / (0.1 * total), max(0.0, (total - step) / (0.9 * total))
        ),
    )
    model.train()
    for epoch in range(epochs):
        began, losses = time.monotonic(), []
        for _, inputs, targets in batches(examples(), size, rng):
            with torch.autocast("cpu", torch.bfloat16):
                outputs = forward(model, inputs)
            value = loss(outputs.float(), targets)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
        click.echo(
            f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {time.monotonic() - began:.0f} s"
        )
    model.eval()


def stage(path: Path, model: Any, work: Callable[[], None]) -> Any:
    """Run a stage of training, or take its result from where an earlier run left it."""
    if path.exists():
        set_peft_model_state_dict(model, load_file(path))
        return model.eval()
    click.echo(f"-- {path.stem}")
    work()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(get_peft_model_state_dict(model), path)
    return model


def save(model: Any, path: Path, about: dict[str, Any]) -> None:
    """Write what edgelm.adapters reads, in half precision."""
    tensors = {
        key.removeprefix("base_model.model.")
        .replace(".lora_A.weight", ".lora_A")
        .replace(".lora_B.weight", ".lora_B"): value.half().contiguous()
        for key, value in get_peft_model_state_dict(model).items()
    }
    about = {
        "format_version": adapters.FORMAT_VERSION,
        "base_sha256": file_digest(BASE / "model.safetensors"),
        "scale": ALPHA / RANK,
        **about,
    }
    save_file(tensors, path, {"edgelm_adapter": json.dumps(about, sort_keys=True)})
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def wikipedia_sentences(path: Path) -> list[list[str]]:
    """Sentences of WikiText-2, as words."""
    found, current = [], list[str]()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("="):
            continue
        current = []
        for word in (
            line.replace("@-@", "-").replace("@,@", ",").replace("@.@", ".").split()
        ):
            current.append(word)
            if word == ".":
                if 6 <= len(current) <= 50 and "<unk>" not in current:
                    found.append(current)
                current = []
    return found
