"""The similarity adapter: a bi-encoder, pairs that it scores, a cross-encoder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from training import (
    TOKENIZER,
    Example,
    adapted,
    batches,
    fit,
    stage,
    wikipedia_sentences,
    write_rows,
)
from transformers import AutoModel, AutoModelForSequenceClassification


def cosent(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log(1 + sum exp(20 (s_i - s_j))) over pairs whose order should be the other way round."""
    wrong = (
        20 * (scores[:, None] - scores[None])[targets[:, None] < targets[None] - 0.02]
    )
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)


def score_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy with soft targets, and a little of the ranking loss."""
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    return entropy + 0.1 * cosent(torch.sigmoid(logits), targets)


def embed(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalised mean of the last hidden states, ``[batch, 384]``."""
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def fit_bi_encoder(
    model: Any, pairs: Sequence[tuple[str, str, float]], rng: random.Random
) -> None:
    """Both texts of a pair stand one behind the other in a batch."""

    def forward(m: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, where = inputs["input_ids"], inputs["token_type_ids"].bool()
        rows = []
        for part in (~where & (ids != 0), where):
            rows += [row[keep] for row, keep in zip(ids, part, strict=True)]
        rows[len(ids) :] = [
            torch.cat([row.new_tensor([101]), row]) for row in rows[len(ids) :]
        ]
        texts = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        vectors = embed(m, {"input_ids": texts, "attention_mask": (texts != 0).long()})
        first, second = vectors.float().chunk(2)
        return (first * second).sum(1)

    examples = [(encode_pair(a, b), score) for a, b, score in pairs]
    fit(model, lambda: examples, forward, cosent, epochs=3, rate=5e-4, size=32, rng=rng)


def encode_pair(a: str, b: str) -> list[int]:
    """``[CLS] a [SEP] b [SEP]``"""
    return list(TOKENIZER(a, b, truncation=True, max_length=128)["input_ids"])


def score_silver(
    model: Any,
    pairs: Sequence[tuple[str, str, float]],
    more: Sequence[str],
    rng: random.Random,
) -> list[tuple[str, str, float]]:
    """Pairs near and far, scored by the bi-encoder on the scale of the labels."""
    from sklearn.isotonic import IsotonicRegression

    texts = sorted({text for a, b, _ in pairs for text in (a, b)}) + list(more)
    examples = [
        (TOKENIZER(t, truncation=True, max_length=128)["input_ids"], 0.0) for t in texts
    ]
    vectors = np.zeros((len(texts), 384), dtype=np.float32)
    with torch.no_grad():
        for chunk, inputs, _ in batches(examples, 64, None):
            inputs.pop("token_type_ids")
            vectors[chunk] = embed(model, inputs).numpy()
    place = {text: i for i, text in enumerate(texts)}
    cosines = [float(vectors[place[a]] @ vectors[place[b]]) for a, b, _ in pairs]
    scale = IsotonicRegression(out_of_bounds="clip", y_min=0.0, y_max=1.0)
    scale.fit(cosines, [score for *_, score in pairs])
    found = []
    for i, vector in enumerate(vectors):
        near = vectors @ vector
        near[i] = -1
        order = np.argsort(-near)[:200].tolist()
        chosen = (
            rng.sample(order[:5], 2)
            + rng.sample(order[5:40], 2)
            + rng.sample(order[40:], 1)
        )
        scores = scale.predict(near[chosen])
        found += [
            (texts[i], texts[j], float(s)) for j, s in zip(chosen, scores, strict=True)
        ]
    rng.shuffle(found)
    return found


def train_similarity(data: Path, work: Path, seed: int) -> tuple[Any, dict[str, Any]]:
    """The cross-encoder's adapter, and what its metadata says."""
    rng = random.Random(seed)
    rows = {
        part: [
            json.loads(line)
            for line in (data / "stsb" / f"{part}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        ]
        for part in ("train", "dev", "test")
    }
    write_rows(work / "stsb-test.jsonl", rows["test"])
    tested = {frozenset((r["text1"], r["text2"])) for r in rows["test"]}
    gold = [
        (r["text1"], r["text2"], r["score"] / 5)
        for r in rows["train"] + rows["dev"]
        if frozenset((r["text1"], r["text2"])) not in tested
    ]
    teacher = adapted(AutoModel)
    teacher = stage(
        work / "similarity-teacher.safetensors",
        teacher,
        lambda: fit_bi_encoder(teacher, gold, rng),
    )
    silver_file = work / "similarity-silver.jsonl"
    if not silver_file.exists():
        more = [
            " ".join(s) for s in wikipedia_sentences(data / "wikitext2" / "train.txt")
        ]
        more = rng.sample([text for text in more if len(text) < 200], 5000)
        silver = score_silver(teacher, gold, more, rng)
        write_rows(silver_file, [{"pair": [a, b], "score": s} for a, b, s in silver])
    lines = silver_file.read_text(encoding="utf-8").splitlines()
    silver_rows = [json.loads(line) for line in lines]
    distilled = [(encode_pair(*row["pair"]), row["score"]) for row in silver_rows]
    labelled = [(encode_pair(a, b), s) for x, y, s in gold for a, b in ((x, y), (y, x))]
    click.echo(f"{len(gold)} labelled pairs, {len(distilled)} scored by the bi-encoder")

    def run(model: Any, examples: list[Example], **settings: Any) -> Callable[[], None]:
        return lambda: fit(
            model,
            lambda: examples,
            lambda m, inputs: m(**inputs).logits[:, 0],
            score_loss,
            rng=rng,
            **settings,
        )

    model = adapted(AutoModelForSequenceClassification, num_labels=1)
    first = run(model, distilled, epochs=1, rate=1e-3, size=64)
    model = stage(work / "similarity-distilled.safetensors", model, first)
    mixed = labelled + rng.sample(distilled, 6000)
    second = run(model, mixed, epochs=4, rate=4e-4, size=32)
    model = stage(work / "similarity-student.safetensors", model, second)
    return model, {
        "task": "scoring",
        "labels": ["similarity"],
        "data": "STS-B (train and dev, CC BY-SA 4.0), WikiText-2 (unlabelled, CC BY-SA)",
        "seed": seed,
    }
