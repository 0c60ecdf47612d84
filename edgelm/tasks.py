"""Tasks: what the files of a model say it is for, takes and gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from edgelm.errors import ModelError, require
from edgelm.manifest import EmbeddingInfo, NerInfo, ScoringInfo

Task = Literal["embedding", "ner", "scoring", "lm"]

# Task -> the class of transformers that loads it.
LOADERS: dict[Task, str] = {
    "embedding": "AutoModel",
    "ner": "AutoModelForTokenClassification",
    "scoring": "AutoModelForSequenceClassification",
    "lm": "AutoModelForCausalLM",
}
# Task of optimum's TasksManager -> task of edgelm.
_TASKS: dict[str, Task] = {
    "feature-extraction": "embedding",
    "token-classification": "ner",
    "text-classification": "scoring",
    "text-generation": "lm",
}
_POOLINGS = {
    "cls": "cls",
    "cls_token": "cls",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_tokens": "mean",
    "lasttoken": "last",
}
_LONGEST = 1 << 20


def read_json(path: Path) -> Any:
    """A JSON file's content; an empty dict where there is none.

    Raises:
        ModelError: It is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not JSON ({error}).") from error


def loader_of(task: Task, config: Any) -> str:
    """Name of the class of transformers that loads a model for a task."""
    if task == "embedding" and config.model_type == "t5":
        return "T5EncoderModel"  # AutoModel would bring the decoder too
    return LOADERS[task]


def infer_task(folder: Path, config: Any, name: str) -> Task:
    """The task from sentence-transformers' files, else from the config's class by optimum."""
    if (folder / "modules.json").is_file():
        return "embedding"
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


def max_length(folder: Path, config: Any, tokenizer: Any) -> int:
    """The shortest of what the files say; RoBERTa's positions begin behind the padding."""
    limits = [tokenizer.model_max_length]
    limits.append(read_json(folder / "sentence_bert_config.json").get("max_seq_length"))
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        padded = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")
        limits.append(positions - 2 if padded else positions)
    stated = [int(limit) for limit in limits if limit and limit < _LONGEST]
    return min(stated, default=512)


def embedding_info(folder: Path, config: Any, name: str) -> EmbeddingInfo:
    """Pooling, normalisation and prompts from sentence-transformers' files.

    Without them mean pooling and no normalisation, as sentence-transformers does.
    """
    modules = read_json(folder / "modules.json") or []
    pooling, normalize = "mean", False
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind == "Normalize":
            normalize = True
        elif kind == "Pooling":
            pooling = _pooling(read_json(folder / module["path"] / "config.json"), name)
        elif kind != "Transformer":
            raise ModelError(
                f"{name} has the sentence-transformers module {kind}, which edgelm does not export."
            )
    extra = read_json(folder / "config_sentence_transformers.json")
    prompts = {k: v for k, v in (extra.get("prompts") or {}).items() if v}
    default = extra.get("default_prompt_name")
    shorter = getattr(config, "matryoshka_dimensions", None) or ()
    return EmbeddingInfo(
        int(config.hidden_size),
        pooling,
        normalize,
        prompts,
        default if default in prompts else None,
        tuple(sorted(int(n) for n in shorter if 0 < int(n) <= config.hidden_size)),
    )


def _pooling(config: Mapping[str, Any], name: str) -> str:
    """Both forms: one ``pooling_mode``, or a flag for each mode."""
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    if not modes:
        modes = [
            k.removeprefix("pooling_mode_")
            for k, v in config.items()
            if k.startswith("pooling_mode_") and v
        ]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelError(
            f"{name} pools by {'+'.join(modes)}; edgelm exports mean, cls, max and lasttoken pooling."
        )
    return _POOLINGS[modes[0]]


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def ner_info(config: Any) -> NerInfo:
    """Labels and scheme of a token classifier."""
    labels = _labels(config)
    parts = {label.split("-")[0] for label in labels if "-" in label}
    if parts & {"E", "S", "L", "U"}:
        return NerInfo(labels, "BIOES")
    return NerInfo(labels, "BIO" if "B" in parts else "IO")


def scoring_info(config: Any) -> ScoringInfo:
    """Pairs for cross-encoders (sentence-transformers marks them) and for inference (NLI) models."""
    labels = _labels(config)
    marks = getattr(config, "sentence_transformers", None) or {}
    activation = str(marks.get("activation_fn", ""))
    problem = config.problem_type
    pairs = bool(marks) or hasattr(config, "sbert_ce_default_activation_function")
    pairs = pairs or any(label.lower().startswith("entail") for label in labels)
    if activation.endswith("Identity") or problem == "regression":
        kind: Literal["sigmoid", "softmax", "none"] = "none"
    elif (
        activation.endswith("Sigmoid")
        or problem == "multi_label_classification"
        or len(labels) == 1
    ):
        kind = "sigmoid"
    else:
        kind = "softmax"
    return ScoringInfo(labels, kind, "pair" if pairs else "single")
