"""Folders as sentence-transformers writes them: the same vectors and scores, or a refusal."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import (
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaModel,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import (
        Dropout,
        LayerNorm,
        Pooling,
        StaticEmbedding,
    )

from edgelm.cli import cli
from edgelm.errors import ModelError
from edgelm.evaluate.reference import open_reference
from edgelm.manifest import ScoringInfo
from edgelm.models import load_model
from edgelm.runtimes import Embedder, Scorer, load
from tests.conftest import export_bundle, save_tiny, tiny_config, tiny_tokenizer

TEXTS = [
    "the old man plays the flute in paris",
    "a",
    "",
    "Anna reads, and Peter writes! un##able (books)",
    "the city of london was on the river " * 8,
]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """What the library logs of every model that it saves."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def transformer(tmp_path: Path) -> Transformer:
    model = BertModel(tiny_config())
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return Transformer(str(save_tiny(tmp_path / "plain", model)))


def saved(folder: Path, *modules: Any, **options: Any) -> SentenceTransformer:
    model = SentenceTransformer(modules=list(modules), **options)
    model.save(str(folder), create_model_card=False)
    return model


def difference(model: SentenceTransformer, embedder: Any) -> float:
    assert isinstance(embedder, Embedder)
    # Each alone: a batch of the library's is padded, which costs the last digits.
    due = np.stack([model.encode(text) for text in TEXTS])
    found = embedder.encode(TEXTS)
    assert found.shape == due.shape
    return float(np.abs(found - due).max())


@pytest.mark.parametrize(
    "mode",
    [
        "cls",
        "max",
        "mean",
        "mean_sqrt_len_tokens",
        "weightedmean",
        "lasttoken",
        ("mean", "cls"),
        ("weightedmean", "max", "mean_sqrt_len_tokens"),
    ],
)
def test_every_pooling(tmp_path: Path, transformer: Transformer, mode: Any) -> None:
    model = saved(tmp_path / "m", transformer, Pooling(32, mode))
    assert difference(model, open_reference(str(tmp_path / "m"))) < 1e-5


def test_flags_of_older_versions_stand_in_the_order_of_the_library(
    tmp_path: Path, transformer: Transformer
) -> None:
    saved(tmp_path / "m", transformer, Pooling(32))
    flags = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    config = {"word_embedding_dimension": 32, **flags}
    (tmp_path / "m/1_Pooling/config.json").write_text(json.dumps(config))
    model = SentenceTransformer(str(tmp_path / "m"))
    embedder = open_reference(str(tmp_path / "m"))
    assert embedder.engine.manifest.embedding is not None
    assert embedder.engine.manifest.embedding.pooling == "cls+mean"
    assert difference(model, embedder) < 1e-5


def test_what_stands_behind_the_pooling_is_exported_and_stays_with_a_checkpoint(
    tmp_path: Path, transformer: Transformer
) -> None:
    chain = (
        Pooling(32, ("cls", "mean")),
        LayerNorm(64),
        Dropout(0.5),
        Dense(64, 24, activation_function=torch.nn.Tanh()),
        Normalize(),
        Dense(24, 20, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    )
    for module in chain:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 0.2, 0.5)
    model = saved(tmp_path / "m", transformer, *chain)
    model.eval()
    bundle = export_bundle(str(tmp_path / "m"), tmp_path / "b", precision="fp32")
    assert difference(model, load(bundle)) < 1e-5
    arguments = ["compress", str(tmp_path / "m"), "-o", str(tmp_path / "c")]
    arguments += ["--sparsity", "2:4", "--max-texts", "16"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    again = SentenceTransformer(str(tmp_path / "c"))
    assert difference(again, open_reference(str(tmp_path / "c"))) < 1e-5
    first, second = (load_model(str(tmp_path / n)).source_digest for n in ("m", "c"))
    assert first == second


def test_other_weights_behind_the_pooling_are_another_source(
    tmp_path: Path, transformer: Transformer
) -> None:
    digests = set()
    for name in "ab":
        saved(tmp_path / name, transformer, Pooling(32), Dense(32, 8))
        digests.add(load_model(str(tmp_path / name)).source_digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (lambda: [Pooling(32), Dense(32, 32, use_residual=True)], "use_residual"),
        (
            lambda: [Pooling(32), Dense(32, 8, activation_function=torch.nn.SiLU())],
            "has the activation torch.nn.modules.activation.SiLU",
        ),
        (lambda: [Normalize("token_embeddings"), Pooling(32)], "exports Transformer, "),
        (lambda: [Pooling(32), Normalize("token_embeddings")], "is for token_emb"),
        (list, "the sentence-transformers modules Transformer; for embedding"),
    ],
)
def test_chains_that_are_refused(
    tmp_path: Path, transformer: Transformer, modules: Any, message: str
) -> None:
    saved(tmp_path / "m", transformer, *modules())
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "m"))


def test_modules_of_other_code_or_place_are_refused(
    tmp_path: Path, transformer: Transformer
) -> None:
    saved(tmp_path / "m", transformer, Pooling(32), Dense(32, 8))
    path = tmp_path / "m" / "modules.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps([{**given[0], "type": "own.Transformer"}, *given[1:]]))
    with pytest.raises(ModelError, match=r"module of its own, own\.Transformer"):
        load_model(str(tmp_path / "m"))
    path.write_text(json.dumps([*given[:2], {**given[2], "path": "../2_Dense"}]))
    with pytest.raises(ModelError, match="outside of its folder"):
        load_model(str(tmp_path / "m"))
    path.write_text(json.dumps(given))
    (tmp_path / "m/2_Dense/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no 2_Dense/model\.safetensors"):
        load_model(str(tmp_path / "m"))


