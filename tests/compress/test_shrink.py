"""Fewer neurons and heads: against brute force, over every architecture, and as files."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm import layers, widths
from edgelm.calibration import Batch, Calibration
from edgelm.compress import Blocks, Shrink, Sparsify, compress, obs
from edgelm.compress.least_squares import refit
from edgelm.compress.shrink import allocate, by_variance, columns
from edgelm.errors import CompressionError, ConfigError
from edgelm.export.exporter import export
from edgelm.layers import ARCHITECTURES
from edgelm.models import load_model
from edgelm.pipeline import compress_model
from edgelm.recipe import Recipe
from edgelm.reports.compression import verdict
from tests.compress.test_blocks import MODELS, batches, outputs, save_tiny, task_of

FREE = [name for name in sorted(MODELS) if ARCHITECTURES[name].free_heads]


def damped(gram: torch.Tensor) -> torch.Tensor:
    g = gram.double()
    return g + obs.DAMPING * g.diagonal().mean() * torch.eye(len(g))


def problem(units: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    width = units * size
    x = torch.randn(200, width) @ torch.randn(width, width)
    return torch.randn(5, width), x.T @ x / 200


def loss(weight: torch.Tensor, gram: torch.Tensor, left: list[int]) -> float:
    """What the best weights on some inputs lose, under the damped Gram matrix."""
    w, g = weight.double(), damped(gram)
    best = torch.zeros_like(w)
    best[:, left] = torch.linalg.solve(g[left][:, left], (w @ g)[:, left].T).T
    return float((((w - best) @ g) * (w - best)).sum())


@settings(max_examples=25, deadline=None)
@given(units=st.integers(2, 9), size=st.integers(1, 4), seed=st.integers(0, 999))
def test_removal_is_greedy_by_the_exact_loss(units: int, size: int, seed: int) -> None:
    """One unit at a time (few units), against trying each."""
    weight, gram = problem(units, size, seed)
    left = list(range(units))
    due = []
    while len(left) > 1:
        losses = {
            u: loss(
                weight,
                gram,
                columns(torch.tensor([v for v in left if v != u]), size).tolist(),
            )
            for u in left
        }
        gone = min(losses, key=losses.__getitem__)
        left.remove(gone)
        due.append(losses[gone])
        kept, costs = obs.remove_units(weight, gram, size, len(left))
        assert kept.tolist() == left
        assert costs.tolist() == pytest.approx(due, rel=1e-3, abs=1e-6)


def test_removal_in_batches_accounts_for_the_batch_as_a_whole() -> None:
    weight, gram = problem(200, 1)
    kept, costs = obs.remove_units(weight, gram, 1, 80)
    assert float(costs[-1]) == pytest.approx(
        loss(weight, gram, kept.tolist()), rel=1e-6
    )
    assert bool((costs.diff() >= -1e-9).all())
    random = loss(weight, gram, torch.randperm(200)[:80].tolist())
    assert float(costs[-1]) < 0.8 * random


def test_variance_keeps_what_contributes_most() -> None:
    weight, gram = torch.ones(3, 6), torch.diag(torch.tensor([1.0, 5, 2, 9, 0, 3]))
    assert by_variance(weight, gram, 1, 3).tolist() == [1, 3, 5]
    assert by_variance(weight, gram, 2, 1).tolist() == [1]


def test_refit_is_ridge_regression() -> None:
    weight, gram = problem(8, 1)
    left = torch.tensor([0, 3, 4, 7])
    own = gram[left][:, left].double()
    ridge = 0.01 * own.diagonal().diag()
    wanted = (weight.double() @ gram.double())[:, left] + weight[
        :, left
    ].double() @ ridge
    due = torch.linalg.solve(own + ridge, wanted.T).T
    found = refit(weight, gram, left)
    torch.testing.assert_close(found[:, left].double(), due, rtol=1e-3, atol=1e-3)
    assert found.count_nonzero() == found[:, left].count_nonzero()


def test_allocation_is_the_best_of_all() -> None:
    """Curves whose steps grow: against every other way to share."""
    torch.manual_seed(0)
    curves = [
        torch.rand(11, dtype=torch.float64).sort().values.cumsum(0) for _ in range(3)
    ]
    multiple = 2

    def lost(counts: Any) -> float:
        return sum(
            float(c[12 - n - 1]) if n < 12 else 0.0
            for c, n in zip(curves, counts, strict=True)
        )

    found = allocate(curves, 0.5, multiple)
    ways = [
        counts
        for counts in itertools.product(range(2, 13, multiple), repeat=3)
        if sum(counts) == 18
    ]
    assert sum(found) == 18
    within = allocate(curves, 0.5, multiple, band=0.17)
    assert sum(within) == 18
    assert all(4 <= count <= 8 for count in within)
    near = [w for w in ways if all(4 <= n <= 8 for n in w)]
    assert lost(within) == pytest.approx(min(map(lost, near)))
    assert lost(found) == pytest.approx(min(map(lost, ways)))


@pytest.fixture(params=sorted(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shrunk(model: Any, *steps: Any) -> list[dict[str, Any]]:
    sample = batches()
    return compress(Blocks(model), steps, sample, sample)


def test_neurons_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Streamed equals in memory; the right neurons; transformers and edgelm reload the same."""
    torch.manual_seed(0)
    folder = save_tiny(tmp_path / "m", MODELS[name]().eval())
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")
    recipe = Recipe(Calibration(str(texts)), (Shrink(keep=0.6),))
    task = task_of(name)
    compress_model(str(folder), recipe, tmp_path / "ck", task=task)
    loaded = load_model(str(tmp_path / "ck"), task)
    where = layers.of_config(loaded.model.config)
    for _, block in layers.blocks(loaded.model):
        assert widths.of_block(loaded.model.config, block, "neurons") == 32
    assert getattr(loaded.model.config, where.ffn_width) == 32
    plain = type(loaded.model).from_pretrained(tmp_path / "ck").eval()
    for batch in batches():
        assert bool(torch.isfinite(outputs(loaded.model, batch)).all())
        mine, theirs = outputs(loaded.model, batch), outputs(plain, batch)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    whole = load_model(str(folder), task)
    rows = shrunk(whole.model, Shrink(keep=0.6))
    assert all(r["sparsity"] == pytest.approx(1 - 32 / 48) for r in rows)
    assert all(r["error"] <= r["error_mask"] * 1.001 for r in rows)


