"""Comparison of two plans, against curves in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from accountants import Gaussian, Laplace, ParameterError, PoissonSampled, dpsgd
from accountants.meaning.attacks import tpr_at_fpr
from accountants.meaning.comparison import compare


def gaussian(sigma: float, epsilon: np.ndarray | float) -> np.ndarray:
    mu = 1 / sigma
    return stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


def laplace(scale: float, epsilon: np.ndarray | float) -> np.ndarray:
    return np.maximum(0, -np.expm1((np.asarray(epsilon) - 1 / scale) / 2))


def sampled(q: float, sigma: float, epsilon: np.ndarray) -> np.ndarray:
    """One sampled step, the larger of both directions."""
    x = np.exp(epsilon)
    # Removing: P / Q > x where e^((2y - 1) / (2 s^2)) > (x - 1 + q) / q.
    cut = sigma**2 * np.log((x - 1 + q) / q) + 0.5
    remove = q * stats.norm.sf((cut - 1) / sigma) + (1 - q - x) * stats.norm.sf(cut / sigma)
    # Adding: Q / P > x where e^(...) < (1 / x - 1 + q) / q, if that is positive.
    low = sigma**2 * np.log(np.maximum(1 / x - 1 + q, 1e-300) / q) + 0.5
    add = (1 - x * (1 - q)) * stats.norm.cdf(low / sigma) - x * q * stats.norm.cdf((low - 1) / sigma)
    return np.maximum(remove, add)


GRID = np.sort(np.append(np.linspace(0, 12, 20_001), 1 / 0.9))  # with the Laplace curve's kink


def true_excess(new: np.ndarray, old: np.ndarray) -> float:
    return float(np.max(np.maximum(new - old, 0) / (1 + np.exp(GRID))))


def test_more_noise_spends_less_everywhere() -> None:
    result = compare(Gaussian(1.0), Gaussian(2.0))
    assert result.verdict == "b"
    assert result.crossings == result.undecided == ()
    assert result.b.excess_risk.upper < 1e-9
    assert compare(Gaussian(2.0), Gaussian(1.0)).verdict == "a"


def test_a_crossing_is_bracketed() -> None:
    result = compare(Gaussian(1.0), Laplace(0.35))
    assert result.verdict == "cross"
    ((low, high),) = result.crossings
    truth = optimize.brentq(lambda e: gaussian(1.0, e) - laplace(0.35, e), 2.0, 2.856)
    assert low <= truth <= high
    assert high - low < 0.01


@pytest.mark.parametrize(
    ("a", "b", "curves"),
    [
        (Gaussian(1.0), Laplace(0.9), (gaussian(1.0, GRID), laplace(0.9, GRID))),
        (Gaussian(0.7), Gaussian(0.75), (gaussian(0.7, GRID), gaussian(0.75, GRID))),
        (
            PoissonSampled(0.3, Gaussian(1.0)),
            PoissonSampled(0.1, Gaussian(0.7)),
            (sampled(0.3, 1.0, GRID), sampled(0.1, 0.7, GRID)),
        ),
    ],
    ids=["gaussian and laplace", "two gaussians", "two sampled steps"],
)
def test_excess_risk_encloses_the_true_divergence(a, b, curves) -> None:  # type: ignore[no-untyped-def]
    result = compare(a, b)
    for plan, new, old in ((result.a, *curves), (result.b, *curves[::-1])):
        truth = true_excess(new, old)
        assert plan.excess_risk.lower <= truth + 1e-9
        assert plan.excess_risk.upper >= truth - 1e-9
        assert plan.excess_risk.upper - plan.excess_risk.lower < 1.1e-3


def test_the_sides_hold_the_library_s_own_numbers() -> None:
    a, b = dpsgd(noise_multiplier=1.0, sample_rate=0.02, steps=200), Gaussian(2.0)
    result = compare(a, b, deltas=[1e-4], false_positive_rates=[1e-2, 0.5])
    assert result.b.epsilons[0].lower <= result.b.epsilons[0].upper
    assert gaussian(2.0, result.b.epsilons[0].upper) == pytest.approx(1e-4, rel=1e-9)
    assert result.b.advantage.upper == pytest.approx(gaussian(2.0, 0.0), abs=1e-10)
    assert list(result.a.true_positive_rates) == tpr_at_fpr(a, [1e-2, 0.5]).tolist()
    assert result.deltas == (1e-4,)


def test_a_plan_is_not_told_from_itself() -> None:
    event = dpsgd(noise_multiplier=1.0, sample_rate=0.1, steps=100)
    result = compare(event, event)
    assert result.verdict == "undecided"
    assert result.a.excess_risk.lower == 0
    assert result.a.excess_risk.upper < 2e-3


def test_an_accountant_without_lower_bounds_decides_nothing() -> None:
    result = compare(Gaussian(1.0) + Laplace(9.0), Gaussian(9.0) + Laplace(9.0), accountant="rdp")
    assert result.verdict == "undecided"
    assert len(result.undecided) > 10


def test_no_noise_is_unbounded_not_an_error() -> None:
    result = compare(Gaussian(0.0), Gaussian(1.0))
    assert result.a.epsilons[0].upper == math.inf
    assert result.a.advantage.upper == 1
    assert result.a.true_positive_rates[0] == 1
    assert result.a.excess_risk.upper >= (1 - gaussian(1.0, 0.0)) / 2 - 1e-9


def test_arguments_are_checked() -> None:
    with pytest.raises(ParameterError, match="event"):
        compare(Gaussian(1.0), 3)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="delta"):
        compare(Gaussian(1.0), Gaussian(2.0), deltas=[0.0])
    with pytest.raises(ParameterError, match="fpr"):
        compare(Gaussian(1.0), Gaussian(2.0), false_positive_rates=[2.0])
