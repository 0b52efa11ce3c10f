"""The trade-off curve: closed form for Gaussians, below every real test elsewhere, and near the best of them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import fft, stats

from accountants import (
    Gaussian,
    GDPAccountant,
    Laplace,
    ParameterError,
    PoissonSampled,
    PRVAccountant,
    RDPAccountant,
    UnsupportedEventError,
    dpsgd,
    trade_off,
)
from accountants.components.component import Array

ALPHA = np.concatenate([[0.0, 1e-6], np.linspace(0.01, 0.99, 25), [1.0]])
FEW = np.array([1e-5, 1e-4, 1e-3, 1e-2])  # false positive rates


def lower_hull(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The convex curve below the given tests, by the monotone chain."""
    hull: list[tuple[float, float]] = []
    for point in sorted(zip(alpha.tolist(), beta.tolist(), strict=True)):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (point[1] - y0) - (y1 - y0) * (point[0] - x0) > 0:
                break
            hull.pop()
        hull.append(point)
    return np.array(hull).T[0], np.array(hull).T[1]


def sampled_gaussian_tests(q: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the threshold tests between N(0, s^2) and its mixture: optimal by Neyman-Pearson, in one direction."""
    x = np.linspace(-9 * sigma, 1 + 9 * sigma, 4001)
    return stats.norm.sf(x / sigma), 1 - (1 - q) * stats.norm.sf(x / sigma) - q * stats.norm.sf((x - 1) / sigma)


def composed_tests(q: float, sigma: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of likelihood-ratio tests after many steps, the losses rounded to a fine lattice; good to about 1e-4."""
    size, width = 2**17, 60.0
    edges = (np.arange(size + 1) - size // 2 - 0.5) * width / size
    with np.errstate(invalid="ignore", divide="ignore"):
        # loss = log(1 - q + q e^((2x - 1) / (2 s^2))), increasing in x
        x = sigma**2 * np.log((np.exp(edges) - 1 + q) / q) + 0.5
    x = np.where(np.isnan(x), -np.inf, x)
    absent = stats.norm.cdf(x / sigma)
    present = (1 - q) * absent + q * stats.norm.cdf((x - 1) / sigma)
    # The lattice is centred on index size // 2; a power of the transform of a centred law stays centred.
    centred = [fft.rfft(fft.ifftshift(np.diff(law))) ** steps for law in (absent, present)]
    masses = [fft.fftshift(fft.irfft(law, size)) for law in centred]
    return 1 - np.cumsum(masses[0]), np.cumsum(masses[1])


def both_directions(alpha: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([alpha, beta]), np.concatenate([beta, alpha])


def test_gaussian_trade_off_is_exact() -> None:
    truth = stats.norm.cdf(stats.norm.isf(ALPHA) - 1.25)
    ours = trade_off(Gaussian(0.8), ALPHA)
    assert np.all(ours <= truth + 1e-15)
    assert ours == pytest.approx(truth, abs=1e-12)


def test_the_envelope_of_a_gaussian_is_within_a_thousandth_of_its_curve() -> None:
    """A vanishing Laplace beside the Gaussian takes the closed form away and changes the truth by less than 1e-6."""
    truth = stats.norm.sf(stats.norm.isf(np.concatenate([FEW, ALPHA])) - 1.25)
    positives = 1 - trade_off(Gaussian(0.8) + Laplace(1e7), np.concatenate([FEW, ALPHA]))
    assert np.all(positives >= truth - 1e-9)
    assert np.max(positives - truth) < 1e-3
    assert np.all(positives[:4] < 1.05 * truth[:4])


@pytest.mark.parametrize(("q", "sigma"), [(0.3, 1.0), (0.01, 0.7), (0.9, 3.0), (1e-3, 0.4)])
def test_sampled_gaussian_bound_is_below_the_optimal_tests_and_near_them(q: float, sigma: float) -> None:
    event = PoissonSampled(q, Gaussian(sigma))
    alpha, beta = both_directions(*sampled_gaussian_tests(q, sigma))
    assert np.all(trade_off(event, alpha) <= beta + 1e-12)
    grid = np.linspace(0, 1, 501)
    truth = np.interp(grid, *lower_hull(alpha, beta))
    assert np.max(truth - trade_off(event, grid)) < 1e-3
    few = 1 - np.interp(FEW, *lower_hull(alpha, beta))
    assert 1 - trade_off(event, FEW) == pytest.approx(few, rel=0.03)


def test_a_tenth_less_noise_would_be_noticed() -> None:
    alpha, beta = both_directions(*sampled_gaussian_tests(0.3, 0.9))
    assert np.max(trade_off(PoissonSampled(0.3, Gaussian(1.0)), alpha) - beta) > 0.005


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.02, 1.0, 200), (0.1, 0.8, 30)])
def test_training_run_bound_is_within_a_thousandth_of_the_likelihood_ratio_tests(
    q: float, sigma: float, steps: int
) -> None:
    hull = lower_hull(*both_directions(*composed_tests(q, sigma, steps)))
    grid = np.linspace(0.001, 0.999, 400)
    gap = np.interp(grid, *hull) - trade_off(dpsgd(noise_multiplier=sigma, sample_rate=q, steps=steps), grid)
    assert np.min(gap) > -2e-4  # the oracle's own error
    assert np.max(gap) < 1.2e-3
    few = 1 - np.interp(FEW[1:], *hull)
    assert 1 - trade_off(dpsgd(noise_multiplier=sigma, sample_rate=q, steps=steps), FEW[1:]) == pytest.approx(
        few, rel=0.04
    )


