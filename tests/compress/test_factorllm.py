"""FactorLLM on whole models: splits, routing while the model runs, adaptation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from edgelm import layers
from edgelm.calibration import Batch
from edgelm.compress.factorllm import FactorLLM, factorize_, permuted
from edgelm.errors import CompressionError, ConfigError
from tests.compress.test_blocks import MODELS

# A post-norm encoder, gated decoders, Conv1D, one block for all layers.
NAMES = ["bert", "modernbert", "llama", "gpt2", "albert"]


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().float().eval()


def batches(count: int = 6) -> list[Batch]:
    torch.manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 60, (4, 12))
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        made.append(Batch(ids * mask, mask))
    return made


def output_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
    return hidden[batch.attention_mask.bool()]  # type: ignore[no-any-return]


@pytest.mark.parametrize("split", ["contiguous", "permuted"])
@pytest.mark.parametrize("name", NAMES)
def test_with_all_experts_active_it_is_the_dense_model(name: str, split: Any) -> None:
    model = model_of(name)
    due = output_of(model, batches()[0])
    factorize_(model, batches(), FactorLLM(experts=4, active=4, split=split))
    torch.testing.assert_close(
        output_of(model, batches()[0]), due, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_routed_network_is_the_sum_of_its_active_experts(name: str) -> None:
    model = model_of(name)
    dense = copy.deepcopy(model)
    config = FactorLLM(experts=4, active=1, split="permuted", steps=0)
    routed = factorize_(model, batches(), config)
    where = layers.architecture(model.config.model_type)
    block, before = (layers.blocks(m)[0][1] for m in (model, dense))
    x = torch.randn(2, 5, model.config.hidden_size)
    entry, out = where.ffn_in[0].split(".")[0], where.ffn_out

    def network(of: Any, x: torch.Tensor) -> torch.Tensor:
        if name == "llama":
            return of.get_submodule(entry)(x)  # type: ignore[no-any-return]
        return of.get_submodule(out)(of.intermediate(x))  # type: ignore[no-any-return]

    given = network(block, x)
    seen: list[torch.Tensor] = []
    handle = before.get_submodule(out).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    network(before, x)
    handle.remove()
    layer = before.get_submodule(out)
    w2 = layers.weight_matrix(layer)
    bias = 0 if layer.bias is None else layer.bias
    for row in range(2):
        for column in range(5):
            logits = routed[0].router(x[row, column])
            (best,) = logits.topk(1).indices.tolist()
            own = routed[0].split[best]
            due = 4 * (w2[:, own] @ seen[0][row, column, own]) + bias
            torch.testing.assert_close(given[row, column], due, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "objective"), [("bert", "distillation"), ("llama", "lm")]
)
def test_adaptation_helps_and_leaves_the_backbone_alone(
    name: str, objective: Any
) -> None:
    model = model_of(name)
    dense = copy.deepcopy(model)
    where = layers.architecture(model.config.model_type)
    sample = batches()
    router = copy.deepcopy(model)
    quick = {"experts": 4, "active": 2, "steps": 60, "rate": 1e-2}
    factorize_(router, sample, FactorLLM(**quick, objective="router"))
    factorize_(model, sample, FactorLLM(**quick, objective=objective))

    def loss(of: Any) -> float:
        if objective == "distillation":
            return sum(
                float((output_of(of, b) - output_of(dense, b)).square().mean())
                for b in sample
            )
        with torch.no_grad():
            return sum(
                float(
                    of(
                        input_ids=b.input_ids,
                        attention_mask=b.attention_mask,
                        labels=b.input_ids.masked_fill(b.attention_mask == 0, -100),
                    ).loss
                )
                for b in sample
            )

    assert loss(model) < (0.8 if objective == "distillation" else 0.95) * loss(router)
    network = {
        id(parameter)
        for _, block in layers.blocks(model)
        for part in (*where.ffn_in, where.ffn_out)
        for parameter in block.get_submodule(part).parameters()
    }
    for (name_, now), before in zip(
        model.named_parameters(), dense.parameters(), strict=True
    ):
        assert torch.equal(now, before) != (id(now) in network), name_
        assert not now.requires_grad


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = model_of("bert"), model_of("bert")
    for model in (first, second):
        factorize_(
            model, batches(), FactorLLM(experts=4, active=2, steps=5, split="permuted")
        )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_permutation_is_one() -> None:
    split = permuted(48, 4, seed=3)
    assert split.shape == (4, 12)
    assert sorted(split.flatten().tolist()) == list(range(48))
    assert not torch.equal(split, permuted(48, 4, seed=4))


def test_what_cannot_be_factorized_is_refused() -> None:
    with pytest.raises(
        CompressionError, match="5 experts do not divide the 48 neurons"
    ):
        factorize_(model_of("bert"), batches(), FactorLLM(experts=5, active=2))
    few = [Batch(torch.full((1, 3), 7), torch.ones(1, 3, dtype=torch.long))]
    with pytest.raises(CompressionError, match="3 tokens for experts of 12 neurons"):
        factorize_(model_of("bert"), few, FactorLLM(experts=4, active=2))
    with pytest.raises(CompressionError, match="needs a language model with its head"):
        factorize_(
            model_of("bert"), batches(), FactorLLM(experts=4, active=2, objective="lm")
        )
    with pytest.raises(ConfigError, match="5 of 4 experts"):
        FactorLLM(experts=4, active=5)
