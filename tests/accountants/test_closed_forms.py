"""Un-sampled Gaussians and single steps against their formulas in 40 digits."""

from __future__ import annotations

import math

import mpmath
import pytest

from accountants import Gaussian, GDPAccountant, Laplace, PoissonSampled, PRVAccountant


def analytic_gaussian_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """Balle and Wang 2018, Theorem 8."""
    m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
    return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


@pytest.mark.parametrize("name", [PRVAccountant, GDPAccountant])
@pytest.mark.parametrize(
    ("sigma", "steps", "delta"),
    [(1.0, 1, 1e-5), (5.0, 10_000, 1e-12), (30.0, 1, 1e-3), (0.05, 1, 1e-15), (1000.0, 10, 1e-9), (0.5, 400, 1e-8)],
)
def test_gaussian_epsilon_encloses_the_analytic_formula(name, sigma: float, steps: int, delta: float) -> None:  # type: ignore[no-untyped-def]
    low, high = name().compose(Gaussian(sigma), steps).interval(delta)
    with mpmath.workdps(60 + int(0.5 * high)):
        mu = mpmath.sqrt(steps) / mpmath.mpf(sigma)
        assert analytic_gaussian_delta(mu, high) <= delta
        assert analytic_gaussian_delta(mu, low) >= delta or low == 0
    assert high - low <= 1e-8 * high


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 0.0), (1.0, 4.0), (20.0, 0.1), (0.2, 30.0), (1.0, 30.0)])
def test_gaussian_delta_encloses_the_analytic_formula(sigma: float, epsilon: float) -> None:
    low, high = GDPAccountant().compose(Gaussian(sigma)).delta_interval(epsilon)
    with mpmath.workdps(60):
        truth = analytic_gaussian_delta(1 / mpmath.mpf(sigma), epsilon)
    assert low <= truth <= high
    assert high <= float(truth) * (1 + 1e-7)


def test_rate_one_is_no_sampling() -> None:
    assert PRVAccountant().compose(PoissonSampled(1.0, Gaussian(2.0)), 7).interval(1e-6) == (
        PRVAccountant().compose(Gaussian(2.0), 7).interval(1e-6)
    )


def test_gaussians_of_different_noise_add_their_inverse_squares() -> None:
    mixed = GDPAccountant().compose(Gaussian(3.0)).compose(Gaussian(4.0))
    assert mixed.mu == pytest.approx(5 / 12, rel=1e-12)


def one_step_gaussian_delta(q: float, sigma: float, epsilon: float) -> mpmath.mpf:
    """Integral of (p - e^eps q)+, both ways round, from the point where the densities cross."""
    rate, s, e = mpmath.mpf(q), mpmath.mpf(sigma), mpmath.mpf(epsilon)

    def crossing(level: mpmath.mpf) -> mpmath.mpf:  # where the mixture is `level` times N(0, s^2)
        return s * s * mpmath.log((level - (1 - rate)) / rate) + mpmath.mpf(1) / 2

    x = crossing(mpmath.exp(e))
    above = 1 - mpmath.ncdf(x / s), 1 - mpmath.ncdf((x - 1) / s)
    remove = (1 - rate) * above[0] + rate * above[1] - mpmath.exp(e) * above[0]
    add = mpmath.mpf(0)
    if mpmath.exp(-e) > 1 - rate:
        x = crossing(mpmath.exp(-e))
        below = mpmath.ncdf(x / s), mpmath.ncdf((x - 1) / s)
        add = below[0] - mpmath.exp(e) * ((1 - rate) * below[0] + rate * below[1])
    return max(remove, add)


@pytest.mark.parametrize(
    ("q", "sigma", "delta"),
    [(0.1, 1.0, 1e-12), (1e-5, 0.5, 1e-6), (0.9, 2.0, 1e-3), (0.5, 0.3, 1e-9), (1e-7, 1.0, 1e-9)],
)
def test_one_sampled_step_encloses_the_integral(q: float, sigma: float, delta: float) -> None:
    low, high = PRVAccountant().compose(PoissonSampled(q, Gaussian(sigma))).interval(delta)
    with mpmath.workdps(60):
        assert one_step_gaussian_delta(q, sigma, high) <= delta
        assert one_step_gaussian_delta(q, sigma, low) >= delta or low == 0
    assert high - low <= 1e-6 * high


def test_one_laplace_release_has_its_known_epsilon() -> None:
    for b, delta in ((1.0, 1e-5), (0.3, 1e-3), (20.0, 1e-6)):
        truth = 1 / b + 2 * math.log1p(-delta)
        low, high = PRVAccountant().compose(Laplace(b)).interval(delta)
        assert low <= truth <= high <= low + 1e-9


def test_two_sampled_steps_enclose_the_double_integral() -> None:
    """delta of a twofold composition as an expectation of the one-step curve: an oracle with no lattice in it."""
    q, sigma, epsilon = mpmath.mpf("0.2"), mpmath.mpf("0.8"), mpmath.mpf("1.5")

    def curve(level: mpmath.mpf) -> mpmath.mpf:  # sum of (mixture - e^level N)+
        if mpmath.exp(level) <= 1 - q:
            return 1 - mpmath.exp(level)
        x = sigma**2 * mpmath.log((mpmath.exp(level) - (1 - q)) / q) + mpmath.mpf(1) / 2
        a, b = 1 - mpmath.ncdf(x / sigma), 1 - mpmath.ncdf((x - 1) / sigma)
        return (1 - q) * a + q * b - mpmath.exp(level) * a

    def integrand(x: mpmath.mpf) -> mpmath.mpf:
        ratio = 1 - q + q * mpmath.exp((2 * x - 1) / (2 * sigma**2))
        return mpmath.npdf(x, 0, sigma) * ratio * curve(epsilon - mpmath.log(ratio))

    truth = mpmath.quad(integrand, [mpmath.mpf(k) / 2 for k in range(-20, 24)])
    low, high = PRVAccountant().compose(PoissonSampled(0.2, Gaussian(0.8)), 2).delta_interval(1.5)
    assert low <= truth <= high <= low * 1.01
