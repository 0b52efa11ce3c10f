"""Renyi moments against high-precision quadrature, the binomial sum and dp_accounting; the conversion to epsilon."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from accountants import Gaussian, Laplace, ParameterError, PoissonSampled, RDPAccountant, rdp


def divergence_by_mpmath(q: float, order: float, log_ratio, density, cuts, reverse: bool) -> mpmath.mpf:  # type: ignore[no-untyped-def]
    """Renyi divergence of (1 - q) A(0) + q A(1) from A(0) (or back), integrated to 30 digits."""
    power = 1 - order if reverse else order

    def integrand(x: mpmath.mpf) -> mpmath.mpf:
        return density(x) * ((1 - q) + q * mpmath.exp(log_ratio(x))) ** power

    return mpmath.log(mpmath.quad(integrand, cuts)) / (mpmath.mpf(order) - 1)


def gaussian_divergence(q: float, sigma: float, order: float, reverse: bool) -> float:
    with mpmath.workdps(30):
        s = mpmath.mpf(sigma)
        cuts = [mpmath.mpf(k) * s for k in range(-20, 21, 2)]
        cuts = sorted(set(cuts + [c + (order if not reverse else -order) * k / 4 for c in cuts for k in range(5)]))
        return float(
            divergence_by_mpmath(
                mpmath.mpf(q),
                order,
                lambda x: (2 * x - 1) / (2 * s * s),
                lambda x: mpmath.npdf(x, 0, s),
                cuts,
                reverse,
            )
        )


@pytest.mark.parametrize(
    ("q", "sigma", "order"),
    [(0.01, 1.0, 1.1), (0.01, 1.0, 2.5), (0.3, 0.5, 3.7), (1e-4, 2.0, 31.6), (0.9, 0.3, 1.01), (0.5, 10.0, 64.5)],
)
def test_sampled_gaussian_rdp_equals_quadrature(q: float, sigma: float, order: float) -> None:
    truth = max(gaussian_divergence(q, sigma, order, reverse) for reverse in (False, True))
    ours = float(rdp(PoissonSampled(q, Gaussian(sigma)), order))
    assert truth <= ours <= truth * (1 + 1e-8)


@pytest.mark.parametrize(
    ("q", "b", "order"), [(1.0, 1.0, 3.3), (0.1, 1.0, 1.5), (0.1, 0.2, 17.0), (0.5, 5.0, 200.5), (1.0, 0.5, 90.0)]
)
def test_sampled_laplace_rdp_equals_quadrature(q: float, b: float, order: float) -> None:
    with mpmath.workdps(30):
        scale, rate = mpmath.mpf(b), mpmath.mpf(q)
        truth = mpmath.mpf(0)
        for power in (mpmath.mpf(order), 1 - mpmath.mpf(order)):
            low, high = ((1 - rate) + rate * mpmath.exp(sign / scale) for sign in (-1, 1))
            atoms = (low**power + mpmath.exp(-1 / scale) * high**power) / 2
            inside = mpmath.quad(
                lambda x, p=power: (
                    mpmath.exp(-x / scale) / (2 * scale) * ((1 - rate) + rate * mpmath.exp((2 * x - 1) / scale)) ** p
                ),
                mpmath.linspace(0, 1, 101),
            )
            truth = max(truth, mpmath.log(atoms + inside) / (mpmath.mpf(order) - 1))
    ours = float(rdp(PoissonSampled(q, Laplace(b)), order))
    assert float(truth) <= ours <= float(truth) * (1 + 1e-8)


def test_high_laplace_moments_are_not_below_the_closed_form() -> None:
    # At rate 1, both integrals are elementary [Mironov 2017, Table II].
    for order in (10.0, 1e3, 1e5, 1e8):
        truth = (
            math.log(order / (2 * order - 1)) + (order - 1) + math.log1p((order - 1) / order * math.exp(1 - 2 * order))
        ) / (order - 1)
        assert truth <= float(rdp(Laplace(1.0), order)) <= truth * (1 + 1e-8)


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.001, 0.5), (0.2, 5.0)])
def test_integer_orders_equal_the_binomial_sum(q: float, sigma: float) -> None:
    for order in (2, 3, 8, 32):
        with mpmath.workdps(40):
            total = mpmath.fsum(
                mpmath.binomial(order, k)
                * (1 - mpmath.mpf(q)) ** (order - k)
                * mpmath.mpf(q) ** k
                * mpmath.exp(mpmath.mpf(k * k - k) / (2 * mpmath.mpf(sigma) ** 2))
                for k in range(order + 1)
            )
            truth = float(mpmath.log(total) / (order - 1))
        assert truth <= float(rdp(PoissonSampled(q, Gaussian(sigma)), order)) <= truth * (1 + 1e-8)


def test_rdp_has_the_shape_of_its_orders() -> None:
    assert rdp(Gaussian(1.0), [[2.0, 3.0], [4.0, 5.5]]).shape == (2, 2)
    assert float(rdp(Gaussian(1.0), 2)) == pytest.approx(1.0)
    assert np.all(rdp(Gaussian(0.0), [2.0]) == np.inf)
    for bad in (1.0, 0.5, math.inf, math.nan):
        with pytest.raises(ParameterError):
            rdp(Gaussian(1.0), bad)


def test_conversion_equals_proposition_12_minimised_on_a_fine_grid() -> None:
    step = PoissonSampled(0.02, Gaussian(0.9))
    orders = 1 + np.geomspace(1e-2, 1e3, 4000)
    curve = 2000 * rdp(step, orders)
    grid = curve + np.log1p(-1 / orders) - (math.log(1e-6) + np.log(orders)) / (orders - 1)
    ours = RDPAccountant().compose(step, 2000).epsilon(1e-6)
    assert grid.min() * (1 - 1e-5) <= ours <= grid.min() * (1 + 1e-9)


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(1000.0, 1, 1e-5), (0.05, 1, 1e-5), (300.0, 10, 1e-12)])
def test_the_best_order_is_found_far_from_the_usual_ones(sigma: float, steps: int, delta: float) -> None:
    orders = 1 + np.geomspace(1e-4, 1e8, 200_000)
    rho = steps / (2 * sigma**2)
    grid = rho * orders + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    ours = RDPAccountant().compose(Gaussian(sigma), steps).epsilon(delta)
    assert ours == pytest.approx(max(grid.min(), 0.0), rel=1e-6)


def test_delta_inverts_epsilon() -> None:
    accountant = RDPAccountant().compose(PoissonSampled(0.01, Gaussian(1.0)), 1000)
    assert accountant.delta(accountant.epsilon(1e-6)) == pytest.approx(1e-6, rel=1e-6)


def test_interval_claims_no_lower_bound() -> None:
    assert RDPAccountant().compose(Gaussian(1.0)).interval(1e-5).lower == 0.0
