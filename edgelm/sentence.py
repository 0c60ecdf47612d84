"""Folders of sentence-transformers: which modules they name, what these compute, prompts and limits.

An embedding model is a Transformer, a Pooling, and what stands behind it; a cross-encoder is a Transformer
alone. Whatever else there is changes the result, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from edgelm.errors import ModelError
from edgelm.manifest import EmbeddingInfo
from edgelm.schema import read_json

MODULES = "modules.json"
ABOUT = "config_sentence_transformers.json"
_TRANSFORMER = "sentence_bert_config.json"
# Name in the files -> name in a manifest; joined, they stand in this order.
POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
# The files of older versions have a flag for each.
_FLAGS = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
# What may stand behind the pooling, and which sizes its config.json must name.
_BEHIND: Mapping[str, tuple[str, ...]] = {
    "Dense": ("in_features", "out_features"),
    "LayerNorm": ("dimension",),
    "Normalize": (),
    "Dropout": (),
}
# What a Transformer has to give, by the task.
_OUTPUTS = {"embedding": "last_hidden_state", "scoring": "logits"}
Activation = Literal["none", "sigmoid", "softmax"]
_ACTIVATIONS: Mapping[str, Activation] = {
    "Identity": "none",
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
}


@dataclass(frozen=True)
class Module:
    """A module: name of its class, and its folder in the model's."""

    kind: str
    path: str


def is_cross_encoder(folder: Path) -> bool:
    """Whether a folder says that it holds a cross-encoder."""
    return bool(read_json(folder / ABOUT).get("model_type") == "CrossEncoder")


def read_modules(
    folder: Path, name: str, task: Literal["embedding", "scoring"]
) -> tuple[Module, ...]:
    """The modules of a folder, in order; none where it names none.

    Raises:
        ModelError: Together they are no chain that edgelm exports.
    """
    found = []
    for module in read_json(folder / MODULES) or []:
        library, _, kind = module["type"].rpartition(".")
        if not library.startswith("sentence_transformers."):
            raise ModelError(
                f"{name} has a module of its own, {module['type']}, whose code edgelm does not run. "
                "Use a model of sentence-transformers' own modules."
            )
        path = PurePosixPath(module["path"])
        if path.is_absolute() or ".." in path.parts:
            raise ModelError(f"{name} has a module outside of its folder: {path}.")
        found.append(Module(kind, module["path"]))
    kinds = [module.kind for module in found]
    first = ["Transformer", "Pooling"] if task == "embedding" else ["Transformer"]
    allowed = tuple(_BEHIND) if task == "embedding" else ()
    others = [kind for kind in kinds[len(first) :] if kind not in allowed]
    if found and (kinds[: len(first)] != first or others):
        raise ModelError(
            f"{name} has the sentence-transformers modules {', '.join(kinds)}; for {task} edgelm exports "
            f"{', '.join([*first, *allowed[:1]])}{' and the like behind them' if allowed else ' alone'}."
        )
    for module in found[len(first) :]:
        config = read_json(folder / module.path / "config.json")
        for key in _BEHIND[module.kind]:
            if not isinstance(config.get(key), int):
                raise ModelError(
                    f"The module {module.kind} of {name} has no {key} in {module.path}/config.json."
                )
    if found:
        _check_transformer(folder, name, _OUTPUTS[task])
    return tuple(found)


def _check_transformer(folder: Path, name: str, due: str) -> None:
    config = read_json(folder / _TRANSFORMER)
    text = (config.get("modality_config") or {}).get("text", {})
    given = text.get("method_output_name", due)
    if text.get("method", "forward") != "forward" or given not in (due, [due]):
        raise ModelError(
            f"{name} is made of the model's {given}; edgelm exports models that are made of its {due}."
        )
    if config.get("processing_kwargs"):
        raise ModelError(
            f"{name} has processing_kwargs in {_TRANSFORMER}, which edgelm does not apply. "
            "Save it without them, its longest input as max_seq_length."
        )


def files(folder: Path) -> Iterator[str]:
    """What a checkpoint passes on, as paths in the model's folder; the transformer's own files are not among them."""
    for name in (MODULES, ABOUT, _TRANSFORMER):
        if (folder / name).is_file():
            yield name
    for module in read_json(folder / MODULES) or []:
        if module["path"]:
            for name in ("config.json", "model.safetensors"):
                if (folder / module["path"] / name).is_file():
                    yield f"{module['path']}/{name}"


