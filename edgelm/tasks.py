"""Tasks: what the files of a model say it is for, takes and gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from edgelm import sentence
from edgelm.errors import ModelError, require
from edgelm.manifest import NerInfo, ScoringInfo

Task = Literal["embedding", "ner", "scoring", "lm"]

# Task -> the class of transformers that loads it.
LOADERS: dict[Task, str] = {
    "embedding": "AutoModel",
    "ner": "AutoModelForTokenClassification",
    "scoring": "AutoModelForSequenceClassification",
    "lm": "AutoModelForCausalLM",
}
# Architectures of which AutoModel would bring the decoder too.
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
# Task of optimum's TasksManager -> task of edgelm.
_TASKS: dict[str, Task] = {
    "feature-extraction": "embedding",
    "token-classification": "ner",
    "text-classification": "scoring",
    "text-generation": "lm",
}
_LONGEST = 1 << 20
# A part and a type in one label; the first is how edgelm writes them.
_SPELLINGS = (
    re.compile(r"(?P<part>[BIESLU])-(?P<type>.+)"),
    re.compile(r"(?P<part>[BIESLUbieslu])[-_](?P<type>.+)"),
    re.compile(r"(?P<type>.+)[-_](?P<part>[BIESLUbieslu])"),
)


def loader_of(task: Task, config: Any) -> str:
    """Name of the class of transformers that loads a model for a task."""
    if task == "embedding":
        return _ENCODERS.get(config.model_type, LOADERS[task])
    return LOADERS[task]


def infer_task(folder: Path, config: Any, name: str) -> Task:
    """The task from sentence-transformers' files, else from the config's class by optimum."""
    if (folder / sentence.MODULES).is_file():
        return "scoring" if sentence.is_cross_encoder(folder) else "embedding"
    import transformers

    tasks = require("optimum.exporters.tasks", "compress").TasksManager
    hint = f"Say what it is for with --task {'|'.join(LOADERS)}."
    names = config.architectures or [""]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        raise ModelError(
            f"The config.json of {name} names no architecture that transformers has. {hint}"
        )
    try:
        inferred = tasks.infer_task_from_model(model_class)
    except ValueError:
        inferred = names[0]
    task = _TASKS.get(inferred.removesuffix("-with-past"))
    if task is None:
        raise ModelError(
            f"{name} is for {inferred}, from which edgelm cannot tell its use. {hint}"
        )
    return task


def check_tokenizer(name: str, folder: Path, model: Any, tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer that is slow, made up, or another model's."""
    if not tokenizer.is_fast:
        raise ModelError(
            f"{name} has no fast tokenizer (tokenizer.json), which the device needs. "
            "Convert it once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / file).is_file() for file in files):
        # transformers would make one that knows its special tokens alone.
        raise ModelError(
            f"{name} has no tokenizer: there is none of {', '.join(sorted(files))} in {folder}."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    # Of tokens added later some may never be used.
    known = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    largest = max([*known.values(), tokenizer.pad_token_id or 0])
    if largest >= rows:
        raise ModelError(
            f"The tokenizer of {name} has the token {largest}, and its embedding table {rows} rows: "
            "they do not belong together. Save the model with its own tokenizer, or resize its embeddings."
        )


def max_length(folder: Path, model: Any, tokenizer: Any) -> int:
    """The shortest of what the files say, in tokens; RoBERTa's positions begin behind the padding's."""
    limits = [sentence.text_limit(folder) or tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        tables = [
            getattr(module, "padding_idx", None)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] == "position_embeddings"
        ]
        limits.append(positions - 1 - max([i for i in tables if i is not None] or [-1]))
    stated = [int(limit) for limit in limits if 0 < limit < _LONGEST]
    return min(stated, default=512)


def _labels(config: Any, name: str) -> tuple[str, ...]:
    """The labels in the order of the logits."""
    known = config.id2label
    if set(known) != set(range(len(known))):
        raise ModelError(
            f"The labels of {name} are numbered {', '.join(map(str, known))}; the logits are from 0 on. "
            "Mend id2label in its config.json."
        )
    return tuple(str(known[i]) for i in range(len(known)))


def _spelt_out(labels: tuple[str, ...]) -> tuple[str, ...]:
    """``B_PER``, ``b-per`` and ``PER-B`` as ``B-PER``, where all labels are of one such spelling.

    Only where some begin and some continue: a type may be called ``E-MAIL``.
    """
    for spelling in _SPELLINGS:
        found = [spelling.fullmatch(label) for label in labels]
        parts = {match["part"].upper() for match in found if match}
        if {"B", "I"} <= parts and all(
            match or label.upper() == "O"
            for match, label in zip(found, labels, strict=True)
        ):
            return tuple(
                f"{match['part'].upper()}-{match['type']}" if match else "O"
                for match in found
            )
    return labels


def ner_info(config: Any, name: str) -> NerInfo:
    """Labels and scheme of a token classifier; labels as ``B-PER``, however its files spell them."""
    labels = _spelt_out(_labels(config, name))
    parts = {label.split("-")[0] for label in labels if "-" in label}
    if parts & {"E", "S", "L", "U"}:
        return NerInfo(labels, "BIOES")
    return NerInfo(labels, "BIO" if "B" in parts else "IO")


def scoring_info(folder: Path, config: Any, name: str) -> ScoringInfo:
    """Pairs for cross-encoders (sentence-transformers marks them) and for inference (NLI) models."""
    labels = _labels(config, name)
    marked = sentence.cross_encoder_activation(folder, config, name, len(labels))
    pairs = any(label.lower().startswith("entail") for label in labels)
    if marked is not None:
        return ScoringInfo(labels, marked, "pair")
    problem = config.problem_type
    kind: sentence.Activation = "softmax"
    if problem == "regression":
        kind = "none"
    elif problem == "multi_label_classification" or len(labels) == 1:
        kind = "sigmoid"
    return ScoringInfo(labels, kind, "pair" if pairs else "single")
