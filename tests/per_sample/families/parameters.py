"""Parameters in unusual roles: shared, reparametrised, frozen, unused, used twice."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.per_sample.case import N, SmallModel, normal, tokens

X = normal(N, 6, seed=51)
Y = tokens(N, vocabulary=4, seed=52)


class TwiceTheSameLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


class TwiceInTwoWays(nn.Module):
    """One matrix: applied to the data, applied transposed, and added up into a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = (x @ self.matrix).tanh() @ self.matrix.t()
        return self.head(h * self.matrix.sum(0).sigmoid())


class TiedAcrossModules(nn.Module):
    """Two modules, one weight, two biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class LowRank(nn.Module):
    """A frozen base weight plus B @ A."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 4).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 6))
        self.b = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)


class Frozen(nn.Module):
    """A frozen layer between two that are trained, and a trained bias on a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.middle = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 4)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.first(x).tanh()).tanh())


class Unused(nn.Module):
    """Has a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.spare = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class BranchNotTaken(nn.Module):
    def __init__(self, *, deep: bool) -> None:
        super().__init__()
        self.deep = deep
        self.shallow_head = nn.Linear(6, 4)
        self.deep_head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep_head(x) if self.deep else self.shallow_head(x)


class UsedWithoutEffect(nn.Module):
    """Part of the graph, but its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.silenced = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0.0 * self.silenced(x)


class Buffers(nn.Module):
    """Constants that move with the module: a mean, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", normal(6, seed=53))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, True]))
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x - self.mean).masked_fill(~self.mask, 0.0))


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nij,ijk->nk", x.view(-1, 2, 3), self.cube)


class Parametrised(nn.Module):
    def __init__(self, parametrisation) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.inner = parametrisation(nn.Linear(6, 5))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).tanh())


class SoftExperts(nn.Module):
    """Weights mixed per example by a gate: the parameter meets the data in an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ne,eio,ni->no", self.gate(x).softmax(-1), self.experts, x)


model = partial(SmallModel, inputs=X, targets=Y, loss_fn=F.cross_entropy)


MODELS = (
    model(name="layer_used_twice", build=TwiceTheSameLayer),
    model(name="parameter_used_in_three_ways", build=TwiceInTwoWays),
    model(name="weight_tied_across_modules", build=TiedAcrossModules),
    model(name="low_rank_adapter", build=LowRank),
    model(name="frozen_parameters", build=Frozen),
    model(name="unused_parameter", build=Unused),
    model(name="branch_not_taken_deep", build=lambda: BranchNotTaken(deep=False)),
    model(name="branch_not_taken_shallow", build=lambda: BranchNotTaken(deep=True)),
    model(name="used_without_effect", build=UsedWithoutEffect),
    model(name="buffers", build=Buffers),
    model(name="einsum", build=Einsum),
    model(name="soft_experts", build=SoftExperts),
    model(name="weight_norm", build=lambda: Parametrised(parametrizations.weight_norm)),
    model(name="orthogonal_parametrisation", build=lambda: Parametrised(parametrizations.orthogonal)),
)
