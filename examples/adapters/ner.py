"""The NER adapter: a teacher, sentences that it labels, a student."""

from __future__ import annotations

import calendar
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from training import (
    IGNORED,
    TOKENIZER,
    Example,
    adapted,
    batches,
    fit,
    stage,
    wikipedia_sentences,
    write_rows,
)
from transformers import AutoModelForTokenClassification

from edgelm.evaluate.accuracy import from_tags
from edgelm.runtimes.labels import softmax, spans, transitions, viterbi

TYPES = {
    "PER": "PER person politician scientist writer musicalartist researcher",
    "LOC": "LOC location country",
    "ORG": "ORG organisation organization politicalparty university band corporation group",
    "MISC": "MISC misc event election award conference album song book poem magazine academicjournal "
    "programlang product creative-work",
}
TYPE = {name: kind for kind, names in TYPES.items() for name in names.split()}
LABELS = ["O", *(f"{part}-{kind}" for kind in TYPES for part in "BI")]
# Capitals that name no entity.
CALENDAR = frozenset([*calendar.month_name, *calendar.day_name, "I"])

# Words, and the label of each.
Sentence = tuple[list[str], list[int]]


def read_sentences(path: Path) -> list[Sentence]:
    """Words and labels of the four types; a type that is none of them is to be ignored."""
    sentences = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        labels = []
        for tag in row["tags"]:
            part, _, name = tag.partition("-")
            kind = TYPE.get(name)
            if tag == "O":
                labels.append(0)
            else:
                labels.append(LABELS.index(f"{part}-{kind}") if kind else IGNORED)
        sentences.append((row["tokens"], labels))
    return sentences


def encode_words(
    sentence: Sentence,
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Token ids, a label a token, and (token, word) of each word's first token."""
    words, labels = sentence
    encoding = TOKENIZER(
        words, is_split_into_words=True, truncation=True, max_length=128
    )
    per_token, firsts, previous = [], [], None
    for token, word in enumerate(encoding.word_ids()):
        if word is None:
            per_token.append(IGNORED)
        elif word != previous:
            per_token.append(labels[word])
            firsts.append((token, word))
        else:  # inside the word: B-x goes on as I-x
            label = labels[word]
            per_token.append(label + 1 if label > 0 and label % 2 else label)
        previous = word
    return encoding["input_ids"], per_token, firsts


def exchange_mentions(
    sentence: Sentence, mentions: dict[int, list[list[str]]], rng: random.Random
) -> Sentence:
    """Put other mentions of the same type in the place of some."""
    words, labels = sentence
    if IGNORED in labels or rng.random() > 0.4:
        return sentence
    new_words, new_labels = list(words), list(labels)
    for begin, end, kind in reversed(spans([LABELS[i] for i in labels])):
        if rng.random() < 0.6:
            label = LABELS.index(f"B-{kind}")
            other = rng.choice(mentions[label])
            new_words[begin:end] = other
            new_labels[begin:end] = [label] + [label + 1] * (len(other) - 1)
    return new_words, new_labels


def noisy(
    sentences: Sequence[Sentence], rng: random.Random
) -> Callable[[], list[Example]]:
    """Examples with mentions exchanged and 8 % of the tokens masked; anew at each call."""
    mentions = defaultdict(list)
    for words, labels in sentences:
        if IGNORED not in labels:
            for begin, end, kind in spans([LABELS[i] for i in labels]):
                mentions[LABELS.index(f"B-{kind}")].append(words[begin:end])

    def draw() -> list[Example]:
        examples = []
        for sentence in sentences:
            ids, labels, _ = encode_words(exchange_mentions(sentence, mentions, rng))
            last = len(ids) - 1
            masked = [
                TOKENIZER.mask_token_id
                if 0 < i < last and rng.random() < 0.08
                else token
                for i, token in enumerate(ids)
            ]
            examples.append((masked, labels))
        return examples

    return draw


def agrees_with_capitals(
    words: Sequence[str], found: Sequence[tuple[int, int, str]]
) -> bool:
    """Whether what is marked is what capitals mark."""
    inside = {i for begin, end, _ in found for i in range(begin, end)}
    for begin, end, _ in found:
        if any(words[i][0].islower() for i in (begin, end - 1)):
            return False
    return not any(
        word[0].isupper()
        and i not in inside
        and i > 0
        and word not in CALENDAR
        and words[i - 1] not in ('"', ".", "?", "!", ":")
        for i, word in enumerate(words)
    )


def label_silver(model: Any, texts: Sequence[list[str]]) -> list[Sentence]:
    """Sentences that the model labels surely and in agreement with their capitals."""
    allowed = transitions(LABELS)
    encoded = [encode_words((words, [0] * len(words))) for words in texts]
    kept: list[Sentence] = []
    with torch.no_grad():
        for chunk, inputs, _ in batches([(ids, 0.0) for ids, *_ in encoded], 64, None):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**inputs).logits.double().numpy()
            for row, i in enumerate(chunk):
                firsts = encoded[i][2]
                if len(firsts) < len(texts[i]):
                    continue
                p = softmax(logits[row][[token for token, _ in firsts]])
                path = viterbi(np.log(p + 1e-30), *allowed)
                sure = min(
                    (p[k].max() for k, label in enumerate(path) if label), default=1
                )
                found = spans([LABELS[label] for label in path])
                if sure > 0.55 and agrees_with_capitals(texts[i], found):
                    kept.append((texts[i], path))
    return kept