def test_prompts_outside_of_pooling_are_refused(
    tmp_path: Path, transformer: Transformer
) -> None:
    pooling = Pooling(32, include_prompt=False)
    saved(tmp_path / "m", transformer, pooling, prompts={"query": "the old "})
    with pytest.raises(ModelError, match="out of pooling"):
        load_model(str(tmp_path / "m"))
    model = saved(tmp_path / "without", transformer, pooling)
    assert difference(model, open_reference(str(tmp_path / "without"))) < 1e-5


def test_another_output_than_the_last_layer_is_refused(
    tmp_path: Path, transformer: Transformer
) -> None:
    saved(tmp_path / "m", transformer, Pooling(32))
    path = tmp_path / "m" / "sentence_bert_config.json"
    config = json.loads(path.read_text())
    config["modality_config"]["text"]["method_output_name"] = ["hidden_states", -2]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is made of the model's"):
        load_model(str(tmp_path / "m"))


def test_the_longest_text_of_the_files_goes_before_the_tokenizers(
    tmp_path: Path, transformer: Transformer
) -> None:
    transformer.max_seq_length = 8
    saved(tmp_path / "m", transformer, Pooling(32))
    assert load_model(str(tmp_path / "m")).max_length == 8
    path = tmp_path / "m" / "sentence_bert_config.json"
    path.write_text('{"max_seq_length": 24, "do_lower_case": false}')
    model = SentenceTransformer(str(tmp_path / "m"))
    assert load_model(str(tmp_path / "m")).max_length == 24
    assert difference(model, open_reference(str(tmp_path / "m"))) < 1e-5


def test_lower_letters_where_the_files_ask_for_them(tmp_path: Path) -> None:
    from tokenizers.normalizers import BertNormalizer

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)
    BertModel(tiny_config()).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    saved(tmp_path / "m", Transformer(str(tmp_path / "plain")), Pooling(32))
    path = tmp_path / "m" / "sentence_bert_config.json"
    path.write_text('{"max_seq_length": 24, "do_lower_case": true}')
    model = SentenceTransformer(str(tmp_path / "m"))
    assert (model.encode("Anna") == model.encode("anna")).all()
    assert difference(model, open_reference(str(tmp_path / "m"))) < 1e-5


@pytest.mark.parametrize(("pad", "longest"), [(1, 32), (5, 28)])
def test_positions_behind_the_paddings(tmp_path: Path, pad: int, longest: int) -> None:
    """RoBERTa's first position is the one behind its padding token's number."""
    settings = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 1}
    config = RobertaConfig(
        **settings,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=34,
        pad_token_id=pad,
    )
    folder = save_tiny(tmp_path / "m", RobertaModel(config))
    assert load_model(str(folder)).max_length == longest


@pytest.mark.parametrize(
    ("labels", "function", "activation"),
    [
        (1, None, "sigmoid"),
        (3, None, "none"),
        (1, torch.nn.Identity(), "none"),
        pytest.param(
            3,
            torch.nn.Softmax(dim=-1),
            "softmax",
            # Read again, the function has lost its axis.
            marks=pytest.mark.filterwarnings("ignore:Implicit dimension"),
        ),
    ],
)
def test_cross_encoders(
    tmp_path: Path, labels: int, function: Any, activation: str
) -> None:
    plain = BertForSequenceClassification(tiny_config(num_labels=labels))
    torch.nn.init.normal_(plain.classifier.weight, 0, 0.5)
    save_tiny(tmp_path / "plain", plain)
    model = CrossEncoder(str(tmp_path / "plain"), activation_fn=function)
    model.save(str(tmp_path / "m"), create_model_card=False)
    pairs = [(TEXTS[0], TEXTS[3]), ("", ""), (TEXTS[4], "a"), (TEXTS[4], TEXTS[4])]
    due = np.stack([model.predict([pair])[0] for pair in pairs])
    scorer = open_reference(str(tmp_path / "m"))
    assert isinstance(scorer, Scorer)
    info = scorer.engine.manifest.scoring
    assert isinstance(info, ScoringInfo)
    assert (info.activation, info.inputs) == (activation, "pair")
    np.testing.assert_allclose(scorer.score(pairs), due, atol=1e-5)
    arguments = ["compress", str(tmp_path / "m"), "-o", str(tmp_path / "c")]
    arguments += ["--sparsity", "0.5", "--max-texts", "16"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert load_model(str(tmp_path / "c")).info == info
    again = CrossEncoder(str(tmp_path / "c"))
    due = np.stack([again.predict([pair])[0] for pair in pairs])
    scorer = open_reference(str(tmp_path / "c"))
    np.testing.assert_allclose(scorer.score(pairs), due, atol=1e-5)


def test_a_cross_encoder_with_another_function_is_refused(tmp_path: Path) -> None:
    config = tiny_config(num_labels=1)
    save_tiny(tmp_path / "plain", BertForSequenceClassification(config))
    model = CrossEncoder(str(tmp_path / "plain"), activation_fn=torch.nn.Tanh())
    model.save(str(tmp_path / "m"), create_model_card=False)
    with pytest.raises(ModelError, match=r"turns logits into scores by .*Tanh"):
        load_model(str(tmp_path / "m"))


def test_a_model_without_a_transformer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m", StaticEmbedding(tiny_tokenizer(), embedding_dim=8))
    with pytest.raises(ModelError, match="whose first module is a Transformer"):
        load_model(str(tmp_path / "m"))
