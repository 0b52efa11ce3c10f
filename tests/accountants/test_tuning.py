"""Repeat-and-select against exact enumeration, dp_accounting and the published special cases; draws against the law."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import Gaussian, ParameterError, PoissonSampled
from accountants.rdp_accountant import rdp
from accountants.tuning import Repetitions

LAWS = [
    (5.0, 1.0),
    (20.0, 0.0),
    (1.5, 3.0),
    (40.0, -0.5),
    (300.0, 0.5),
    (7.0, 200.0),
    (10.0, math.inf),
    (0.5, math.inf),
]


def curve_of(event):  # type: ignore[no-untyped-def]
    return lambda orders: rdp(event, orders)


def published_probability(k: int, gamma: mpmath.mpf, eta: float) -> mpmath.mpf:
    """Definition of the truncated negative binomial, product by product; logarithmic at eta 0."""
    if eta == 0:
        return (1 - gamma) ** k / (k * mpmath.log(1 / gamma))
    product = mpmath.mpf(1)
    for ell in range(k):
        product *= (ell + mpmath.mpf(eta)) / (ell + 1)
    return (1 - gamma) ** k / (gamma ** (-mpmath.mpf(eta)) - 1) * product


@pytest.mark.parametrize(("mean", "shape"), [law for law in LAWS if law[1] < math.inf])
def test_probabilities_are_those_of_the_definition_and_have_the_mean(mean: float, shape: float) -> None:
    law = Repetitions(mean=mean, shape=shape)
    with mpmath.workdps(30):
        gamma = mpmath.exp(-mpmath.mpf(law._log_inverse_gamma))
        for k in (1, 2, 3, 10, 30):
            expected = float(published_probability(k, gamma, shape))
            assert math.exp(float(law.log_probability(k))) == pytest.approx(expected, rel=1e-10)
    assert float(law.log_probability(0)) == -math.inf
    k = np.arange(1, 400_000)
    mass = np.exp(law.log_probability(k))
    assert mass.sum() == pytest.approx(1, rel=1e-9)
    assert (k * mass).sum() == pytest.approx(mean, rel=1e-6)


def test_poisson_has_its_own_law() -> None:
    law = Repetitions(mean=3.0, shape=math.inf)
    assert law.gamma is None
    for k in range(6):
        assert float(law.log_probability(k)) == pytest.approx(math.log(math.exp(-3) * 3**k / math.factorial(k)))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LAWS),
    st.lists(st.floats(0.02, 1.0), min_size=2, max_size=4),
    st.lists(st.floats(-2.0, 2.0), min_size=4, max_size=4),
    st.floats(1.05, 30.0),
)
def test_never_below_the_exact_divergence_of_small_mechanisms(
    law: tuple[float, float], weights: list[float], tilt: list[float], order: float
) -> None:
    q = np.array(weights) / sum(weights)
    other = q * np.exp(tilt[: len(q)])
    other /= other.sum()
    search = Repetitions(mean=law[0], shape=law[1])
    k = np.arange(0, 20_000)
    chance = np.exp(search.log_probability(k))

    def best_of(run: np.ndarray) -> np.ndarray:
        """Law of the best result (the last in order), and of there being none."""
        up_to = np.array([np.sum(chance * c**k) for c in np.concatenate([[0.0], np.minimum(np.cumsum(run), 1.0)])])
        return np.concatenate([up_to[:1], np.diff(up_to)])

    def divergence(p: np.ndarray, r: np.ndarray, a: float) -> float:
        kept = p > 1e-12
        return float(np.log(np.sum(p[kept] ** a * r[kept] ** (1 - a))) / (a - 1))

    def curve(orders: np.ndarray) -> np.ndarray:
        return np.array([max(_divergence(q, other, a), _divergence(other, q, a)) for a in orders])

    exact = max(divergence(best_of(q), best_of(other), order), divergence(best_of(other), best_of(q), order))
    assert exact <= float(search.rdp(curve, order)) * (1 + 1e-6) + 1e-9


def _divergence(p: np.ndarray, r: np.ndarray, a: float) -> float:
    """Renyi divergence of order a, in logarithms, so that a may be huge."""
    exponents = a * np.log(p) + (1 - a) * np.log(r)
    top = exponents.max()
    return float((top + np.log(np.exp(exponents - top).sum())) / (a - 1))


@pytest.mark.parametrize(("mean", "shape"), [law for law in LAWS if law[1] < math.inf])
def test_equals_theorem_2_minimised_on_a_fine_grid(mean: float, shape: float) -> None:
    rho = 0.02  # R(a) = rho a: a Gaussian
    search = Repetitions(mean=mean, shape=shape)
    b = 1 + np.geomspace(1e-4, 1e6, 200_001)
    second = (1 + shape) * np.min((1 - 1 / b) * rho * b + search._log_inverse_gamma / b)
    orders = np.array([2.0, 5.0, 10.0, 40.0, 300.0])
    own = [np.min((rho * b + math.log(mean) / (b - 1))[b >= order * (1 - 1e-9)]) for order in orders]
    assert search.rdp(lambda a: rho * a, orders) == pytest.approx(np.array(own) + second, rel=1e-3)


@pytest.mark.parametrize(("mean", "shape"), [(10.0, 1.0), (30.0, 0.0), (5.0, 2.5), (100.0, 0.5), (10.0, math.inf)])
@pytest.mark.parametrize("sigma", [1.0, 4.0])
def test_close_to_dp_accounting_and_not_looser(mean: float, shape: float, sigma: float) -> None:
    pytest.importorskip("dp_accounting")
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    orders = 1 + np.geomspace(0.05, 500.0, 300)
    theirs = RdpAccountant(orders)
    one = dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(0.02, dp_event.GaussianDpEvent(sigma)), 200)
    theirs.compose(dp_event.RepeatAndSelectDpEvent(one, mean, shape))
    at = [100, 150, 200]
    ours = Repetitions(mean=mean, shape=shape).rdp(curve_of(200 * PoissonSampled(0.02, Gaussian(sigma))), orders[at])
    for own, peer in zip(ours, np.asarray(theirs._rdp)[at], strict=True):
        # Their fractional orders are loose, their second order comes from a grid; the Poisson law's e^-m is ours only.
        assert 0.75 * peer <= own <= peer * (1 + 1e-3)


def test_one_certain_repetition_is_the_run_itself() -> None:
    curve = curve_of(Gaussian(3.0))
    for shape in (1.0, 0.0, -0.5, 4.0):
        search = Repetitions(mean=1.0, shape=shape)
        assert search.gamma == 1.0
        assert search.rdp(curve, [2.0, 9.0]) == pytest.approx(curve([2.0, 9.0]), rel=1e-9)
        assert {search.draw() for _ in range(20)} == {1}


def test_pure_privacy_gives_the_published_multiple() -> None:
    # With loss at most e, the second term is at most (1 + eta) e: (2 + eta) e in all, as the order grows.
    e = 0.1
    for shape in (0.0, 1.0, 2.0):
        bound = Repetitions(mean=50.0, shape=shape).rdp(lambda orders: np.full(len(orders), e), [1e9])
        assert float(bound[0]) == pytest.approx((2 + shape) * e, rel=1e-6)


def test_no_noise_and_order_shapes() -> None:
    for shape in (0.0, 1.0, math.inf):
        assert np.all(np.isinf(Repetitions(mean=4.0, shape=shape).rdp(curve_of(Gaussian(0.0)), [2.0, 3.0])))
    assert Repetitions(mean=4.0, shape=1.0).rdp(curve_of(Gaussian(2.0)), [[2.0, 3.0]]).shape == (1, 2)
    with pytest.raises(ParameterError, match="orders"):
        Repetitions(mean=4.0, shape=1.0).rdp(curve_of(Gaussian(2.0)), [1.0])


@pytest.mark.parametrize("shape", [-0.9, 0.0, 1.0, math.inf])
def test_more_repetitions_cost_more(shape: float) -> None:
    curve = curve_of(200 * PoissonSampled(0.02, Gaussian(1.5)))
    costs = [float(Repetitions(mean=mean, shape=shape).rdp(curve, 6.0)) for mean in (2.0, 8.0, 60.0)]
    assert costs == sorted(costs)
    assert float(curve(np.array([6.0]))[0]) < costs[0] < costs[-1]


def too_far(draws: np.ndarray, mean: float, shape: float) -> bool:
    """Whether counts over eight classes are further from the law than chance would have it (chi-square, 1 in 1e6)."""
    law = Repetitions(mean=mean, shape=shape)
    mass = np.exp(law.log_probability(np.arange(0, 200_000)))
    edges = np.unique(np.searchsorted(np.cumsum(mass), [0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99]) + 1)
    expected = np.diff(np.concatenate([[0.0], np.cumsum(mass)[edges - 1], [1.0]])) * len(draws)
    seen = np.bincount(np.searchsorted(edges, draws, side="right"), minlength=len(expected))
    return float(np.sum((seen - expected) ** 2 / expected)) > 45.0


@pytest.mark.parametrize(("mean", "shape"), [(12.0, 1.0), (40.0, 0.0), (15.0, 5.0), (9.0, math.inf), (4.0, -0.3)])
def test_draws_follow_the_law_and_no_other(mean: float, shape: float) -> None:
    rng, law = np.random.default_rng(7), Repetitions(mean=mean, shape=shape)
    draws = np.array([law.draw(insecure_rng=rng) for _ in range(12_000 if shape > 0 else 60_000)])
    assert not too_far(draws, mean, shape)
    assert too_far(draws, mean * 0.9, shape)
    assert too_far(draws, mean * 1.1, shape)
    assert too_far(draws, mean, 2.0 if shape != 2 else 1.0)


def test_secure_draws_have_the_mean() -> None:
    law = Repetitions(mean=10.0, shape=2.0)
    draws = [law.draw() for _ in range(4000)]
    assert min(draws) >= 1
    assert np.mean(draws) == pytest.approx(10.0, abs=6 * np.std(draws) / math.sqrt(4000))


@pytest.mark.parametrize(
    ("mean", "shape"),
    [(0.5, 1.0), (math.inf, 1.0), (math.nan, 1.0), (5.0, -1.0), (5.0, math.nan), (0.0, math.inf), ("5", 1.0)],
)
def test_a_law_without_meaning_is_refused(mean: float, shape: float) -> None:
    with pytest.raises(ParameterError, match=r"mean|shape"):
        Repetitions(mean=mean, shape=shape)


def test_extreme_laws_are_solved() -> None:
    for mean, shape in [(1e6, 1e4), (1e6, -0.99), (1 + 1e-9, 1.0), (2.0, 1e6)]:
        law = Repetitions(mean=mean, shape=shape)
        assert math.isfinite(law._log_inverse_gamma)
        assert law.draw(insecure_rng=np.random.default_rng(0)) >= 1
