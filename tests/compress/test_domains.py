"""Experts by domain: the joint solve, what a domain loads, what a bundle carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from edgelm import layers, samples, widths
from edgelm.calibration import Batch
from edgelm.cli import cli
from edgelm.compress import Blocks, Domains, compress, least_squares, obs
from edgelm.compress.domains import solve_experts
from edgelm.errors import CompressionError, ConfigError, ModelError
from edgelm.models import EXPERTS, load_model
from tests.compress.test_blocks import MODELS


def batches(domain: str, low: int, high: int) -> list[Batch]:
    """Token ids of a domain's own range."""
    torch.manual_seed(low)
    made = []
    for _ in range(6):
        ids = torch.randint(low, high, (8, 12))
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        made.append(Batch(ids * mask, mask, domain=domain))
    return made


def test_the_joint_solve_is_the_least_squares_of_all_data_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One regression on stacked inputs: shared columns, then each set's own, else zero."""
    monkeypatch.setattr(least_squares.solve, "__defaults__", (1e-9,))
    torch.manual_seed(0)
    w, shared = torch.randn(3, 9), 2
    data = [torch.randn(200, 9) @ torch.randn(9, 9) for _ in range(2)]
    orders = [torch.tensor([4, 1, 0, 8]), torch.tensor([4, 1, 8, 3, 6])]
    problems = [(w, x.T @ x / len(x), o) for x, o in zip(data, orders, strict=True)]
    found = solve_experts(problems, shared)
    stacked = torch.zeros(400, 2 + 2 + 3)
    stacked[:200, :4] = data[0][:, orders[0]]
    stacked[200:, :2] = data[1][:, orders[1][:2]]
    stacked[200:, 4:] = data[1][:, orders[1][2:]]
    due = torch.linalg.lstsq(stacked.double(), (torch.cat(data) @ w.T).double())[0].T
    torch.testing.assert_close(found[0].double(), due[:, :4], rtol=1e-3, atol=1e-4)
    own = torch.cat([due[:, :2], due[:, 4:]], dim=1)
    torch.testing.assert_close(found[1].double(), own, rtol=1e-3, atol=1e-4)
    assert torch.equal(found[0][:, :shared], found[1][:, :shared])


