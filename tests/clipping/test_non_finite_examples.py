"""An example whose gradient is no number has no say; all others have exactly the say they had without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.optim.private_optimizer import Diagnostics
from tests.small_run import CLASSES, FEATURES, N, examples, network, released, small_run, weights_of

BAD = 4  # its row
X, Y = examples()
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
each_engine = pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
each_physical = pytest.mark.parametrize("physical", [None, 5, 1])


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


class GradientOnly(nn.Module):
    """Where the first input is 0 the output is finite, and the derivative of the root is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x[:, :1].abs() * self.gate).sqrt()


def gradient_only() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(71)
        return GradientOnly().double()


def bad_row(value: float) -> Tensor:
    return torch.tensor([value, *X[BAD, 1:].tolist()], dtype=X.dtype)


# name: model, the bad example, its loss
TROUBLE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "NaN in x": (network, bad_row(math.nan)),
    "infinity in x": (lambda: network()[:1], bad_row(math.inf)),
    "overflow": (lambda: network()[:1], bad_row(1e308)),
    "NaN in the gradient alone": (gradient_only, bad_row(0.0)),
}


def run_on(
    build: Callable[[], nn.Module], x: Tensor, y: Tensor, loss: Loss = cross_entropy, **settings: Any
) -> dpdl.Private:
    """One step on all of x."""
    private = small_run(build(), dataset=TensorDataset(x, y), batch_size=len(x), max_grad_norm=0.5, **settings)
    while private.optimizer.steps_taken == 0:
        for batch_x, batch_y in private.loader:
            private.optimizer.zero_grad()
            loss(private.model, batch_x, batch_y).backward()
            private.optimizer.step()
            if private.optimizer.steps_taken:
                break
    return private


@each_physical
@each_engine
@pytest.mark.parametrize("trouble", TROUBLE)
def test_the_rest_of_the_batch_is_released_as_without_it(trouble: str, engine: str, physical: int | None) -> None:
    build, row = TROUBLE[trouble]
    x, good = X.clone(), torch.arange(N) != BAD
    x[BAD] = row
    settings = {"engine": engine, "max_physical_batch_size": physical}
    whole, without = run_on(build, x, Y, **settings), run_on(build, x[good], Y[good], **settings)
    assert whole.optimizer.diagnostics.non_finite == 1
    assert whole.optimizer.diagnostics.examples == N
    assert without.optimizer.diagnostics.non_finite == 0
    assert whole.optimizer.diagnostics.clipped == without.optimizer.diagnostics.clipped > 0
    torch.testing.assert_close(released(whole), released(without), rtol=1e-12, atol=1e-14)


@each_engine
def test_a_batch_of_nothing_but_nan_is_a_step_of_noise_alone(engine: str) -> None:
    """The same noise as on an empty batch, bit for bit."""
    nan = run_on(network, torch.full_like(X, math.nan), Y, engine=engine, noise_multiplier=1.0)
    constant = run_on(
        network, X, Y, lambda m, x, y: 0.0 * m(x).sum(), engine=engine, noise_multiplier=1.0, self_check=False
    )
    assert nan.optimizer.diagnostics == Diagnostics(examples=N, clipped=0, non_finite=N)
    assert nan.optimizer.steps_taken == 1
    torch.testing.assert_close(released(nan), released(constant), rtol=0.0, atol=0.0)
    assert all(g.abs().sum() > 0 for g in released(nan).values())
    assert all(torch.isfinite(p).all() for p in nan.model.parameters())


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_huge_finite_gradient_is_clipped_and_not_dropped(engine: str, dtype: torch.dtype) -> None:
    """Its squares overflow float32; its norm does not."""
    x, y = examples(dtype=dtype)
    x[BAD] = 1e25
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(72)
        model = nn.Linear(FEATURES, 1, dtype=dtype)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return m(x).sum(1).mean()

    settings = {"accumulate_dtype": torch.float32, "engine": engine}
    private = run_on(lambda: model, x, y, loss, **settings)
    assert private.optimizer.diagnostics.non_finite == 0
    good = torch.arange(N) != BAD
    without = run_on(lambda: nn.Linear(FEATURES, 1, dtype=dtype), x[good], y[good], loss, **settings)
    difference = {name: released(private)[name] - g for name, g in released(without).items()}
    assert float(torch.cat([d.flatten() for d in difference.values()]).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("physical", [None, 5])
def test_bad_examples_are_counted_over_all_parts_and_steps(physical: int | None) -> None:
    x = X.clone()
    x[[0, 7, 11]] = math.nan
    private = small_run(dataset=TensorDataset(x, Y), max_physical_batch_size=physical, steps=2)
    while private.optimizer.steps_taken < 2:
        for batch_x, batch_y in private.loader:
            cross_entropy(private.model, batch_x, batch_y).backward()
            private.optimizer.step()
    assert private.optimizer.diagnostics.non_finite == 6
    assert private.optimizer.diagnostics.examples == 24


def test_an_example_that_is_no_number_does_not_switch_a_parameter_off() -> None:
    private = run_on(network, torch.full_like(X, math.inf), Y, noise_multiplier=2.0)
    before = weights_of(network())
    assert all(not torch.equal(before[name], p) for name, p in private.model.named_parameters())
