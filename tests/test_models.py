"""References to models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from edgelm.errors import ModelError
from edgelm.manifest import EmbeddingInfo, NerInfo, ScoringInfo
from edgelm.models import load_model
from tests.conftest import save_tiny, tiny_config


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def modules(*kinds: str) -> list[dict[str, Any]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    return [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(k, f"{i}_{k}"),
            "type": f"sentence_transformers.models.{k}",
        }
        for i, k in enumerate(kinds)
    ]


def test_minilm_resolves_to_the_packaged_weights() -> None:
    loaded = load_model("minilm")
    assert loaded.task == "embedding"
    assert loaded.info == EmbeddingInfo(384, "mean", True)
    assert loaded.max_length == 256
    assert (
        loaded.source_digest
        == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )
    assert not loaded.model.training


def test_tasks_are_inferred(
    tiny_embedding: Path, tiny_ner: Path, tiny_scorer: Path, tmp_path: Path
) -> None:
    assert load_model(str(tiny_embedding)).info == EmbeddingInfo(32, "mean", False)
    assert load_model(str(tiny_ner)).info == NerInfo(
        ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), "BIO"
    )
    assert load_model(str(tiny_scorer)).info == ScoringInfo(
        ("LABEL_0",), "sigmoid", "pair"
    )
    small = {
        "vocab_size": 70,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
    }
    llama = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2))
    loaded = load_model(str(save_tiny(tmp_path / "lm", llama)))
    assert (loaded.task, loaded.info) == ("lm", None)


def test_a_masked_language_model_needs_to_be_told_its_use(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "mlm", BertForMaskedLM(tiny_config()))
    with pytest.raises(ModelError, match=r"is for fill-mask.*--task embedding"):
        load_model(str(folder))
    assert load_model(str(folder), "embedding").task == "embedding"


def test_a_head_that_was_never_trained_is_refused(tiny_embedding: Path) -> None:
    """transformers would fill it with random numbers and warn."""
    with pytest.raises(
        ModelError, match=r"lack classifier\..*cannot be used for the task ner"
    ):
        load_model(str(tiny_embedding), "ner")


def test_a_built_in_model_has_one_task() -> None:
    with pytest.raises(ModelError, match="is for the task embedding, not ner"):
        load_model("minilm", "ner")


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean", "embedding_dimension": 32}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_sentence_transformers_files_are_read(
    tiny_embedding: Path, config: dict[str, Any], pooling: str
) -> None:
    write_json(
        tiny_embedding / "modules.json", modules("Transformer", "Pooling", "Normalize")
    )
    write_json(tiny_embedding / "1_Pooling" / "config.json", config)
    write_json(tiny_embedding / "sentence_bert_config.json", {"max_seq_length": 24})
    prompts = {"query": "query: ", "passage": "passage: ", "none": ""}
    write_json(
        tiny_embedding / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": "passage"},
    )
    loaded = load_model(str(tiny_embedding))
    kept = {"query": "query: ", "passage": "passage: "}
    assert loaded.info == EmbeddingInfo(32, pooling, True, kept, "passage")
    assert loaded.max_length == 24


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (
            ("Transformer", "Pooling"),
            {"pooling_mode": "median"},
            "pools by median",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode": ["cls", "median"]},
            "pools by median",
        ),
        (("Transformer", "Pooling", "CNN"), {}, "modules Transformer, Pooling, CNN"),
        (("Transformer", "Pooling", "Dense"), {}, "Dense of .* has no in_features"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tiny_embedding: Path, kinds: tuple[str, ...], pooling: dict[str, Any], message: str
) -> None:
    write_json(tiny_embedding / "modules.json", modules(*kinds))
    write_json(tiny_embedding / "1_Pooling" / "config.json", pooling)
    with pytest.raises(ModelError, match=message):
        load_model(str(tiny_embedding))


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ({"num_labels": 3}, ("softmax", "single")),
        ({"num_labels": 1}, ("sigmoid", "single")),
        ({"num_labels": 1, "problem_type": "regression"}, ("none", "single")),
        (
            {"num_labels": 4, "problem_type": "multi_label_classification"},
            ("sigmoid", "single"),
        ),
        (
            {"id2label": {0: "entailment", 1: "neutral", 2: "contradiction"}},
            ("softmax", "pair"),
        ),
    ],
)
def test_what_a_classifier_takes_and_gives(
    tmp_path: Path, changes: dict[str, Any], due: tuple[str, str]
) -> None:
    model = BertForSequenceClassification(tiny_config(**changes))
    info = load_model(str(save_tiny(tmp_path / "m", model))).info
    assert isinstance(info, ScoringInfo)
    assert (info.activation, info.inputs) == due


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder .*nothing.*minilm"):
        load_model(str(tmp_path / "nothing"))


def test_a_hub_id_that_cannot_be_reached() -> None:
    with pytest.raises(ModelError, match="cannot be fetched from the hub"):
        load_model("someone/some-model")


def test_a_file_or_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "f").touch()
    with pytest.raises(ModelError, match="is a file"):
        load_model(str(tmp_path / "f"))


def test_a_bundle_is_no_model(tiny_bundle: Path) -> None:
    with pytest.raises(ModelError, match="It is a bundle"):
        load_model(str(tiny_bundle))


def test_pickled_weights_are_refused(tiny_embedding: Path) -> None:
    torch.save({}, tiny_embedding / "pytorch_model.bin")
    (tiny_embedding / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"only as a pickle \(pytorch_model\.bin\).*safetensors"
    ):
        load_model(str(tiny_embedding))


def test_no_weights_at_all(tiny_embedding: Path) -> None:
    (tiny_embedding / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_model(str(tiny_embedding))


def test_damaged_weights(tiny_embedding: Path) -> None:
    path = tiny_embedding / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(str(tiny_embedding))


def test_remote_code_is_refused(tiny_embedding: Path) -> None:
    config = json.loads((tiny_embedding / "config.json").read_text(encoding="utf-8"))
    config.update(model_type="my-own", auto_map={"AutoModel": "modeling.MyModel"})
    write_json(tiny_embedding / "config.json", config)
    with pytest.raises(ModelError, match="needs code from its own repository"):
        load_model(str(tiny_embedding))


def test_an_architecture_that_transformers_does_not_know(tiny_embedding: Path) -> None:
    write_json(
        tiny_embedding / "config.json",
        {"model_type": "my-own", "architectures": ["MyModel"]},
    )
    with pytest.raises(ModelError, match="does not know the architecture 'my-own'"):
        load_model(str(tiny_embedding))


def test_a_config_that_is_not_json(tiny_embedding: Path) -> None:
    (tiny_embedding / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="is not JSON"):
        load_model(str(tiny_embedding))


def test_sharded_weights_load(tmp_path: Path) -> None:
    model = BertModel(tiny_config())
    folder = save_tiny(tmp_path / "m", model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    loaded = load_model(str(folder))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], value)
    assert len(loaded.source_digest) == 64


def test_other_files_beside_the_weights_are_not_read(tiny_embedding: Path) -> None:
    from safetensors.torch import load_file, save_file

    dense = load_model(str(tiny_embedding))
    state = load_file(tiny_embedding / "model.safetensors")
    others = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_file(others, tiny_embedding / "other.safetensors")
    streamed = load_model(str(tiny_embedding), stream=True)
    assert streamed.source_digest == dense.source_digest
    assert streamed.weights is not None
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(streamed.weights.read(name), state[name])


def test_a_folder_without_a_tokenizer(tiny_embedding: Path) -> None:
    """transformers makes one that knows no word."""
    for path in tiny_embedding.glob("token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer: .*vocab\.txt"):
        load_model(str(tiny_embedding))


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", BertModel(tiny_config(vocab_size=40)))
    with pytest.raises(ModelError, match="do not belong together"):
        load_model(str(folder))


def test_labels_that_are_not_numbered_from_zero(tmp_path: Path) -> None:
    config = tiny_config(id2label={1: "O", 2: "B-PER", 5: "I-PER"})
    folder = save_tiny(tmp_path / "m", BertForTokenClassification(config))
    with pytest.raises(ModelError, match=r"are numbered 1, 2, 5; .*Mend id2label"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("labels", "due", "scheme"),
    [
        (["I_PER", "o", "B_PER"], ["I-PER", "O", "B-PER"], "BIO"),
        (["O", "b-per", "i-per"], ["O", "B-per", "I-per"], "BIO"),
        (
            ["O", "PER-B", "PER-I", "PER-E", "PER-S"],
            ["O", "B-PER", "I-PER", "E-PER", "S-PER"],
            "BIOES",
        ),
        (["O", "B-A_B", "I-A_B"], ["O", "B-A_B", "I-A_B"], "BIO"),
        (["O", "PER", "E_MAIL"], ["O", "PER", "E_MAIL"], "IO"),
        (["O", "B_PER", "I-PER", "DATE"], ["O", "B_PER", "I-PER", "DATE"], "IO"),
    ],
)
def test_spellings_of_labels(
    tmp_path: Path, labels: list[str], due: list[str], scheme: str
) -> None:
    config = tiny_config(id2label=dict(enumerate(labels)))
    folder = save_tiny(tmp_path / "m", BertForTokenClassification(config))
    assert load_model(str(folder)).info == NerInfo(tuple(due), scheme)  # type: ignore[arg-type]


def test_a_text_is_cut_on_the_side_of_its_tokenizer(tmp_path: Path) -> None:
    from edgelm.evaluate.reference import open_reference

    folder = save_tiny(tmp_path / "m", BertModel(tiny_config()))
    path = folder / "tokenizer_config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**about, "truncation_side": "left"})
    embedder: Any = open_reference(str(folder))
    words = ["city"] * 30 + ["river"] * 30
    long, end = embedder.encode([" ".join(words), "river " * 30])
    assert long.tolist() == end.tolist()
