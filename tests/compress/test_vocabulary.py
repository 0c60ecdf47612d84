"""Trimmed vocabularies: the same pieces and vectors on the text, smaller pieces elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import edgelm
from edgelm import samples
from edgelm.cli import cli
from edgelm.compress.pieces import Bpe, Unigram
from edgelm.compress.vocabulary import Vocabulary, trim_model_, trim_vocabulary
from edgelm.errors import CompressionError, ConfigError
from edgelm.models import LoadedModel, load_model
from tests.conftest import TINY, save_tiny, tiny_config

TEXTS = samples.calibration()
KEPT = TEXTS[:150]
OTHER = [
    *TEXTS[600:900],
    "Größe, naïve café",
    "",
    "x" * 120,
    "日本 zażółć 🙂",
    "\tTab\n",
]


def word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False
    )


def byte_bpe() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def suffix_bpe() -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )


def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=2000,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )


KINDS = {f.__name__: f for f in (word_piece, byte_bpe, suffix_bpe, unigram)}


def train(kind: str) -> Any:
    """A tokenizer of transformers, trained on the built-in sample."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, trainer = KINDS[kind]()
    tokenizer.train_from_iterator(TEXTS, trainer)
    begin, end = ("[CLS]", "[SEP]") if kind == "word_piece" else ("<s>", "</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B {end}",
        special_tokens=[(t, tokenizer.token_to_id(t)) for t in (begin, end)],
    )
    pad = "[PAD]" if kind == "word_piece" else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end
    )


def loaded(tokenizer: Any, model: Any) -> LoadedModel:
    info = edgelm.manifest.EmbeddingInfo(32, "mean", True)
    return LoadedModel(
        "tiny", Path(), "embedding", model.eval(), tokenizer, 32, info, ""
    )


