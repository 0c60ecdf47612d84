"""Tokens that count by how likely the dense model finds an entity there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from edgelm.calibration import Batch, Calibration
from edgelm.compress import Blocks
from edgelm.compress.weighting import FLOOR, by_entity
from edgelm.errors import CompressionError
from edgelm.models import load_model
from edgelm.pipeline import calibration_sets
from tests.compress.test_blocks import COMMON, DEBERTA
from tests.conftest import save_tiny

CONFIGS: dict[str, Any] = {
    "bert": lambda: tf.BertConfig(**COMMON),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=65, dim=32, n_layers=3, n_heads=4, hidden_dim=48, pad_token_id=0
    ),
    "albert": lambda: tf.AlbertConfig(**COMMON, embedding_size=16),
    "electra": lambda: tf.ElectraConfig(**COMMON, embedding_size=16),
    "deberta-v2": lambda: tf.DebertaV2Config(**COMMON, **DEBERTA),
    "modernbert": lambda: tf.ModernBertConfig(
        **COMMON, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    ),
    "xlm-roberta": lambda: tf.XLMRobertaConfig(**{**COMMON, "pad_token_id": 1}),
}
LABELS = {0: "B-PER", 1: "O", 2: "I-PER"}


def save_classifier(folder: Path, name: str, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.id2label = LABELS
    config.label2id = {label: i for i, label in LABELS.items()}
    model = tf.AutoModelForTokenClassification.from_config(config)
    with torch.no_grad():  # labels far enough apart to weigh differently
        model.classifier.weight.mul_(20)
    return save_tiny(folder, model.to(dtype))


def batches(pad: int) -> list[Batch]:
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    one = torch.randint(5, 60, (1, 1))
    return [
        Batch(ids * mask + pad * (1 - mask), mask),
        Batch(one, torch.ones_like(one)),
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_of_the_whole_model_at_once(
    tmp_path: Path, name: str, stream: bool
) -> None:
    folder = save_classifier(tmp_path / "model", name, torch.float32)
    loaded = load_model(str(folder), stream=stream)
    sample = batches(1 if name == "xlm-roberta" else 0)
    found = by_entity(Blocks(loaded.model, source=loaded.weights), sample, outside=1)
    whole = tf.AutoModelForTokenClassification.from_pretrained(folder).eval()
    for batch, new in zip(sample, found, strict=True):
        with torch.no_grad():
            logits = whole(batch.input_ids, attention_mask=batch.attention_mask).logits
        entity = logits.softmax(-1)[..., [0, 2]].sum(-1)
        due = entity.clamp(min=FLOOR) * batch.attention_mask
        torch.testing.assert_close(new.weights, due, atol=1e-5, rtol=1e-4)
        assert torch.equal(new.input_ids, batch.input_ids)
    assert found[0].weights[0].std() > 0


def test_a_bfloat16_model_weighs_in_float32(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "model", "bert", torch.bfloat16)
    loaded = load_model(str(folder), stream=True)
    found = by_entity(
        Blocks(loaded.model, source=loaded.weights), batches(0), outside=1
    )
    assert all(batch.weights.dtype == torch.float32 for batch in found)
    assert all(p.dtype == torch.bfloat16 for p in loaded.model.classifier.parameters())


def test_only_a_model_of_entities_weighs_by_them(
    tiny_embedding: Path, tiny_ner: Path
) -> None:
    texts = ["the man plays a flute", "paris"]
    loaded = load_model(str(tiny_ner))
    by_default, _ = calibration_sets(loaded, Blocks(loaded.model), texts, Calibration())
    asked = Calibration(weighting="entity")
    weighed, _ = calibration_sets(loaded, Blocks(loaded.model), texts, asked)
    assert torch.equal(by_default[0].weights, weighed[0].weights)
    assert weighed[0].weights.max() < 1
    loaded = load_model(str(tiny_embedding))
    with pytest.raises(CompressionError, match="Use --weighting text or token"):
        calibration_sets(loaded, Blocks(loaded.model), texts, asked)
