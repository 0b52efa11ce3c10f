"""Per-sample gradients without privacy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpdl.compat.deepee import PerSampleGradientWrapper
from dpdl.compat.deepee.snooper import BadModuleError
from tests.compat.deepee.training import examples, network

B = 4


def start() -> tuple[PerSampleGradientWrapper, nn.Sequential]:
    net = network()
    return PerSampleGradientWrapper(net, B), net


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_are_each_examples_part_of_the_loss_gradient(reduction: str) -> None:
    x, y = examples(B)
    model, net = start()
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    model.calculate_per_sample_gradients()
    plain = network()
    losses = F.cross_entropy(plain(x), y, reduction="none") / (B if reduction == "mean" else 1)
    for n in range(B):
        expected = torch.autograd.grad(losses[n], list(plain.parameters()), retain_graph=True)
        for p, e in zip(net.parameters(), expected, strict=True):
            assert torch.allclose(p.accumulated_gradients[n], e, rtol=1e-9)  # type: ignore[attr-defined]
    assert all(p.grad is None for p in net.parameters())


def test_the_next_batch_starts_anew_and_backwards_of_one_add_up() -> None:
    x, y = examples(B)
    model, net = start()
    found = []
    for times in (1, 1, 2):
        output = model(x)
        for _ in range(times):
            F.cross_entropy(output, y).backward(retain_graph=True)
        model.calculate_per_sample_gradients()
        model.calculate_per_sample_gradients()  # again: the same
        found.append(net[0].weight.accumulated_gradients)  # type: ignore[union-attr]
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[2], 2 * found[0])


def test_frozen_parameters_have_none_and_unused_ones_zeros() -> None:
    x, y = examples(B)
    model, net = start()
    net[0].requires_grad_(False)
    net.register_parameter("unused", nn.Parameter(torch.ones(2)))
    F.cross_entropy(model(x), y).backward()
    model.calculate_per_sample_gradients()
    assert not hasattr(net[0].weight, "accumulated_gradients")
    assert torch.equal(net.unused.accumulated_gradients, torch.zeros(B, 2))  # type: ignore[union-attr]


def test_zero_grad_and_freezing_work_though_parameters_is_refused() -> None:
    x, y = examples(B)
    model, net = start()
    F.cross_entropy(model(x), y).backward()
    model.calculate_per_sample_gradients()
    model.zero_grad()
    assert not hasattr(net[0].weight, "accumulated_gradients")
    assert not any(p.requires_grad for p in model.requires_grad_(False).wrapped_model.parameters())
    with pytest.raises(ValueError, match="wrapped_model"):
        model.parameters()


def test_out_of_order_and_out_of_size() -> None:
    x, y = examples(B)
    model, _ = start()
    with pytest.raises(RuntimeError, match="forward"):
        model.calculate_per_sample_gradients()
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match="No gradients"):
        model.calculate_per_sample_gradients()
    loss.backward(retain_graph=True)
    model.calculate_per_sample_gradients()
    with pytest.raises(RuntimeError, match="Call the model again"):
        loss.backward()
    with pytest.raises(ValueError, match="batch size"):
        model(x[:-1])
    model.eval()
    assert model(x[:-1]).shape == (B - 1, 2)
    with pytest.raises(BadModuleError):
        PerSampleGradientWrapper(nn.BatchNorm1d(3), B)