@pytest.mark.parametrize("part", ["neurons", "heads"])
@pytest.mark.parametrize("name", FREE)
def test_units_that_do_nothing_go_first_and_nothing_changes(
    name: str, part: layers.Part
) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    where = layers.of_config(model.config)
    consumer = where.ffn_out if part == "neurons" else where.attention_out
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero at first
            parameter.add_(0.05 * torch.randn_like(parameter))
        for _, block in layers.blocks(model):
            matrix = layers.weight_matrix(block.get_submodule(consumer))
            matrix[:, : matrix.shape[1] // 2] = 0
    before = [outputs(model, batch) for batch in batches_of(3)]
    rows = shrunk(model, Shrink(part=part, keep=0.5, multiple=8, drift=0.0))
    assert all(r["error"] < 1e-6 for r in rows)
    for batch, due in zip(batches_of(3), before, strict=True):
        torch.testing.assert_close(outputs(model, batch), due, rtol=1e-3, atol=1e-4)


def batches_of(seed: int) -> list[Batch]:
    torch.manual_seed(seed)
    return batches()


@pytest.mark.parametrize("name", FREE)
def test_heads_are_stored_as_zeros_and_left_out_by_edgelm(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = save_tiny(tmp_path / "m", MODELS[name]().eval())
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")
    steps = (Shrink(part="heads", keep=0.5), Shrink(keep=0.6), Sparsify(sparsity=0.5))
    task = task_of(name)
    compress_model(
        str(folder), Recipe(Calibration(str(texts)), steps), tmp_path / "ck", task=task
    )
    loaded = load_model(str(tmp_path / "ck"), task)
    config = loaded.model.config
    for _, block in layers.blocks(loaded.model):
        assert 2 * widths.of_block(config, block, "heads") == widths.of_config(
            config, "heads"
        )
    plain = type(loaded.model).from_pretrained(tmp_path / "ck").eval()
    for batch in batches():
        mine, theirs = outputs(loaded.model, batch), outputs(plain, batch)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_of_different_widths(tmp_path: Path) -> None:
    """Padded in the files, trimmed by edgelm; a second compression goes on from there."""
    torch.manual_seed(0)
    model = MODELS["bert"]().eval()
    with torch.no_grad():
        for scale, (_, block) in zip((0.1, 1, 3), layers.blocks(model), strict=True):
            block.output.dense.weight.mul_(scale)
    folder = save_tiny(tmp_path / "m", model)
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")
    step = Shrink(keep=0.5, allocation="auto", multiple=8, band=0.5)
    recipe = Recipe(Calibration(str(texts)), (step,))
    compress_model(str(folder), recipe, tmp_path / "ck", task="embedding")
    stored = json.loads((tmp_path / "ck" / "edgelm.json").read_text())["widths"]
    assert sum(stored["neurons"]) == 72
    assert len(set(stored["neurons"])) > 1
    loaded = load_model(str(tmp_path / "ck"))
    found = [
        widths.of_block(loaded.model.config, b, "neurons")
        for _, b in layers.blocks(loaded.model)
    ]
    assert found == stored["neurons"]
    plain = type(loaded.model).from_pretrained(tmp_path / "ck").eval()
    batch = batches()[0]
    torch.testing.assert_close(
        outputs(loaded.model, batch), outputs(plain, batch), rtol=1e-5, atol=1e-5
    )

    again = Recipe(Calibration(str(texts)), (Sparsify(sparsity=0.5),))
    compress_model(str(tmp_path / "ck"), again, tmp_path / "ck2")
    second = load_model(str(tmp_path / "ck2"))
    assert [
        widths.of_block(second.model.config, b, "neurons")
        for _, b in layers.blocks(second.model)
    ] == found
    assert len(second.steps) == 2


def test_a_killed_run_of_two_steps_resumes_to_the_identical_result(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    whole = MODELS["gpt2"]().eval()
    again = copy.deepcopy(whole)
    steps, sample = [Shrink(keep=0.4), Sparsify(sparsity=0.5)], batches()
    full = compress(Blocks(whole), steps, sample, sample)
    (tmp_path / "j").mkdir()
    first = copy.deepcopy(again)

    class Stop(Exception):
        pass

    def stop(name: str, done: int, total: int) -> None:
        if name == "sparsify" and done == 2:
            raise Stop

    with pytest.raises(Stop):
        compress(Blocks(first, journal=tmp_path / "j"), steps, sample, sample, stop)
    resumed = compress(Blocks(again, journal=tmp_path / "j"), steps, sample, sample)
    assert [{**r, "seconds": 0} for r in full] == [{**r, "seconds": 0} for r in resumed]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_a_smaller_model_is_exported_smaller(
    tiny_embedding: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")
    steps = (Shrink(part="heads", keep=0.5), Shrink(keep=0.5))
    compress_model(
        str(tiny_embedding), Recipe(Calibration(str(texts)), steps), tmp_path / "ck"
    )
    sizes = []
    for source in (tiny_embedding, tmp_path / "ck"):
        output = tmp_path / f"b{len(sizes)}"
        export(load_model(str(source)), "cpu", output, precision="fp32")
        sizes.append(sum(f.stat().st_size for f in output.rglob("*.onnx*")))
    assert sizes[1] < sizes[0]


def test_heads_that_cannot_go_are_refused() -> None:
    model = MODELS["mpnet"]().eval()
    with pytest.raises(CompressionError, match="needs all its heads"):
        shrunk(model, Shrink(part="heads"))


@pytest.mark.parametrize(
    ("field", "value"), [("keep", 0), ("keep", 1.5), ("drift", 2), ("multiple", 0)]
)
def test_parameters_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{field}'"):
        Shrink(**{field: value})


def test_keeping_all_changes_nothing() -> None:
    torch.manual_seed(0)
    model = MODELS["bert"]().eval()
    before = copy.deepcopy(model.state_dict())
    rows = shrunk(model, Shrink(keep=1.0))
    assert all(r["error"] < 1e-9 for r in rows)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-6)


def test_experts_are_judged_on_the_way_and_the_result_is_static() -> None:
    torch.manual_seed(0)
    one = MODELS["bert"]().eval()
    other = copy.deepcopy(one)
    ids = torch.randint(5, 60, (20, 12))
    sample = [Batch(ids, torch.ones_like(ids))]
    steps = Shrink(keep=0.5, experts=4, multiple=1), Shrink(keep=0.5, multiple=1)
    judged, plain = (
        compress(Blocks(m), [s], sample, sample)
        for m, s in zip((one, other), steps, strict=True)
    )
    for row, due in zip(judged, plain, strict=True):
        assert {"static", "oracle", "closed form", "FactorLLM"} <= set(row["tried"])
        assert row["error"] == due["error"]
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])
    assert verdict(plain) == ""
    static = [{"layer": "x.ffn", "tried": {"static": 1.0, "closed form": 0.9}}]
    assert verdict(static).startswith("Routing does not pay")
    paying = [{"layer": "x.ffn", "tried": {"static": 1.0, "closed form": 0.5}}]
    assert "1 of 1 networks (x.ffn)" in verdict(paying)


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": 3, "keep": 0.5},
        {"experts": -1},
        {"experts": 4, "part": "heads"},
        {"experts": 4, "allocation": "auto"},
    ],
)
def test_experts_that_do_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="xperts"):
        Shrink(**settings)


def test_heads_as_wide_as_the_config_wants() -> None:
    """T5's largest models: heads that are not hidden size / number wide."""
    config = tf.T5Config(
        vocab_size=65, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=4
    )
    assert widths.of_model(tf.T5EncoderModel(config)) == {}


def test_one_width_for_all_blocks_still_streams(
    tiny_embedding: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")
    recipe = Recipe(Calibration(str(texts)), (Shrink(keep=0.5),))
    compress_model(str(tiny_embedding), recipe, tmp_path / "ck")
    assert json.loads((tmp_path / "ck" / "edgelm.json").read_text())["widths"] == {}
    assert load_model(str(tmp_path / "ck"), stream=True).weights is not None
