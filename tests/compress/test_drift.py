"""Making up for what the layers before have changed."""

from __future__ import annotations

import copy

import pytest
import torch

from edgelm import layers
from edgelm.calibration import Batch
from edgelm.compress import Blocks, Sparsify, compress, sequential
from edgelm.compress.least_squares import solve
from edgelm.compress.observe import watch
from edgelm.compress.sparsify import Layer
from edgelm.statistics import ActivationStatistics
from tests.compress.test_blocks import MODELS, batches, outputs

RESIDUAL = [n for n in sorted(MODELS) if layers.ARCHITECTURES[n].residual]


@pytest.mark.parametrize("name", RESIDUAL)
def test_drift_added_to_a_layers_output_gives_the_dense_blocks_output(
    name: str,
) -> None:
    """The residual counted: what joins the stream then is what joined it in the dense model."""
    torch.manual_seed(0)
    model, sample = MODELS[name]().eval(), batches()
    where = layers.of_config(model.config)
    (_, first), *rest = layers.blocks(model)
    second = rest[0][1] if rest else first  # ALBERT has one
    dense_first, dense = copy.deepcopy(first), copy.deepcopy(second)
    with torch.no_grad():
        now = sequential.start(model, sample)
        before = sequential.copies(now)
        if rest:
            first.get_submodule(where.ffn_out).weight.mul_(0.5)
            sequential.advance_(first, 0, now)
            sequential.advance_(dense_first, 0, before)
        else:
            for flow in now:
                flow.hidden = flow.hidden + 0.1 * torch.randn_like(flow.hidden)
                flow.calls = flow.calls[:1]
            for flow in before:
                flow.calls = flow.calls[:1]
        index = 1 if rest else 0
        for one, other in zip(now, before, strict=True):
            seen, due = (
                watch(block, index, flow, [where.ffn_out], where)
                for block, flow in ((second, one), (dense, other))
            )
            drift = due[0].output - seen[0].output
            handle = second.get_submodule(where.ffn_out).register_forward_hook(
                lambda _, args, output, drift=drift: output + drift
            )
            mended = sequential.advanced(second, index, one)
            handle.remove()
            wanted = sequential.advanced(dense, index, other)
            assert float(drift.abs().max()) > 1e-4
            torch.testing.assert_close(mended, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_aim_and_error_are_those_of_least_squares_on_the_tokens(
    shifts: bool, share: float
) -> None:
    torch.manual_seed(1)
    mix = torch.eye(6) + 0.2 * torch.randn(
        6, 6
    )  # well conditioned: damping shows little
    x = torch.randn(40, 30, 6) @ mix + torch.randn(6)
    weight = torch.randn(4, 6)
    d = x @ torch.randn(6, 4) * 0.3 + 0.1 * torch.randn(40, 30, 4) + 0.5
    statistics = ActivationStatistics.of(x, torch.ones(40, 30), gram=True, drift=d)
    layer = Layer(weight, shifts, statistics, statistics, share)
    tokens = x.reshape(-1, 6).double()
    wanted = tokens @ weight.T.double() + share * d.reshape(-1, 4).double()
    left = torch.cat([tokens, torch.ones(len(tokens), 1)], 1) if shifts else tokens
    due = torch.linalg.lstsq(left, wanted).solution[:6].T
    torch.testing.assert_close(layer.aim.double(), due, rtol=0.05, atol=0.02)

    other = layer.aim * (torch.rand(4, 6) < 0.7)
    shift = layer.shift(other)
    assert (shift is not None) == shifts
    given = tokens @ other.T.double() + (0 if shift is None else shift)
    energy = (tokens @ weight.T.double()).square().sum()
    lost = float((given - wanted).square().sum() / energy)
    assert layer.error(other) == pytest.approx(lost, rel=1e-4)


def test_drift_that_cannot_be_told_from_the_input_is_left_alone() -> None:
    """With fewer tokens than features the fit is all noise; other text shows it."""
    torch.manual_seed(2)
    made = [
        ActivationStatistics.of(
            torch.randn(2, 5, 32),
            torch.ones(2, 5),
            gram=True,
            drift=torch.randn(2, 5, 4),
        )
        for _ in range(2)
    ]
    layer = Layer(torch.randn(4, 32), True, made[0], made[1], 1.0)
    assert layer.aim is layer.weight


def test_ridge_regression_from_moments() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(50, 7), torch.randn(50, 3)
    x[:, 4] = 0  # a dead feature
    gram, target = x.T @ x / 50, y.T @ x / 50
    ridge = 0.01 * gram.diagonal()
    ridge[4] = 1
    due = target @ torch.linalg.inv(gram + ridge.diag())
    torch.testing.assert_close(solve(gram, target), due, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_following_the_drift_brings_the_model_nearer_to_the_dense_one(
    name: str,
) -> None:
    """Over the text that was calibrated on."""
    far = {}
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        ids = torch.randint(5, 60, (40, 12))
        sample = [Batch(ids, torch.ones_like(ids))]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        dense = outputs(model, sample[0])
        step = Sparsify(sparsity=0.6, refine="none", repair="admm", drift=share)
        compress(Blocks(model), [step], sample, sample)
        far[share] = float((outputs(model, sample[0]) - dense).square().mean())
    assert far[1.0] < far[0.0]
