"""Losses that reach parameters outside of the private model, which would be trained on private data un-noised."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from dpdl.errors import LossError
from tests.small_run import CLASSES, refused, small_run


def test_a_penalty_on_the_weights_beside_the_private_loss_is_refused() -> None:
    """It is data-independent here, but nothing shows that; weight_decay is the way."""
    private = small_run()
    x, y = next(iter(private.loader))
    loss = F.cross_entropy(private.model(x), y) + private.model.module[0].weight.square().sum()
    with refused(private, LossError, "(4, 3)", "without clipping or noise"):
        loss.backward()


def test_a_head_outside_of_the_private_model_is_refused() -> None:
    """Its own optimizer would train it on private data, un-noised."""
    private = small_run()
    x, y = next(iter(private.loader))
    head = nn.Linear(CLASSES, CLASSES, dtype=torch.float64)
    loss = F.cross_entropy(head(private.model(x)), y)
    with refused(private, LossError, "(2, 2)", "Make them part of the model"):
        loss.backward()
    assert head.weight.grad is None