def pieces(tokenizer: Any, texts: list[str]) -> list[list[str]]:
    return [e.tokens for e in tokenizer.backend_tokenizer.encode_batch(texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_kept_tokens_comes_out_as_before(kind: str) -> None:
    from transformers import BertModel

    tokenizer = train(kind)
    model = BertModel(tiny_config(vocab_size=len(tokenizer) + 7))
    whole = model.get_input_embeddings().weight.detach().clone()  # type: ignore[union-attr, operator]
    got = trim_vocabulary(loaded(tokenizer, model), Vocabulary(), lambda: KEPT, "d")
    small = got.tokenizer
    assert len(small) < len(tokenizer)
    assert model.config.vocab_size == len(small)
    table = model.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    assert table.shape[0] == len(small)
    # The numbers have no holes, and each row is that of the same token.
    assert sorted(small.get_vocab().values()) == list(range(len(small)))
    for token, i in small.get_vocab().items():
        assert torch.equal(table[i], whole[tokenizer.get_vocab()[token]]), token
    assert pieces(small, KEPT) == pieces(tokenizer, KEPT)
    for name in ("pad_token", "bos_token", "eos_token"):
        assert getattr(small, name) == getattr(tokenizer, name)


@pytest.mark.parametrize("kind", KINDS)
def test_other_text_falls_back_to_smaller_pieces(kind: str) -> None:
    from transformers import BertModel

    tokenizer = train(kind)
    model = BertModel(tiny_config(vocab_size=len(tokenizer)))
    unknown = {"[UNK]", "<unk>"}
    got = trim_vocabulary(loaded(tokenizer, model), Vocabulary(), lambda: KEPT, "d")
    before, after = pieces(tokenizer, OTHER), pieces(got.tokenizer, OTHER)
    longer = 0
    for text, old, new in zip(OTHER, before, after, strict=True):
        # Nothing that had pieces loses them, and where all are kept, they are the same.
        lost = sum(t in unknown for t in new) - sum(t in unknown for t in old)
        assert lost <= 0, text
        if set(old) <= set(got.tokenizer.get_vocab()):
            assert new == old, text
        longer += len(new) > len(old)
    assert longer


def test_a_size_keeps_the_most_frequent(tiny_embedding: Path) -> None:
    tokenizer = train("word_piece")
    from transformers import BertModel

    sizes = []
    for size in (1, 100, None):
        model = BertModel(tiny_config(vocab_size=len(tokenizer)))
        got = trim_vocabulary(
            loaded(tokenizer, model), Vocabulary(size=size), lambda: TEXTS, "d"
        )
        sizes.append(len(got.tokenizer))
        (step,) = got.steps
        assert (step["kept"], step["of"]) == (sizes[-1], len(tokenizer))
        common = pieces(tokenizer, ["the of and to"])[0]
        if size != 1:
            assert pieces(got.tokenizer, ["the of and to"])[0] == common
    assert sizes == sorted(set(sizes))


def test_merges_that_lead_elsewhere_still_close() -> None:
    """A token that its own characters do not merge to, as converted vocabularies have."""
    vocab = {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    model = Bpe({"vocab": vocab, "merges": ["b c", "a b", "ab c"]})
    assert model.closure({"abc"}) == {"a", "b", "c", "ab", "abc"}
    kept = {"a", "b", "c", "bc"}
    assert model.trimmed(kept, {0: 0, 1: 1, 2: 2, 4: 3})["merges"] == ["b c"]


def test_a_tied_head_stays_tied_and_a_free_one_follows() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        config = LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=[5, 9],
            bos_token_id=4,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config).eval()
        ids = [0, 4, 5, 9, 19]
        with torch.no_grad():
            before = model(torch.tensor([[4, 19, 9]])).logits[..., ids]
            trim_model_(model, ids)
            after = model(torch.tensor([[1, 4, 3]])).logits
        torch.testing.assert_close(after, before)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert model.config.vocab_size == 5
        assert (model.config.bos_token_id, model.config.eos_token_id) == (1, [2, 3])


def test_a_table_that_is_not_known_is_refused() -> None:
    model = TINY["embedding"]()
    rows = model.config.vocab_size
    model.surprise = torch.nn.Embedding(rows, 3)
    with pytest.raises(CompressionError, match=r"surprise\.weight has a row"):
        trim_model_(model, [0, 1, 2])
    assert model.config.vocab_size == rows


def test_positions_of_roberta_do_not_move() -> None:
    """It counts them from the number of the padding token, here 7."""
    from transformers import RobertaConfig, RobertaModel

    tokenizer = train("byte_bpe")
    tokenizer.add_special_tokens({"pad_token": tokenizer.convert_ids_to_tokens(7)})
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=48,
        pad_token_id=7,
    )
    model = RobertaModel(config).eval()
    texts = KEPT[:3]

    def outputs(tokenizer: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                model(torch.tensor([tokenizer(t)["input_ids"][:30]]))[0] for t in texts
            ]

    before = outputs(tokenizer)
    got = trim_vocabulary(loaded(tokenizer, model), Vocabulary(), lambda: texts, "d")
    for a, b in zip(before, outputs(got.tokenizer), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tokenizer_without_pieces_is_refused() -> None:
    from transformers import BertModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    model = BertModel(tiny_config(vocab_size=2))
    with pytest.raises(CompressionError, match="no smaller pieces"):
        trim_vocabulary(loaded(tokenizer, model), Vocabulary(), lambda: ["a"], "d")


def test_a_token_listed_twice_is_refused() -> None:
    with pytest.raises(CompressionError, match="lists a token twice"):
        Unigram({"vocab": [["<unk>", 0.0], ["a", -1.0], ["a", -2.0]], "unk_id": 0})


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Vocabulary(size=0)


def test_minilm_gives_identical_vectors() -> None:
    """The real tokenizer and weights, by way of PyTorch."""
    from edgelm.evaluate.reference import from_loaded

    texts = KEPT[:40]
    whole = from_loaded(load_model("minilm"))
    trimmed = trim_vocabulary(
        load_model("minilm"), Vocabulary(), lambda: texts, "digest"
    )
    assert len(trimmed.tokenizer) < 6000
    assert trimmed.tokenizer.convert_tokens_to_ids("[SEP]") != 102
    found = from_loaded(trimmed).encode(texts)
    np.testing.assert_array_equal(found, whole.encode(texts))
    other = from_loaded(trimmed).encode(["An anachronistic xylophone"])
    assert np.isfinite(other).all()


def test_from_the_command_line_to_a_bundle(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    from click.testing import CliRunner

    def call(*args: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert result.exit_code == code, result.output
        return result.output

    tokenizer = train("word_piece")
    torch.manual_seed(0)
    from transformers import BertModel

    model = save_tiny(
        tmp_path / "model", BertModel(tiny_config(vocab_size=len(tokenizer)))
    )
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(KEPT), encoding="utf-8")
    small = tmp_path / "small"
    said = call("compress", model, "-o", small, "--vocab", text)
    assert f"of {len(tokenizer)} tokens are left" in said
    about = json.loads((small / "edgelm.json").read_text(encoding="utf-8"))
    (step,) = about["steps"]
    assert step["method"] == "vocabulary"
    assert step["texts"] == str(text)
    assert about["recipe"]["vocabulary"] == {"texts": str(text)}
    again = tmp_path / "again"
    call("compress", small, "-o", again, "--ffn-keep", "0.5", "--vocab", "auto")
    steps = json.loads((again / "edgelm.json").read_text(encoding="utf-8"))["steps"]
    assert [s["method"] for s in steps] == ["vocabulary", "vocabulary", "shrink"]
    for made, name in ((small, "bundle"), (model, "whole")):
        path = tmp_path / name
        call("export", made, "--target", "cpu", "--precision", "fp32", "-o", path)
    found, expected = (
        edgelm.load(tmp_path / name).encode(KEPT[:20])  # type: ignore[union-attr]
        for name in ("bundle", "whole")
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    call("compress", model, "-o", small, "--vocab-size", "9", code=2)
    dry = call("compress", model, "--vocab", "auto", "--vocab-size", "99", "--dry-run")
    assert '[vocabulary]\ntexts = "auto"\nsize = 99\n' in dry
