"""Loops that go forward and backward several times over one batch, each with what it means for one example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from tests.oracles.one_at_a_time import norms_of
from tests.oracles.several_contributions import Term, clipped_sum, summed_gradients
from tests.small_run import CLASSES, FEATURES, N, network, released, small_run


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = normal(1, N, FEATURES), 2 * normal(2, N, FEATURES)
Y = torch.randint(0, CLASSES, (N,), generator=torch.Generator().manual_seed(3))
FAKE = 0.3 * normal(4, N, FEATURES)  # of a generator that knows nothing of the batch
DATASET = TensorDataset(A, B, Y, FAKE)
DATA = (A, B, Y, FAKE)

Batch = Sequence[Tensor]


def pair_loss(left: Tensor, right: Tensor, y: Tensor) -> Tensor:
    distance = (left - right).square().sum(1)
    return torch.where(y == 1, distance, F.relu(1 - distance)).mean()


@dataclass(frozen=True)
class Way:
    """A loop's body between zero_grad and step, and what it means for one example."""

    train: Callable[[nn.Module, Batch], None]
    terms: tuple[Term, ...]

    @property
    def clip(self) -> float:
        """A clipping norm that some examples exceed and others do not."""
        return float(norms_of(summed_gradients(network(), self.terms, DATA)).median())

    def clipped_sum(self, data: Sequence[Tensor] = DATA) -> dict[str, Tensor]:
        """What is to be released without noise."""
        return clipped_sum(network(), self.terms, data, self.clip)

    def run(self, **settings: Any) -> dpdl.Private:
        return small_run(dataset=DATASET, **{"max_grad_norm": self.clip, **settings})


def siamese(model: nn.Module, batch: Batch) -> None:
    a, b, y, _ = batch
    pair_loss(model(a), model(b), y).backward()


def critic(model: nn.Module, batch: Batch) -> None:
    a, _, _, fake = batch
    model(a)[:, 0].mean().backward()
    (-model(fake)[:, 0].mean()).backward()


def three(model: nn.Module, batch: Batch) -> None:
    a, b, y, _ = batch
    F.cross_entropy(model(a), y).backward()
    (-0.5 * model(b).square().sum(1).mean()).backward()
    (2.5 * model(a + b)[:, 1].mean()).backward()


def the_same_loss_twice(model: nn.Module, batch: Batch) -> None:
    loss = F.cross_entropy(model(batch[0]), batch[2])
    loss.backward(retain_graph=True)
    loss.backward()


def two_losses_of_one_output(model: nn.Module, batch: Batch) -> None:
    output = model(batch[0])
    (3 * F.cross_entropy(output, batch[2])).backward(retain_graph=True)
    output.square().sum(1).mean().backward()


def accumulated(model: nn.Module, batch: Batch) -> None:
    for shift in range(3):
        (F.cross_entropy(model(batch[0] + shift), batch[2]) / 3).backward()


def crossed(model: nn.Module, batch: Batch) -> None:
    a, b, y, _ = batch
    first, second = F.cross_entropy(model(a), y), model(b).square().sum(1).mean()
    second.backward()
    first.backward()


def put_together(model: nn.Module, batch: Batch) -> None:
    """Targets that no trace follows, one block for each forward."""
    a, _, _, fake = batch
    outputs = torch.cat([model(a)[:, 0], model(fake)[:, 0]])
    labels = torch.cat([torch.ones(len(a)), torch.zeros(len(a))]).double()
    F.binary_cross_entropy_with_logits(outputs, labels).backward()


def with_strays(model: nn.Module, batch: Batch) -> None:
    a, b, y, _ = batch
    model(b)
    loss = F.cross_entropy(model(a), y)
    with torch.no_grad():
        model(A[:3])
    model(b).sum()
    model.eval()
    model(A[:4])
    model.train()
    loss.backward()


def bce(output: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(output[:, 0], torch.full((1,), label, dtype=torch.float64))


WAYS = {
    "siamese": Way(siamese, (lambda m, e: pair_loss(m(e[0]), m(e[1]), e[2]),)),
    "critic": Way(critic, (lambda m, e: m(e[0])[0, 0], lambda m, e: -m(e[3])[0, 0])),
    "three": Way(
        three,
        (
            lambda m, e: F.cross_entropy(m(e[0]), e[2]),
            lambda m, e: -0.5 * m(e[1]).square().sum(),
            lambda m, e: 2.5 * m(e[0] + e[1])[0, 1],
        ),
    ),
    "the same loss twice": Way(the_same_loss_twice, (lambda m, e: 2 * F.cross_entropy(m(e[0]), e[2]),)),
    "two losses of one output": Way(
        two_losses_of_one_output,
        (lambda m, e: 3 * F.cross_entropy(m(e[0]), e[2]), lambda m, e: m(e[0]).square().sum()),
    ),
    "accumulated": Way(accumulated, tuple(lambda m, e, s=s: F.cross_entropy(m(e[0] + s), e[2]) / 3 for s in range(3))),
    "crossed": Way(crossed, (lambda m, e: F.cross_entropy(m(e[0]), e[2]), lambda m, e: m(e[1]).square().sum())),
    "put together": Way(put_together, (lambda m, e: bce(m(e[0]), 1.0) / 2, lambda m, e: bce(m(e[3]), 0.0) / 2)),
    "with strays": Way(with_strays, (lambda m, e: F.cross_entropy(m(e[0]), e[2]),)),
}


def one_release(private: dpdl.Private, train: Callable[[nn.Module, Batch], None]) -> dict[str, Tensor]:
    """What a logical batch releases."""
    taken = private.optimizer.steps_taken
    for batch in private.loader:
        private.optimizer.zero_grad()
        train(private.model, batch)
        private.optimizer.step()
        if private.optimizer.steps_taken > taken:
            break
    return released(private)


PLAIN = WAYS["with strays"]  # one loss of one output