def test_units_that_are_to_stay_do() -> None:
    x = torch.randn(300, 20)
    always = torch.tensor([0, 7, 19])
    weight = torch.randn(4, 20)
    weight[:, always] = 0  # they cost nothing
    gram = x.T @ x / 300
    kept = obs.remove_units(weight, gram, 1, 6, always)[0]
    assert len(kept) == 6
    assert set(always.tolist()) <= set(kept.tolist())
    assert not set(always.tolist()) <= set(
        obs.remove_units(weight, gram, 1, 6)[0].tolist()
    )


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "gpt2"])
def test_an_expert_is_best_on_its_own_domain_and_shares_the_rest(name: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    blocks = Blocks(model)
    sets = [*batches("", 5, 60), *batches("low", 5, 20), *batches("high", 40, 60)]
    step = Domains(texts={"low": "", "high": ""}, keep=0.5, shared=0.25, multiple=4)
    rows = compress(blocks, [step], sets, sets)
    assert set(rows[0]["tried"]) == {"general", "low", "high"}
    where = layers.architecture(model.config.model_type)
    _, block = layers.blocks(model)[0]
    path = blocks.names[0]
    general = {k: p.detach() for k, p in block.named_parameters()}

    def expert(domain: str) -> dict[str, torch.Tensor]:
        prefix = f"{domain}/{path}."
        return {
            k.removeprefix(prefix): t
            for k, t in blocks.experts.items()
            if k.startswith(prefix)
        }

    low = widths.with_expert(general, expert("low"), where)
    again = widths.with_expert(low, expert("low"), where)
    shared = widths.of_block(model.config, block, "neurons") // 2
    for key, tensor in low.items():
        assert tensor.shape == general[key].shape
        assert torch.equal(again[key], tensor)
    projection = f"{where.ffn_out}.weight"
    axis = 0 if where.transposed else 1
    both = (t[projection].narrow(axis, 0, shared) for t in (low, general))
    torch.testing.assert_close(*both, rtol=0, atol=0)
    own = widths.expert_of(low, where, shared)
    assert own.keys() == expert("low").keys()
    assert all(torch.equal(own[k], expert("low")[k]) for k in own)
    assert not torch.equal(own[projection], expert("high")[projection])


def test_a_domain_from_text_to_bundle(tiny_embedding: Path, tmp_path: Path) -> None:
    """Similarity sentences and labelled news: two kinds of real text."""
    files = {"pairs": tmp_path / "pairs.txt", "news": tmp_path / "news.jsonl"}
    pairs = [row["text1"] for row in samples.similarity()]
    files["pairs"].write_text("\n".join(pairs), encoding="utf-8")
    news = [json.dumps({"text": text}) for text in samples.calibration()[:60]]
    files["news"].write_text("\n".join(news), encoding="utf-8")
    checkpoint, bundle = tmp_path / "ckpt", tmp_path / "bundle"
    named = [x for n, f in files.items() for x in ("--calibration", f"{n}={f}")]
    limits = ["--max-texts", "60", "--max-tokens", "16"]
    run = CliRunner().invoke

    args = ["compress", str(tiny_embedding), "-o", str(checkpoint), "--ffn-keep", "0.5"]
    done = run(cli, [*args, *named, *limits])
    assert done.exit_code == 0, done.output
    general, own = (load_model(str(checkpoint), domain=d) for d in (None, "news"))
    assert general.model.config.intermediate_size == 32
    key = "encoder.layer.0.output.dense.weight"
    ours, theirs = (m.model.state_dict()[key] for m in (own, general))
    assert torch.equal(ours[:, :16], theirs[:, :16])
    stored = load_file(checkpoint / EXPERTS)
    assert torch.equal(ours[:, 16:], stored[f"news/{key}"])
    done = run(cli, ["info", str(checkpoint), "--json"])
    assert json.loads(done.output)["domains"] == ["pairs", "news"]

    args = ["export", str(checkpoint), "--target", "cpu", "-o", str(bundle)]
    done = run(cli, [*args, "--precision", "fp32", "--domain", "news"])
    assert done.exit_code == 0, done.output
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["model"]["steps"][-1] == {"method": "domain", "name": "news"}
    exported = manifest["provenance"]["lineage"]["steps"][-1]
    assert exported["options"]["domain"] == "news"
    assert not (bundle / EXPERTS).exists()
    again = run(
        cli,
        ["compress", str(checkpoint), "-o", str(tmp_path / "x"), "--sparsity", "0.5"],
    )
    assert again.exit_code == 1
    assert "experts by domain, which would be lost" in again.output
    with pytest.raises(
        ModelError, match=r"no expert for the domain 'law'.*pairs, news"
    ):
        load_model(str(checkpoint), domain="law")
    with pytest.raises(ModelError, match="no experts by domain"):
        load_model(str(tiny_embedding), domain="news")


def test_what_makes_no_domains() -> None:
    with pytest.raises(ConfigError, match="needs a text file for each domain"):
        Domains()
    with pytest.raises(ConfigError, match="is taken by text of no domain"):
        Domains(texts={"general": "a.txt"})
    with pytest.raises(ConfigError, match="0 < shared < keep"):
        Domains(texts={"a": "a.txt"}, keep=0.25, shared=0.25)
    blocks = Blocks(MODELS["bert"]().eval())
    step = Domains(texts={"a": "", "b": ""}, multiple=4)
    sets = [*batches("", 5, 60), *batches("a", 5, 20)]
    with pytest.raises(CompressionError, match="no calibration text for 'b'"):
        compress(blocks, [step], sets, sets)


def test_flags_that_do_not_go_with_domains() -> None:
    args = ["compress", "minilm", "--dry-run", "--calibration", "a=a.txt"]
    for more in ([], ["--sparsity", "0.5"], ["--ffn-keep", "auto"]):
        done = CliRunner().invoke(cli, [*args, *more])
        assert done.exit_code == 2, more
    done = CliRunner().invoke(cli, [*args, "--ffn-keep", "0.5", "--json"])
    assert json.loads(done.output)["steps"][0]["texts"] == {"a": "a.txt"}
