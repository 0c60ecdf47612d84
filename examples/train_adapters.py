"""Train the two adapters that edgelm ships: `minilm-ner` and `minilm-similarity`.

    pip install 'edgelm[all]' peft scikit-learn
    python examples/train_adapters.py ner --data DATA --work WORK -o minilm-ner.safetensors
    python examples/train_adapters.py similarity --data DATA --work WORK -o minilm-similarity.safetensors

Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) of rank 32 on every linear layer of the
built-in model; the base weights stay as they are. An hour each on one core with bfloat16
instructions; each stage is kept in WORK and taken from there when the script runs again.

NER, in three stages: a teacher on the labelled sentences, with words masked and mentions exchanged for
others of their type; sentences of WikiText-2 on which that teacher, which sees no capitals, marks just
what the capitals mark; a student on both. Similarity, in three stages: a bi-encoder (CoSENT loss), which
learns faster from little data than a cross-encoder; the cross-encoder on pairs that the bi-encoder scores,
brought to the scale of the labels by isotonic regression; the cross-encoder on the labelled pairs.

DATA holds, as JSON lines (`tokens`, `tags` in BIO; `text1`, `text2`, `score` 0..5):

    wikigold/all.jsonl                          CC BY 4.0. The last fifth is held out.
    wnut17/{train,test}.jsonl                   CC BY 4.0. The test split is held out.
    crossner/DOMAIN/{train,dev,test}.jsonl      MIT. Of the test splits only politics is used, held out.
    stsb/{train,dev,test}.jsonl                 CC BY-SA 4.0. Pairs that are in the test split too are left out.
    wikitext2/train.txt                         CC BY-SA. Unlabelled.

The hyperparameters were chosen by the scores on wikigold's eighth tenth and STS-B's dev split, held out as
well; the adapters that are shipped are trained on those too, with what was chosen.
"""

from __future__ import annotations

import calendar
import json
import math
import random
import time
from collections import defaultdict
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
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from edgelm import adapters
from edgelm.bundle import file_digest
from edgelm.evaluate.accuracy import from_tags
from edgelm.models import locate
from edgelm.runtimes.ner import softmax, spans, transitions, viterbi

BASE = locate("minilm")
RANK, ALPHA = 32, 64
TYPES = {
    "PER": "PER person politician scientist writer musicalartist researcher",
    "LOC": "LOC location country",
    "ORG": "ORG organisation organization politicalparty university band corporation group",
    "MISC": "MISC misc event election award conference album song book poem magazine academicjournal "
    "programlang product creative-work",
}
TYPE = {name: kind for kind, names in TYPES.items() for name in names.split()}
LABELS = ["O", *(f"{part}-{kind}" for kind in TYPES for part in "BI")]
IGNORED = -100
# Capitals that name no entity.
CALENDAR = frozenset(
    [*calendar.month_name, *calendar.day_name, "I"],
)

Sentence = tuple[list[str], list[int]]  # words and the labels of each
Example = tuple[
    list[int], Any
]  # token ids, and the target: a label a token, or a score
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------- training, for both


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


# ---------------------------------------------------------------- NER


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
    start, allowed = transitions(LABELS)
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
                path = viterbi(np.log(p + 1e-30), start, allowed)
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


# ---------------------------------------------------------------- similarity


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


# ---------------------------------------------------------------- command line


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


TOKENIZER = AutoTokenizer.from_pretrained(BASE)
TRAINERS = {"ner": train_ner, "similarity": train_similarity}


@click.command()
@click.argument("name", type=click.Choice(list(TRAINERS)))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="For the stages."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    name: str, data: Path, work: Path, output: Path, seed: int, threads: int
) -> None:
    """Train an adapter; write it, and the held-out data to measure it with `edgelm eval`."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    model, about = TRAINERS[name](data, work, seed)
    save(model, output, about)


if __name__ == "__main__":
    main()
