"""What output gradients say of a loss, and that those which rounding has eaten say nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpdl.per_sample.loss_relation import agree, relation_of

N, PART = 20, 7


def gradients(logits: Tensor, labels: Tensor, reduction: str) -> list[Tensor]:
    leaf = logits.clone().requires_grad_()
    return list(torch.autograd.grad(F.cross_entropy(leaf, labels, reduction=reduction), leaf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 20.0, 60.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_and_a_sum_are_told_apart_however_small_their_gradients(
    dtype: torch.dtype, scale: float, reduction: str
) -> None:
    torch.manual_seed(0)
    labels = torch.randint(3, (N,))
    logits = (torch.randn(N, 3) + scale * F.one_hot(labels, 3)).to(dtype)

    whole = gradients(logits, labels, reduction)
    part = gradients(logits[:PART], labels[:PART], reduction)

    assert relation_of([whole[0][:PART]], part, size=N, part_size=PART) == reduction


@pytest.mark.parametrize("margin", range(88, 106))
def test_gradients_that_rounding_has_eaten_say_nothing(margin: int) -> None:
    """A saturated softmax: probabilities are a few multiples of the smallest number that float32 has."""
    torch.manual_seed(margin)
    labels = torch.randint(3, (N,))
    logits = torch.randn(N, 3) + margin * F.one_hot(labels, 3)

    whole = gradients(logits, labels, "mean")
    part = gradients(logits[:PART], labels[:PART], "mean")

    assert relation_of([whole[0][:PART]], part, size=N, part_size=PART) in (None, "mean")


def test_a_gradient_that_comes_out_of_nothing_is_seen() -> None:
    nothing, something = torch.zeros(4), torch.full((4,), 1e-3)
    assert agree([nothing], [something]) is False
    assert agree([something], [nothing]) is False
    assert relation_of([nothing], [something], size=N, part_size=PART) == "neither"
    assert agree([nothing], [nothing]) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_still_says_what_a_loss_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    per_example = torch.randn(PART, 3)
    whole, part = (per_example / N).to(dtype), (per_example / PART).to(dtype)
    assert relation_of([whole], [part], size=N, part_size=PART) == "mean"
    assert relation_of([part], [part], size=N, part_size=PART) == "sum"