def test_laplace_bound_is_within_a_thousandth_of_the_exact_curve() -> None:
    alpha, scale = np.linspace(0, 1, 101), np.e
    middle = 1 / (4 * scale * np.maximum(alpha, 1e-9))
    exact = np.where(alpha < 0.5 / scale, 1 - scale * alpha, np.where(alpha < 0.5, middle, (1 - alpha) / scale))
    bound = trade_off(Laplace(1.0), alpha)
    assert np.all(bound <= exact + 1e-12)
    assert np.max(exact - bound) < 1e-3


def test_the_bound_is_convex_falling_and_symmetric() -> None:
    spent = PRVAccountant().compose(PoissonSampled(0.2, Gaussian(0.9)), 5)
    alpha = np.linspace(0, 1, 401)
    beta = spent.trade_off(alpha)
    assert np.all(np.diff(beta) <= 1e-15)
    assert np.min(np.diff(beta, 2)) > -1e-12
    inner = (beta > 1e-6) & (alpha > 1e-6)
    assert spent.trade_off(beta[inner]) == pytest.approx(alpha[inner], abs=1e-9)


def test_few_points_of_the_privacy_curve_suffice_and_are_kept_until_the_next_step() -> None:
    asked: list[int] = []

    class Counting(RDPAccountant):
        def delta_curve(self, epsilons: ArrayLike) -> Array:
            asked.append(np.size(epsilons))
            return super().delta_curve(epsilons)

    spent = Counting().compose(dpsgd(noise_multiplier=1.0, sample_rate=0.01, steps=1000))
    before = spent.trade_off(0.1)
    assert sum(asked) < 70
    assert len(asked) < 8
    known = len(asked)
    spent.trade_off(ALPHA)
    assert len(asked) == known, "the curve was computed again"
    spent.compose(PoissonSampled(0.01, Gaussian(1.0)), count=100)
    assert spent.trade_off(0.1) < before, "the curve was kept although something was composed"


def test_a_weaker_accountant_bounds_less() -> None:
    event = dpsgd(noise_multiplier=1.0, sample_rate=0.02, steps=100)
    assert np.all(trade_off(event, ALPHA, accountant="rdp") <= trade_off(event, ALPHA) + 1e-3)
    assert np.all(RDPAccountant().compose(event).trade_off(ALPHA) == trade_off(event, ALPHA, accountant="rdp"))


def test_an_estimate_is_no_bound() -> None:
    with pytest.raises(UnsupportedEventError):
        GDPAccountant().compose(PoissonSampled(0.5, Gaussian(1.0))).trade_off(0.1)


def test_no_noise_gives_no_protection_and_nothing_gives_all() -> None:
    assert np.all(trade_off(Gaussian(0.0), ALPHA) == 0)
    assert trade_off(Gaussian(1.0) * 0, ALPHA) == pytest.approx(1 - ALPHA, abs=1e-12)
    assert trade_off(PoissonSampled(1e-9, Gaussian(5.0)), ALPHA) == pytest.approx(1 - ALPHA, abs=1e-8)


def test_epsilons_beyond_the_range_of_doubles_leave_a_bound_of_zero() -> None:
    assert np.all(trade_off(dpsgd(noise_multiplier=0.02, sample_rate=0.99, steps=4), [1e-3, 0.5]) < 1e-6)


def test_arguments_are_checked() -> None:
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ParameterError, match="alpha"):
            trade_off(Gaussian(1.0), bad)
    with pytest.raises(ParameterError, match="event"):
        trade_off([Gaussian(1.0)], 0.5)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="accountant"):
        trade_off(Gaussian(1.0), 0.5, accountant="clt")
