"""A small private run to misuse, and a snapshot of all that a refusal has to leave as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpdl
from dpdl.errors import PrivacyError

N, FEATURES, CLASSES = 12, 3, 2
LR = 0.1

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


def examples(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs [n, 3] and classes [n], the first rows of one fixed table."""
    generator = torch.Generator().manual_seed(31)
    x = torch.randn(256, FEATURES, generator=generator, dtype=torch.float64)[:n]
    y = torch.randint(0, CLASSES, (256,), generator=generator)[:n]
    return x.to(dtype), y


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(32)
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).to(dtype)


def small_run(
    model: nn.Module | None = None,
    *,
    dataset: Dataset[Any] | None = None,
    loader: DataLoader[Any] | None = None,
    batch_size: int = N,
    steps: int = 10,
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 1.0,
    optimizer: MakeOptimizer = sgd,
    insecure_seed: int | None = 33,
    **execution: Any,
) -> dpdl.Private:
    """Every example in every batch unless `batch_size` is given; no noise unless `noise_multiplier` is."""
    model = network() if model is None else model
    if loader is None:
        loader = DataLoader(dataset or TensorDataset(*examples()), batch_size=batch_size, shuffle=True)
    plan = dpdl.PrivacyPlan.for_loader(
        loader, steps=steps, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm
    )
    execution = {"accumulate_dtype": torch.float64, "insecure_seed": insecure_seed, **execution}
    return dpdl.make_private(model, optimizer(model.parameters()), loader, plan, execution=dpdl.Execution(**execution))


def train_on(private: dpdl.Private, batch: Any) -> None:
    """The loop's body, as a user writes it."""
    x, y = batch
    private.optimizer.zero_grad()
    F.cross_entropy(private.model(x), y).backward()
    private.optimizer.step()


def step_once(private: dpdl.Private) -> None:
    """One logical batch."""
    taken = private.optimizer.steps_taken
    for batch in private.loader:
        train_on(private, batch)
        if private.optimizer.steps_taken > taken:
            return


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def released(private: dpdl.Private) -> dict[str, Tensor]:
    """What the last step released, as a sum over examples."""
    size = private.optimizer.plan.expected_batch_size
    return {name: p.grad * size for name, p in private.model.named_parameters() if p.grad is not None}


def everything_that_counts(private: dpdl.Private) -> dict[str, Any]:
    """Weights and buffers, the optimizer's state and settings, what was spent, what was counted."""
    return {
        "weights": weights_of(private.model),
        "optimizer": copy.deepcopy(private.optimizer.inner.state_dict()),
        "ledger": private.optimizer.ledger.to_json(),
        "diagnostics": private.optimizer.diagnostics,
    }


def same(left: Any, right: Any) -> bool:
    """Equal structures with bitwise equal tensors."""
    (a, a_spec), (b, b_spec) = tree_flatten(left), tree_flatten(right)
    return a_spec == b_spec and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@contextmanager
def refused(private: dpdl.Private, kind: type[PrivacyError], *words: str) -> Iterator[None]:
    """The block raises `kind` in words that name the thing and the remedy, and changes nothing."""
    before = everything_that_counts(private)
    with pytest.raises(kind) as caught:
        yield
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing from: {caught.value}"
    after = everything_that_counts(private)
    assert same(before, after), "a refusal changed the run"


def plain_gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The sum over examples of unclipped gradients, by plain autograd on a copy."""
    twin = copy.deepcopy(model)
    (loss(twin) * N).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def one_step(model: nn.Module, loss: Callable[[nn.Module], Tensor], **settings: Any) -> dict[str, Tensor]:
    """What a private step without noise and clipping releases."""
    private = small_run(model, max_grad_norm=1e9, **settings)
    next(iter(private.loader))
    loss(private.model).backward()
    private.optimizer.step()
    return released(private)
