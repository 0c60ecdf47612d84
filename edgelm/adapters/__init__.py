"""Low-rank adapters over the built-in model, which make NER and scoring real offline.

A file holds for each adapted linear layer ``NAME.lora_A`` ``[rank, in]`` and
``NAME.lora_B`` ``[out, rank]`` (Hu et al. 2021, arXiv 2106.09685: the merged weight
is ``W + scale B A``), and whole the weights of the head. Its metadata says over which
weights and on which data it was trained; `examples/adapters/train.py` makes it.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgelm.bundle import file_digest
from edgelm.errors import ModelError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1


def adapter_path(name: str) -> Path:
    """Where a shipped adapter is."""
    with resources.as_file(resources.files(__name__) / f"{name}.safetensors") as path:
        return path


def read_metadata(path: Path) -> dict[str, Any]:
    """What an adapter file says of itself.

    Raises:
        ModelError: It is no adapter of edgelm.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {})["edgelm_adapter"])
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} is not an adapter of edgelm.") from error
    if metadata["format_version"] > FORMAT_VERSION:
        raise ModelError(f"{path} was made by a newer edgelm. Update edgelm.")
    return dict(metadata)


def load_merged(base: Path, name: str) -> tuple[Any, Any, Literal["ner", "scoring"]]:
    """Load the built-in model with an adapter merged into it.

    Args:
        base: Folder of the built-in model.
        name: Name of a shipped adapter.

    Returns:
        The model, its tokenizer and its task.

    Raises:
        ModelError: The adapter was trained over other weights.
    """
    import transformers
    from safetensors.torch import load_file

    path = adapter_path(name)
    about = read_metadata(path)
    if file_digest(base / "model.safetensors") != about["base_sha256"]:
        raise ModelError(
            f"The adapter {name} was trained over other weights than those in {base}."
        )
    tensors = load_file(path)
    labels = dict(enumerate(about["labels"]))
    config = transformers.AutoConfig.from_pretrained(
        base, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    config.architectures = None
    if about["task"] == "scoring":
        # A cross-encoder, marked as sentence-transformers marks one.
        activation = "torch.nn.modules.activation.Sigmoid"
        config.sentence_transformers = {"activation_fn": activation}
    loader: Any = {
        "ner": transformers.AutoModelForTokenClassification,
        "scoring": transformers.AutoModelForSequenceClassification,
    }[about["task"]]
    model = loader.from_config(config)
    state = load_file(base / "model.safetensors")
    state.pop("embeddings.position_ids", None)
    model.base_model.load_state_dict(state, strict=False)
    merge_(model, tensors, about["scale"])
    return model, transformers.AutoTokenizer.from_pretrained(base), about["task"]


def merge_(model: Any, tensors: dict[str, torch.Tensor], scale: float) -> None:
    """Add ``scale B A`` to the adapted weights and set the head's, in place.

    Args:
        model: A model of transformers.
        tensors: What the adapter file holds.
        scale: Of the product.

    Raises:
        ModelError: A name in the file is not in the model.
    """
    import torch

    weights = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key.endswith(".lora_B"):
                continue
            name = (
                key.removesuffix(".lora_A") + ".weight"
                if key.endswith(".lora_A")
                else key
            )
            if name not in weights:
                raise ModelError(
                    f"The adapter adapts {name}, which the model does not have."
                )
            if key.endswith(".lora_A"):
                up = tensors[key.removesuffix("A") + "B"].float()
                weights[name].add_(up @ tensor.float(), alpha=scale)
            else:
                weights[name].copy_(tensor)