def weight_files(folder: Path) -> list[Path]:
    """Where the weights of modules behind the transformer are."""
    return [folder / name for name in files(folder) if name.endswith(".safetensors")]


def text_limit(folder: Path) -> int | None:
    """The longest input in tokens that the files name; it goes before the tokenizer's."""
    limit = read_json(folder / _TRANSFORMER).get("max_seq_length")
    return None if limit is None else int(limit)


def lowercase_(folder: Path, tokenizer: Any) -> None:
    """Let a tokenizer of transformers lower letters, in place, where the files ask for it."""
    if not read_json(folder / _TRANSFORMER).get("do_lower_case"):
        return
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    before = backend.normalizer
    if isinstance(before, Sequence) and isinstance(before[0], Lowercase):
        return  # a checkpoint's has it already
    backend.normalizer = Sequence([Lowercase(), *([] if before is None else [before])])


def embedding_info(folder: Path, config: Any, name: str) -> EmbeddingInfo:
    """Pooling, normalisation and prompts of a folder.

    Without modules mean pooling and no normalisation, as sentence-transformers does.

    Raises:
        ModelError: It pools in a way that edgelm does not export.
    """
    modules = read_modules(folder, name, "embedding")
    modes: list[str] = ["mean"]
    about = read_json(folder / ABOUT)
    prompts = {k: v for k, v in (about.get("prompts") or {}).items() if v}
    if modules:
        pooling = read_json(folder / modules[1].path / "config.json")
        modes = _modes(pooling, name)
        if prompts and not pooling.get("include_prompt", True):
            raise ModelError(
                f"{name} leaves the tokens of its prompts out of pooling (include_prompt), which edgelm does not. "
                "Use a model that pools all tokens."
            )
    width = int(config.get_text_config().hidden_size) * len(modes)
    for module in modules:
        if module.kind == "Dense":
            width = int(read_json(folder / module.path / "config.json")["out_features"])
    default = about.get("default_prompt_name")
    shorter = getattr(config, "matryoshka_dimensions", None) or ()
    return EmbeddingInfo(
        width,
        "+".join(POOLINGS[mode] for mode in modes),
        bool(modules) and without_dropout(modules)[-1].kind == "Normalize",
        prompts,
        default if default in prompts else None,
        tuple(sorted(int(n) for n in shorter if 0 < int(n) <= width)),
    )


def _modes(config: Mapping[str, Any], name: str) -> list[str]:
    """Both forms: ``pooling_mode``, or a flag for each mode."""
    mode = config.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode or [])
    if not modes:
        on = [_FLAGS[k] for k in _FLAGS if config.get(f"pooling_mode_{k}")]
        modes = on or ["mean"]
    unknown = [mode for mode in modes if mode not in POOLINGS]
    if unknown:
        raise ModelError(
            f"{name} pools by {unknown[0]}; edgelm exports {', '.join(POOLINGS)} pooling."
        )
    return modes


def without_dropout(modules: tuple[Module, ...]) -> list[Module]:
    """The modules that do something when nothing is trained."""
    return [module for module in modules if module.kind != "Dropout"]


def cross_encoder_activation(
    folder: Path, config: Any, name: str, labels: int
) -> Activation | None:
    """What a cross-encoder does with its logits; None where nothing marks the model as one.

    Without a function of torch's it is a sigmoid for one label and nothing for several, as
    sentence-transformers has it.

    Raises:
        ModelError: It is a function that edgelm does not have, or there are prompts.
    """
    marks = getattr(config, "sentence_transformers", None) or {}
    old = getattr(config, "sbert_ce_default_activation_function", None)
    about = read_json(folder / ABOUT) if is_cross_encoder(folder) else {}
    if about:
        read_modules(folder, name, "scoring")
        if (about.get("prompts") or {}).get(about.get("default_prompt_name")):
            raise ModelError(
                f"{name} puts a prompt before what it scores, which edgelm does not."
            )
    elif not marks and old is None:
        return None
    path = str(marks.get("activation_fn") or old or about.get("activation_fn") or "")
    if not path.startswith("torch."):
        return "sigmoid" if labels == 1 else "none"
    kind = path.rpartition(".")[2]
    if kind not in _ACTIVATIONS:
        raise ModelError(
            f"{name} turns logits into scores by {path}; edgelm knows {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[kind]
