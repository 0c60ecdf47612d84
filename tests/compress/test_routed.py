"""FactorLLM as a step: what the checkpoint holds, what loading it gives, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from edgelm import layers
from edgelm.calibration import Batch, Calibration
from edgelm.cli import cli
from edgelm.compress import Blocks, FactorLLM, compress
from edgelm.compress.factorllm import factorize_
from edgelm.compress.routed import variance_lost
from edgelm.errors import CompressionError, ConfigError, ModelError
from edgelm.models import ROUTERS, load_model
from edgelm.pipeline import compress_model
from edgelm.provenance import lineage_of
from edgelm.recipe import Recipe, parse_recipe
from tests.compress.test_blocks import MODELS
from tests.compress.test_factorllm import NAMES, batches, output_of


@pytest.fixture(scope="module")
def checkpoint(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of the tiny embedding model, 2 of 4 experts active; not to be changed."""
    path = tmp_path_factory.mktemp("routed") / "ckpt"
    step = FactorLLM(experts=4, active=2, split="permuted", steps=3)
    recipe = Recipe(Calibration(max_texts=24, max_tokens=32), (step,))
    report = compress_model(str(tiny("embedding")), recipe, path)
    assert report.routing is not None
    assert (report.routing["experts"], report.routing["active"]) == (4, 2)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_the_model_becomes_what_factorize_makes_its_experts_side_by_side(
    name: str,
) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]().float().eval()
    due = copy.deepcopy(model)
    step = FactorLLM(experts=4, active=2, split="permuted", steps=4)
    blocks = Blocks(model)
    rows = compress(blocks, [step], batches(), batches(2))
    factorize_(due, batches(), step)
    wanted, sample = output_of(due, batches()[0]), batches()[0]
    routing = blocks.routing
    assert routing is not None
    stored = output_of(model, sample)
    routing.attach_(model)
    torch.testing.assert_close(output_of(model, sample), wanted, atol=1e-5, rtol=1e-4)
    with routing.detached(model):
        torch.testing.assert_close(output_of(model, sample), stored)
    torch.testing.assert_close(output_of(model, sample), wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(stored, wanted, atol=1e-3)
    assert len(rows) == len(blocks)
    assert all(set(row["tried"]) == {"routed", "static"} for row in rows)


def test_with_all_experts_active_nothing_is_lost() -> None:
    torch.manual_seed(0)
    model: Any = MODELS["bert"]().float().eval()
    due = output_of(model, batches()[0])
    blocks = Blocks(model)
    step = FactorLLM(experts=4, active=4, split="permuted")
    compress(blocks, [step], batches(), batches(2))
    assert blocks.routing is not None
    blocks.routing.attach_(model)
    torch.testing.assert_close(
        output_of(model, batches()[0]), due, atol=1e-5, rtol=1e-5
    )
    assert blocks.routing.errors["routed"] < 1e-9
    assert blocks.routing.errors["static"] == 0


def test_what_is_lost_is_the_share_of_the_variance_at_real_tokens() -> None:
    torch.manual_seed(0)
    dense: Any = MODELS["bert"]().float().eval()
    other = copy.deepcopy(dense)
    layers.blocks(other)[1][1].get_submodule("output.dense").weight.data *= 0.5
    sample = batches(3)
    found = variance_lost(dense, {"other": other}, sample)["other"]
    due, given = (
        torch.cat([output_of(m, b) for b in sample]).double() for m in (dense, other)
    )
    share = (given - due).square().sum() / (due - due.mean(dim=0)).square().sum()
    assert found[-1] == pytest.approx(float(share), rel=1e-4)
    assert found[0] == 0
    # Half of what stands behind the bias is missing; the mean counts as missed, too.
    assert 0.25 < found[1] < 0.5


def test_a_checkpoint_is_dense_for_others_and_routed_for_edgelm(
    checkpoint: Path,
) -> None:
    from transformers import AutoModel

    loaded = load_model(str(checkpoint))
    plain: Any = AutoModel.from_pretrained(checkpoint).eval()
    ids = torch.randint(5, 60, (3, 11))
    sample = Batch(ids, torch.ones_like(ids))
    assert loaded.routing is not None
    assert (loaded.routing.experts, loaded.routing.active) == (4, 2)
    routed, dense = output_of(loaded.model, sample), output_of(plain, sample)
    assert not torch.allclose(routed, dense, atol=1e-3)
    with loaded.routing.detached(loaded.model):
        torch.testing.assert_close(output_of(loaded.model, sample), dense)
    lost = variance_lost(plain, {"routed": loaded.model}, [sample])
    assert 0 < lost["routed"][0] < 10
    about = json.loads((checkpoint / "edgelm.json").read_text())
    assert about["routing"]["errors"] == loaded.routing.errors
    page = (checkpoint / "report.html").read_text(encoding="utf-8")
    assert "Each token uses 2 of 4 experts" in page
    done = CliRunner().invoke(cli, ["info", str(checkpoint)])
    assert "experts 4, active 2, errors routed" in " ".join(done.output.split())


def test_what_would_lose_the_routers_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    for flags in (["--sparsity", "0.5"], ["--vocab", "auto"], ["--codes", "32"]):
        args = ["compress", str(checkpoint), "-o", str(tmp_path / "x"), *flags]
        done = CliRunner().invoke(cli, args)
        assert done.exit_code == 1, flags
        assert "has routed experts, which would be lost" in done.output
    args = ["tune", str(checkpoint), "--target", "cpu", "-o", str(tmp_path / "t")]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 1
    assert "has routed experts, which tuning would lose" in done.output
    with pytest.raises(ModelError, match="no experts by domain"):
        load_model(str(checkpoint), domain="news")


def test_routers_that_are_damaged_or_changed_are_noticed(
    checkpoint: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    assert lineage_of(load_model(str(changed)))["steps"][-1]["action"] == "compress"
    stored = load_file(changed / ROUTERS)
    save_file({name: t + 1 for name, t in stored.items()}, changed / ROUTERS)
    assert lineage_of(load_model(str(changed)))["steps"][-1]["action"] == "changed"
    name = next(iter(stored))
    for damage in (
        {k: t for k, t in stored.items() if k != name},
        {**stored, name: stored[name][:1]},
        None,
    ):
        (changed / ROUTERS).unlink()
        if damage is not None:
            save_file(damage, changed / ROUTERS)
        with pytest.raises(ModelError, match="do not fit its model"):
            load_model(str(changed))


def test_what_cannot_be_routed_is_refused() -> None:
    dry = ["compress", "minilm", "--dry-run", "--json"]

    def run(*flags: str) -> Any:
        return CliRunner().invoke(cli, [*dry, *flags])

    for flags in (
        ["--routed"],
        ["--routed", "--ffn-keep", "0.5"],
        ["--routed", "--experts", "8", "--active", "4", "--sparsity", "0.5"],
        ["--routed", "--experts", "8", "--active", "4", "--codes", "256"],
    ):
        done = run(*flags)
        assert done.exit_code == 2, flags
        assert "--routed goes with --experts" in done.output
    done = run("--routed", "--experts", "4", "--active", "5")
    assert done.exit_code == 1
    assert "5 of 4 experts cannot be active" in done.output
    done = run("--routed", "--experts", "auto", "--ffn-keep", "0.25")
    (step,) = json.loads(done.output)["steps"]
    assert (step["method"], step["experts"], step["active"]) == ("factorllm", 8, 2)
    steps = [{"method": "factorllm"}, {"method": "shrink"}]
    with pytest.raises(ConfigError, match="make 'factorllm' the last step"):
        parse_recipe({"steps": steps}, "here")
    blocks = Blocks(MODELS["bert"]().eval())
    with pytest.raises(CompressionError, match="5 experts do not divide"):
        compress(blocks, [FactorLLM(experts=5, active=2)], batches(), batches())
    few = [Batch(torch.full((1, 3), 7), torch.ones(1, 3, dtype=torch.long))]
    with pytest.raises(CompressionError, match="3 tokens for experts of 12 neurons"):
        compress(blocks, [FactorLLM(experts=4, active=2)], few, few)
