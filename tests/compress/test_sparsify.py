"""Sparsify and the block-by-block flow, on tiny models."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertModel

from edgelm import layers
from edgelm.calibration import Batch
from edgelm.compress import Blocks, Sparsify, sequential
from edgelm.compress import compress as compress_blocks
from edgelm.compress.observe import observe as observed
from edgelm.compress.patterns import check_mask, parse_pattern
from edgelm.compress.sparsify import Layer
from edgelm.errors import CompressionError, ConfigError
from edgelm.layers import weight_matrix
from edgelm.statistics import ActivationStatistics
from tests.conftest import tiny_config


@pytest.fixture
def model() -> BertModel:
    return BertModel(tiny_config()).eval()


@pytest.fixture
def batches() -> list[Batch]:
    """Two batches with padding, of different widths."""
    made = []
    for rows, length in ((4, 12), (3, 7)):
        ids = torch.randint(5, 60, (rows, length))
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[1:, length - 3 :] = 0
        made.append(Batch(ids * mask, mask))
    return made


def compress(model: BertModel, *args: Any) -> list[SimpleNamespace]:
    """Compress in memory; rows as objects."""
    return [SimpleNamespace(**row) for row in compress_blocks(Blocks(model), *args)]


def all_linears(model: BertModel) -> dict[str, Any]:
    return {
        f"{path}.{name}": layer
        for path, block in layers.blocks(model)
        for name, layer in layers.linears(model, block)
    }


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4", "4:8", "1:4"])
@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("refine", ["none", "dsnot", "swaps", "admm", "auto"])
def test_every_layer_gets_the_pattern_and_nothing_else_changes(
    model: BertModel,
    batches: list[Batch],
    sparsity: Any,
    saliency: Any,
    refine: Any,
) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = Sparsify(sparsity=sparsity, saliency=saliency, refine=refine, repair="none")
    reports = compress(model, [step], batches, batches)
    touched = all_linears(model)
    assert [r.layer for r in reports] == list(touched)
    for report in reports:
        weight = weight_matrix(touched[report.layer])
        check_mask(weight != 0, parse_pattern(sparsity))
        assert report.sparsity == pytest.approx(float((weight == 0).float().mean()))
        assert report.refine == refine or refine == "auto"
    for key, value in model.state_dict().items():
        kept = value != 0
        assert torch.equal(value[kept], before[key][kept])
        if key.removesuffix(".weight") not in touched:
            assert torch.equal(value, before[key])


@pytest.mark.parametrize("repair", ["bias", "admm", "sparsegpt", "auto"])
@pytest.mark.parametrize("sparsity", [0.6, "2:4"])
def test_repair_keeps_the_pattern_and_lowers_the_error(
    model: BertModel, batches: list[Batch], sparsity: Any, repair: Any
) -> None:
    step = Sparsify(sparsity=sparsity, refine="none", repair=repair)
    for report in compress(model, [step], batches, batches):
        layer = all_linears(model)[report.layer]
        pruned = weight_matrix(layer) == 0
        assert float(pruned.float().mean()) == pytest.approx(report.sparsity)
        check_mask(~pruned, parse_pattern(sparsity))
        # Judged on the text it was computed from, no repair may lose. SparseGPT's
        # update is greedy and damped, so it is not held to that.
        if repair != "sparsegpt":
            assert report.error <= report.error_initial * (1 + 1e-4)
        assert report.repair == repair or repair == "auto"


@pytest.mark.parametrize("repair", ["auto", "bias"])
def test_auto_is_the_best_of_what_it_tried(
    model: BertModel, batches: list[Batch], repair: Any
) -> None:
    step = Sparsify(sparsity="2:4", repair=repair)
    for report in compress(model, [step], batches, batches[::-1]):
        masks = {k: v for k, v in report.tried.items() if "+" not in k}
        repairs = {k: v for k, v in report.tried.items() if "+" in k}
        best = min(masks, key=masks.__getitem__)
        solved = {best, "admm"} if repair == "auto" else {best}
        assert set(masks) == {"none", "dsnot", "swaps" if repair == "bias" else "admm"}
        assert {k.split("+")[0] for k in repairs} == solved
        assert (
            min(repairs, key=repairs.__getitem__) == f"{report.refine}+{report.repair}"
        )
        assert report.error == min(repairs.values())


@pytest.mark.parametrize("repair", ["none", "bias", "admm"])
def test_the_reported_error_is_the_layer_output_error(
    model: BertModel, batches: list[Batch], repair: Any
) -> None:
    """Measured on the layers' real inputs: the first block's depend on no mask."""
    dense = copy.deepcopy(model)
    held_out = batches[:1]
    step = Sparsify(sparsity=0.5, refine="swaps", repair=repair)
    reports = {r.layer: r for r in compress(model, [step], batches, held_out)}
    seen: dict[str, torch.Tensor] = {}
    for name, layer in all_linears(dense).items():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    with torch.no_grad():
        dense(held_out[0].input_ids, held_out[0].attention_mask)
    mask = held_out[0].attention_mask.bool()
    for name in ("query", "key", "value"):
        name = f"encoder.layer.0.attention.self.{name}"
        tokens = seen[name][mask]
        before, after = (all_linears(m)[name] for m in (dense, model))
        with torch.no_grad():
            lost = (before(tokens) - after(tokens)).square().sum()
            there = (tokens @ weight_matrix(before).T).square().sum()
        assert reports[name].error == pytest.approx(float(lost / there), rel=1e-3)


def observe(
    model: BertModel, index: int, flows: list[sequential.Flow]
) -> dict[str, ActivationStatistics]:
    """Statistics of all linear layers of a block."""
    where = layers.architecture("bert")
    block = layers.blocks(model)[index][1]
    return observed(block, index, flows, where.linears, where)


def test_statistics_come_from_the_compressed_prefix(
    model: BertModel, batches: list[Batch]
) -> None:
    """The second block's inputs are those that the sparse first block gives."""
    flows = sequential.start(model, batches)
    with torch.no_grad():
        layers.blocks(model)[0][1].output.dense.weight.zero_()
        sequential.advance_(layers.blocks(model)[0][1], 0, flows)
        found = observe(model, 1, flows)["attention.self.query"]
        seen: list[torch.Tensor] = []
        query = layers.blocks(model)[1][1].attention.self.query
        handle = query.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for batch in batches:
            model(batch.input_ids, batch.attention_mask)
        handle.remove()
    tokens = torch.cat(
        [x[b.attention_mask.bool()] for x, b in zip(seen, batches, strict=True)]
    )
    torch.testing.assert_close(found.mean, tokens.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert found.count == len(tokens)


def test_layers_that_share_an_input_share_statistics(
    model: BertModel, batches: list[Batch]
) -> None:
    found = observe(model, 0, sequential.start(model, batches))
    query = found["attention.self.query"].cross
    assert found["attention.self.key"].cross is query
    assert found["attention.self.value"].cross is query
    assert found["intermediate.dense"].cross is not query
    assert found["output.dense"].mean.shape == (64,)


def test_recording_leaves_the_model_as_it_was(
    model: BertModel, batches: list[Batch]
) -> None:
    batch = batches[0]
    before = model(batch.input_ids, batch.attention_mask).last_hidden_state
    flows = sequential.start(model, batches)
    for index, (_, block) in enumerate(layers.blocks(model)):
        sequential.advance_(block, index, flows)
    after = model(batch.input_ids, batch.attention_mask).last_hidden_state
    assert torch.equal(before, after)
    torch.testing.assert_close(flows[0].hidden, after)


@pytest.mark.parametrize("saliency", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_sparsity_zero_is_the_dense_model(
    model: BertModel, batches: list[Batch], saliency: Any
) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step = Sparsify(sparsity=0.0, saliency=saliency, repair="bias")
    reports = compress(model, [step], batches, batches)
    after = model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert all(r.error == 0 and r.sparsity == 0 for r in reports)


def test_skip_leaves_layers_dense(model: BertModel, batches: list[Batch]) -> None:
    reports = compress(
        model, [Sparsify(sparsity=0.5, skip=("attention",))], batches, batches
    )
    assert {r.layer.split(".", 3)[-1] for r in reports} == {
        "intermediate.dense",
        "output.dense",
    }
    assert bool((model.encoder.layer[0].attention.self.query.weight != 0).all())


def test_a_skip_that_matches_nothing_is_refused(
    model: BertModel, batches: list[Batch]
) -> None:
    with pytest.raises(CompressionError, match="'no_such_part' matches no layer"):
        compress(model, [Sparsify(skip=("no_such_part",))], batches, batches)


def test_skipping_everything_is_refused(model: BertModel, batches: list[Batch]) -> None:
    with pytest.raises(CompressionError, match="changed no layer"):
        compress(model, [Sparsify(skip=("layer",))], batches, batches)


def test_nan_weights_are_refused(model: BertModel, batches: list[Batch]) -> None:
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(CompressionError, match=r"encoder\.layer\.1.*not finite"):
        compress(model, [Sparsify()], batches, batches)


def test_a_width_that_does_not_divide_is_refused(batches: list[Batch]) -> None:
    odd = BertModel(
        tiny_config(hidden_size=30, num_attention_heads=3, intermediate_size=50)
    ).eval()
    with pytest.raises(CompressionError, match=r"multiple of 4 inputs.*has 30"):
        compress(odd, [Sparsify(sparsity="3:4")], batches, batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(batches: list[Batch], dtype: torch.dtype) -> None:
    model = BertModel(tiny_config()).eval().to(dtype)
    compress(model, [Sparsify(sparsity="2:4", refine="dsnot")], batches, batches)
    weight = model.encoder.layer[0].intermediate.dense.weight
    assert weight.dtype == dtype
    check_mask(weight != 0, parse_pattern("2:4"))


def test_two_steps_run_in_order(model: BertModel, batches: list[Batch]) -> None:
    reports = compress(
        model,
        [Sparsify(sparsity="4:8"), Sparsify(sparsity="1:4")],
        batches,
        batches,
    )
    assert len(reports) == 2 * len(all_linears(model))
    assert [r.step for r in reports[:: len(all_linears(model))]] == [0, 1]
    groups = model.encoder.layer[0].output.dense.weight.reshape(-1, 4)
    assert int((groups != 0).sum(dim=1).max()) == 1


def test_config_is_validated_on_construction() -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        Sparsify(sparsity=1.5)


def test_the_error_of_a_layer_that_gives_nothing() -> None:
    found = ActivationStatistics.of(torch.randn(2, 4, 3), torch.ones(2, 4), gram=True)
    assert Layer(torch.zeros(2, 3), True, found, found).error(torch.zeros(2, 3)) == 0.0


def test_reload_in_plain_transformers(tiny_embedding: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    from edgelm.calibration import Calibration
    from edgelm.models import load_model
    from edgelm.pipeline import compress_model
    from edgelm.recipe import Recipe

    texts = tmp_path / "texts.txt"
    texts.write_text(
        "the man plays a flute\nthe river of paris\n" * 4, encoding="utf-8"
    )
    recipe = Recipe(
        Calibration(texts=str(texts)), (Sparsify(sparsity="2:4", refine="dsnot"),)
    )
    compress_model(str(tiny_embedding), recipe, tmp_path / "ckpt")
    ours = load_model(str(tmp_path / "ckpt"))
    theirs = AutoModel.from_pretrained(tmp_path / "ckpt").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "ckpt")(
        ["the woman reads"], return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(
            ours.model(**tokens).last_hidden_state, theirs(**tokens).last_hidden_state
        )
    check_mask(
        theirs.encoder.layer[1].intermediate.dense.weight != 0, parse_pattern("2:4")
    )
