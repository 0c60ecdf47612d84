"""Tiny models built in memory, and the real one exported once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny tensors: threads would only wait for each other, all the more on a busy machine.
torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEXT = (
    "the a of to and in is was on for with as by at from it an be this that which or "
    "new old man woman city river plays sings reads writes runs book flute garden "
    "market train winter paris london anna peter un ##able ##s ##ing ##ed ##er ##ly "
    "##al , . ? ! - ' \" ( )"
)
WORDS = TEXT.split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test draws from its own name's seed."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  hypothesis and libraries use it
    torch.manual_seed(seed)


def tiny_tokenizer() -> Any:
    """A WordPiece tokenizer of transformers over some sixty words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return BertTokenizerFast(tokenizer_object=backend, model_max_length=32)


def tiny_config(**changes: Any) -> Any:
    """A BERT of two layers and hidden size 32."""
    from transformers import BertConfig

    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    return BertConfig(**{**settings, **changes})


def save_tiny(folder: Path, model: Any) -> Path:
    """Write a model and the tiny tokenizer as transformers does."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _embedding() -> Any:
    from transformers import BertModel

    return BertModel(tiny_config())


def _ner() -> Any:
    from transformers import BertForTokenClassification

    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    return BertForTokenClassification(tiny_config(id2label=dict(enumerate(labels))))


def _scorer() -> Any:
    from transformers import BertForSequenceClassification

    config = tiny_config(num_labels=1)
    config.sentence_transformers = {
        "activation_fn": "torch.nn.modules.activation.Sigmoid"
    }
    return BertForSequenceClassification(config)


TINY: dict[str, Callable[[], Any]] = {
    "embedding": _embedding,
    "ner": _ner,
    "scorer": _scorer,
}


def export_bundle(model: str, path: Path, **options: Any) -> Path:
    """Export a model for the CPU."""
    from edgelm.export import export
    from edgelm.models import load_model

    export(load_model(model), options.pop("target", "cpu"), path, **options)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models, made once a session; not to be changed."""
    root = tmp_path_factory.mktemp("tiny")

    def get(kind: str) -> Path:
        if not (root / kind).exists():
            torch.manual_seed(0)
            save_tiny(root / kind, TINY[kind]())
        return root / kind

    return get


@pytest.fixture(scope="session")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]
) -> Callable[..., Path]:
    """Bundles of tiny and built-in models, exported once a session; not to be changed."""
    root = tmp_path_factory.mktemp("bundles")

    def get(
        model: str = "minilm", precision: str = "fp32", target: str = "cpu"
    ) -> Path:
        path = root / f"{model}-{precision}-{target}"
        if not path.exists():
            source = str(tiny(model)) if model in TINY else model
            export_bundle(source, path, precision=precision, target=target)
        return path

    return get


@pytest.fixture
def tiny_embedding(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with a tiny BERT without a head."""
    return shutil.copytree(tiny("embedding"), tmp_path / "tiny")


@pytest.fixture
def tiny_ner(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with a tiny token classifier, BIO over two types."""
    return shutil.copytree(tiny("ner"), tmp_path / "tiny-ner")


@pytest.fixture
def tiny_scorer(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with a tiny cross-encoder of one label."""
    return shutil.copytree(tiny("scorer"), tmp_path / "tiny-scorer")


@pytest.fixture
def tiny_bundle(bundles: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle of the tiny embedding model, float32."""
    return shutil.copytree(bundles("embedding"), tmp_path / "bundle")


def with_token_embeddings(bundle: Path, to: Path) -> Path:
    """The same bundle, whose graph also gives what its last layer norm gives."""
    from dataclasses import replace

    import onnx

    from edgelm.bundle import (
        MANIFEST,
        open_bundle,
        seal,
    )
    from edgelm.manifest import Tensor

    shutil.copytree(bundle, to)
    manifest = open_bundle(to).manifest
    model = onnx.load(to / manifest.graph.file)
    norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
    assert manifest.embedding is not None
    shape = ("batch", "sequence", manifest.embedding.dimension)
    model.graph.node.append(
        onnx.helper.make_node("Identity", [norms[-1].output[0]], ["token_embeddings"])
    )
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("token_embeddings", 1, shape)
    )
    onnx.save(model, to / manifest.graph.file)
    (to / MANIFEST).unlink()
    outputs = (*manifest.graph.outputs, Tensor("token_embeddings", "float32", shape))
    seal(to, replace(manifest, graph=replace(manifest.graph, outputs=outputs)))
    return to
