"""The trade-off curve: closed form for Gaussians, below every real test elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from accountants import Gaussian, Laplace, ParameterError, PoissonSampled, trade_off

ALPHA = np.concatenate([[0.0, 1e-6], np.linspace(0.01, 0.99, 25), [1.0]])


def test_gaussian_trade_off_is_exact() -> None:
    truth = stats.norm.cdf(stats.norm.isf(ALPHA) - 1.25)
    ours = trade_off(Gaussian(0.8), ALPHA)
    assert np.all(ours <= truth + 1e-15)
    assert ours == pytest.approx(truth, abs=1e-12)


def test_sampled_gaussian_bound_is_below_the_optimal_tests_and_near_them() -> None:
    """Threshold tests on one sampled step are optimal; no bound may exceed their errors, in either direction."""
    q, sigma = 0.3, 1.0
    x = np.linspace(-9, 10, 4001)
    absent, mixture = stats.norm.sf(x), (1 - q) * stats.norm.sf(x) + q * stats.norm.sf(x - 1)
    bound = trade_off(PoissonSampled(q, Gaussian(sigma)), absent)
    assert np.all(bound <= 1 - mixture + 1e-12)
    reverse = trade_off(PoissonSampled(q, Gaussian(sigma)), 1 - mixture)
    assert np.all(reverse <= absent + 1e-12)
    middle = (absent > 0.01) & (absent < 0.9)
    assert np.max((1 - mixture - bound)[middle]) < 0.06


def test_laplace_bound_is_below_the_pure_privacy_lines() -> None:
    alpha = np.linspace(0, 1, 11)
    bound = trade_off(Laplace(1.0), alpha)
    # Laplace noise at alpha below e^-1 / 2 has the exact trade-off 1 - e alpha.
    assert bound[1] == pytest.approx(1 - np.e * 0.1, abs=0.01)
    assert np.all(np.diff(bound) <= 1e-15)


def test_no_noise_gives_no_protection_and_nothing_gives_all() -> None:
    assert np.all(trade_off(Gaussian(0.0), ALPHA) == 0)
    assert trade_off(Gaussian(1.0) * 0, ALPHA) == pytest.approx(1 - ALPHA, abs=1e-12)


def test_alpha_is_checked() -> None:
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ParameterError, match="alpha"):
            trade_off(Gaussian(1.0), bad)
