"""The oracle against closed forms, and the small models against the oracle's assumption."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.oracles import one_at_a_time as oracle
from tests.per_sample.case import N, SmallModel, mse_sum, normal
from tests.per_sample.small_models import SMALL_MODELS


def test_gradients_of_least_squares_are_twice_residual_times_input() -> None:
    model = nn.Linear(6, 2).double()
    x, y = normal(N, 6), normal(N, 2, seed=1)
    residual = 2 * (x @ model.weight.T + model.bias - y).detach()
    gradients = oracle.per_sample_gradients(model, mse_sum, x, y)
    torch.testing.assert_close(gradients["weight"], residual[:, :, None] * x[:, None, :])
    torch.testing.assert_close(gradients["bias"], residual)
    norms = residual.norm(dim=1) * (x.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(oracle.norms_of(gradients), norms)


def test_clipped_sum_scales_down_what_is_too_long_and_nothing_else() -> None:
    gradients = {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[4.0], [0.4]])}
    torch.testing.assert_close(
        oracle.clipped_sum_of(gradients, 1.0), {"a": torch.tensor([0.9]), "b": torch.tensor([1.2])}
    )
    torch.testing.assert_close(
        oracle.clipped_sum_of(gradients, math.inf), {"a": torch.tensor([3.3]), "b": torch.tensor([4.4])}
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", SMALL_MODELS, ids=lambda case: case.name)
def test_no_small_model_mixes_examples(case: SmallModel) -> None:
    """The gradient of the batch's loss is the mean (or sum) of the gradients one at a time."""
    model = case.module()
    inputs, targets = case.batch()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        case.loss_fn(oracle.call(model, inputs), targets), list(trainable.values()), allow_unused=True
    )
    of_batch = {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(trainable.items(), found, strict=True)
    }
    share = 1 / N if case.loss_reduction == "mean" else 1.0
    rows = oracle.per_sample_gradients(model, case.loss_fn, inputs, targets)
    error, name = oracle.worst_error({n: share * g.sum(0) for n, g in rows.items()}, of_batch)
    assert error <= 1e-12, (name, error)


def test_the_worst_error_is_relative_and_sees_one_wrong_parameter() -> None:
    true = {"large": torch.full((4,), 100.0), "small": torch.full((2,), 1.0)}
    assert oracle.worst_error(true, true)[0] == 0.0
    error, name = oracle.worst_error({**true, "small": true["small"] * 1.1}, true)
    assert name == "small"
    assert error == pytest.approx(0.1)
    with pytest.raises(AssertionError):
        oracle.worst_error({"large": true["large"]}, true)