def ner_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy a token."""
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, len(LABELS)), labels.reshape(-1), ignore_index=IGNORED
    )


def train_ner(data: Path, work: Path, seed: int) -> tuple[Any, dict[str, Any]]:
    """The NER adapter, and what its metadata says."""
    rng = random.Random(seed)
    wikigold = read_sentences(data / "wikigold" / "all.jsonl")
    cut = len(wikigold) * 8 // 10
    gold = wikigold[:cut] * 2 + read_sentences(data / "wnut17" / "train.jsonl")
    for domain in ("ai", "literature", "music", "politics", "science"):
        for part in ("train", "dev"):
            gold += read_sentences(data / "crossner" / domain / f"{part}.jsonl")
    held_out = {
        "wikigold": wikigold[cut:],
        "wnut17": read_sentences(data / "wnut17" / "test.jsonl"),
        "crossner-politics": read_sentences(
            data / "crossner" / "politics" / "test.jsonl"
        ),
    }
    for name, sentences in held_out.items():
        rows = [
            from_tags(words, [LABELS[i] for i in labels]) for words, labels in sentences
        ]
        write_rows(work / f"{name}-test.jsonl", rows)

    def run(model: Any, sentences: list[Sentence], epochs: int) -> Callable[[], None]:
        return lambda: fit(
            model,
            noisy(sentences, rng),
            lambda m, inputs: m(**inputs).logits,
            ner_loss,
            epochs=epochs,
            rate=1e-3,
            size=32,
            rng=rng,
        )

    head = {"num_labels": len(LABELS)}
    teacher = adapted(AutoModelForTokenClassification, **head)
    teacher = stage(work / "ner-teacher.safetensors", teacher, run(teacher, gold, 7))
    silver_file = work / "ner-silver.jsonl"
    if not silver_file.exists():
        texts = wikipedia_sentences(data / "wikitext2" / "train.txt")
        rng.shuffle(texts)
        silver = label_silver(teacher, texts[:40000])
        named = [s for s in silver if any(s[1])][:12000]
        plain = [s for s in silver if not any(s[1])][:1500]
        write_rows(silver_file, [{"words": w, "labels": y} for w, y in named + plain])
    rows = [
        json.loads(line)
        for line in silver_file.read_text(encoding="utf-8").splitlines()
    ]
    silver = [(row["words"], row["labels"]) for row in rows]
    click.echo(f"{len(gold)} labelled sentences, {len(silver)} of WikiText-2")
    student = adapted(AutoModelForTokenClassification, **head)
    student = stage(
        work / "ner-student.safetensors", student, run(student, gold + silver, 4)
    )
    return student, {
        "task": "ner",
        "labels": LABELS,
        "data": "WikiGold (first 80 %, CC BY 4.0), WNUT-17 (train, CC BY 4.0), CrossNER (train and dev, MIT), "
        "WikiText-2 (unlabelled, CC BY-SA)",
        "seed": seed,
    }
