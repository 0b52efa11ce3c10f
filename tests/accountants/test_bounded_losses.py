"""Noise whose loss is bounded leaks nothing beyond it: rounding must not make mass of infinite loss."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

from accountants import Event, Gaussian, Group, Laplace, PoissonSampled, PRVAccountant
from accountants.components.component import DIRECTIONS, Component
from accountants.components.sampled_noise import SampledNoise
from accountants.components.shift_mixture import ShiftMixture
from accountants.components.subset_sampled import SubsetSampled

RATES = [1e-7, 4e-6, 1e-4, 0.03, 0.5]
PLANS = [
    (PoissonSampled(0.1, Laplace(2.0)) * 100, 1e-15),
    (PoissonSampled(1e-4, Laplace(1.0)) * 10**5, 1e-12),
    (PoissonSampled(1e-3, Laplace(1.0)) * 10**5, 1e-12),
    (Group(PoissonSampled(4e-6, Laplace(6.0)), 3) * 1000, 1e-10),
    (PoissonSampled(0.1, Laplace(2.0)) * 100 + PoissonSampled(0.01, Gaussian(1.0)) * 10, 1e-14),
]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("scale", [0.3, 1.0, 6.79])
def test_no_mass_lies_beyond_the_greatest_loss(rate: float, scale: float) -> None:
    components: list[Component] = [
        SampledNoise("laplace", scale, rate),
        SubsetSampled(SampledNoise("laplace", scale, rate), None),
        ShiftMixture("laplace", scale, ((0.0, 1 - rate), (1.0, rate)), ((0.0, 1 - rate), (-1.0, rate))),
    ]
    for component in components:
        for direction in DIRECTIONS:
            pair = component.pair(direction)
            assert pair is not None
            most = pair.support[1]
            beyond = np.nextafter(most, np.inf)
            p, _ = pair.cells(np.array([-np.inf, most / 2, beyond, 2 * beyond, np.inf]))
            assert p[2:].sum() == 0
            assert pair.infinite == 0
            assert p.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("event", "delta"), PLANS, ids=lambda value: f"{value}"[:60])
def test_epsilon_and_delta_do_not_contradict_each_other(event: Event, delta: float) -> None:
    accountant = PRVAccountant().compose(event)
    low, high = accountant.interval(delta)
    assert accountant.delta_interval(low).upper >= delta * (1 - 1e-6)
    assert accountant.delta_interval(high).lower <= delta * (1 + 1e-6)


def test_lower_bound_is_below_an_independent_convolution() -> None:
    """Poisson-sampled Laplace, removal: the loss's law on a fine grid, rounded up, convolved in extended precision."""
    rate, scale, steps, delta = 0.1, 2.0, 8, 1e-9
    grid = np.linspace(-1 / scale, 1 / scale, 2**13 + 1)
    spacing = 2e-5
    u = (grid[1:] + grid[:-1]) / 2
    absent = 0.5 * (np.exp(-(grid[:-1] + 1 / scale) / 2) - np.exp(-(grid[1:] + 1 / scale) / 2))
    absent = np.concatenate([[0.5], absent, [0.5 * np.exp(-1 / scale)]])
    u = np.concatenate([[-1 / scale], u, [1 / scale]])
    ratio = 1 - rate + rate * np.exp(u)
    index = np.ceil(np.log(ratio) / spacing + 1).astype(int)
    first = index.min()
    law = np.bincount(index - first, weights=absent * ratio)
    total = law
    for _ in range(steps - 1):
        total = np.convolve(total, law)
    losses = (steps * first + np.arange(len(total))) * spacing
    low = PRVAccountant().compose(PoissonSampled(rate, Laplace(scale)), steps).interval(delta).lower
    above = losses > low
    upper_delta = float(mpmath.fsum(total[above] * -np.expm1(low - losses[above])))
    assert upper_delta >= delta
