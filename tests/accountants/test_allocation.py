"""Balls into bins: the numerical law and the exact moments, against integrals in few bins and samples in many."""

from __future__ import annotations

import itertools
import math
import warnings

import mpmath
import numpy as np
import pytest
from scipy import special

from accountants import PRVAccountant, RDPAccountant
from accountants.components.allocation import Allocation
from accountants.components.allocation_law import ratio_law
from accountants.components.component import DIRECTIONS
from accountants.components.sampled_noise import SampledNoise
from accountants.engines import one_step
from accountants.events import BallsInBins, Gaussian, Group, PoissonSampled, Shuffled
from tests.accountants.hockey_stick import check_pair, delta, divergence, gaussian_mixture

EPSILONS = (0.0, 0.2, 0.5, 1.0, 2.0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bins", [2, 9])
def test_pairs_are_laws_and_lattices_enclose_them(bins: int, direction: str) -> None:
    one = Allocation(1.0, bins)
    for pair in (one.pair(direction), one.witness(direction)):  # type: ignore[arg-type]
        assert pair is not None
        check_pair(pair)


@pytest.mark.parametrize("scale", [0.6, 1.0, 3.0])
def test_two_bins_equal_the_plane_integral(scale: float) -> None:
    grid = np.linspace(-9 * scale, 9 * scale + 1, 1501)
    cell = (grid[1] - grid[0]) ** 2
    absent, present = (gaussian_mixture(grid, scale, [(m, 1.0)]) for m in (0.0, 1.0))
    q = np.outer(absent, absent)
    p = (np.outer(present, absent) + np.outer(absent, present)) / 2
    for epsilon in EPSILONS:
        for direction, (first, second) in zip(DIRECTIONS, ((p, q), (q, p)), strict=True):
            exact = divergence(first, second, epsilon, cell)
            one = Allocation(scale, 2)
            low, high = delta(one.witness(direction), epsilon), delta(one.pair(direction), epsilon)  # type: ignore[arg-type]
            assert low - 2e-6 <= exact <= high + 2e-6
            assert high - low <= 2e-3 * high + 1e-9


@pytest.mark.parametrize(("scale", "bins", "epsilon"), [(1.0, 10, 0.5), (0.7, 30, 1.0), (1.0, 100, 0.1)])
def test_samples_of_the_real_mechanism_agree_and_reject_other_noise(scale: float, bins: int, epsilon: float) -> None:
    """delta as the mean of (1 - e^(eps - loss))+ over epochs in which the example was there."""
    generator = np.random.default_rng(7)
    z = generator.normal(0.0, scale, (3_000_000 // bins, bins))
    z[np.arange(len(z)), generator.integers(0, bins, len(z))] += 1
    loss = np.log(np.mean(np.exp((2 * z - 1) / (2 * scale * scale)), axis=1))
    values = np.maximum(-np.expm1(epsilon - loss), 0.0)
    mean, error = float(values.mean()), 5 * float(values.std()) / math.sqrt(len(values))

    def bounds(noise: float) -> tuple[float, float]:
        one = Allocation(noise, bins)
        low, high = one.witness("remove"), one.pair("remove")
        assert low is not None
        return delta(low, epsilon), delta(high, epsilon)

    low, high = bounds(scale)
    assert low - error <= mean <= high + error
    assert bounds(0.9 * scale)[0] > mean + error
    assert bounds(1.1 * scale)[1] < mean - error


def test_samples_of_two_epochs_agree_with_the_composition() -> None:
    generator = np.random.default_rng(8)
    scale, bins, epsilon = 0.8, 12, 0.8
    z = generator.normal(0.0, scale, (2, 120_000, bins))
    for epoch in z:
        epoch[np.arange(len(epoch)), generator.integers(0, bins, len(epoch))] += 1
    loss = np.log(np.mean(np.exp((2 * z - 1) / (2 * scale * scale)), axis=2)).sum(axis=0)
    values = np.maximum(-np.expm1(epsilon - loss), 0.0)
    mean, error = float(values.mean()), 5 * float(values.std()) / math.sqrt(len(values))

    def upper(noise: float) -> float:
        return PRVAccountant().compose(BallsInBins(bins, Gaussian(noise)), 2).delta(epsilon)

    assert upper(1.1 * scale) < mean - error
    assert mean - error <= upper(scale) <= mean + error
    assert mean + error < upper(0.9 * scale)


@pytest.mark.parametrize(("scale", "bins"), [(0.2, 64), (1.0, 1000), (30.0, 77), (1000.0, 10_000)])
def test_laws_keep_both_masses_and_are_ordered(scale: float, bins: int) -> None:
    below, above = ratio_law(scale, bins, dominating=False), ratio_law(scale, bins, dominating=True)
    for law in (below, above):
        assert law.q.sum() == pytest.approx(1, abs=1e-14)
        assert law.ratio @ law.q + law.infinite == pytest.approx(1, abs=1e-14)
        assert law.infinite < 1e-21
    for level in np.exp(np.linspace(-2, 3, 21)):
        calls = [float(law.q @ np.maximum(law.ratio - level, 0.0)) + law.infinite for law in (below, above)]
        assert calls[0] <= calls[1] + 1e-14


def multinomial_moment(scale: float, bins: int, order: int) -> mpmath.mpf:
    """log E R^order by every way of choosing bins."""
    s = mpmath.mpf(scale)
    total = mpmath.mpf(0)
    for choice in itertools.product(range(bins), repeat=order):
        counts = [choice.count(i) for i in range(bins)]
        total += mpmath.exp(sum(k * (k - 1) for k in counts) / (2 * s * s))
    return mpmath.log(total / mpmath.mpf(bins) ** order)


@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
@pytest.mark.parametrize(("bins", "order"), [(2, 2), (2, 9), (3, 6), (5, 4)])
def test_integer_orders_equal_the_multinomial_sum(scale: float, bins: int, order: int) -> None:
    (value,) = Allocation(scale, bins).log_moments("remove", np.array([order - 1.0]))
    exact = float(multinomial_moment(scale, bins, order))
    assert exact <= value <= exact * (1 + 1e-9) + 2e-11


@pytest.mark.parametrize("scale", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("t", [1, 3, 14])
def test_inverse_moments_equal_the_plane_integral(scale: float, t: int) -> None:
    x = np.arange(-(14 + 2 * t / scale), 14.0, 0.04 * min(1.0, 2 * scale))
    log_weight = -x * x / 2
    log_weight -= special.logsumexp(log_weight)
    log_ratio = x / scale - 1 / (2 * scale * scale)
    log_mean = np.logaddexp.outer(log_ratio, log_ratio) - math.log(2)
    exact = float(special.logsumexp(np.add.outer(log_weight, log_weight) - t * log_mean))
    (value,) = Allocation(scale, 2).log_moments("add", np.array([float(t)]))
    assert exact - 1e-12 <= value <= exact * (1 + 1e-9) + 2e-11


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("scale", "bins"), [(1.0, 10), (0.5, 37), (5.0, 1000)])
def test_moments_of_the_enclosing_laws_enclose_the_exact_ones(scale: float, bins: int, direction: str) -> None:
    t = np.array([1.0, 2.0, 3.0])
    value = Allocation(scale, bins).log_moments(direction, t)  # type: ignore[arg-type]
    for dominating in (False, True):
        atoms = ratio_law(scale, bins, dominating=dominating).atoms(direction)  # type: ignore[arg-type]
        moments = np.array([np.logaddexp.reduce(np.log(atoms.p) + order * atoms.losses) for order in t])
        assert np.all(moments >= value - 1e-9) if dominating else np.all(moments <= value + 1e-9)
        assert moments == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fractional_and_large_orders_stay_between_known_bounds(direction: str) -> None:
    t = np.geomspace(1e-6, 1e7, 200)
    value = Allocation(1.0, 20).log_moments(direction, t)  # type: ignore[arg-type]
    whole = SampledNoise("gaussian", 1.0, 1.0).log_moments(direction, t)  # type: ignore[arg-type]
    assert np.all(value <= whole * (1 + 1e-9))
    assert np.all(np.diff(value / t) >= -1e-9 * (value / t)[1:])  # Renyi divergences grow with the order


def test_allocation_beats_a_shuffle_and_tracks_poisson_sampling() -> None:
    for bins, epochs in ((20, 1), (100, 10)):
        low, high = PRVAccountant().compose(BallsInBins(bins, Gaussian(1.0)), epochs).interval(1e-5)
        poisson = PRVAccountant().compose(PoissonSampled(1 / bins, Gaussian(1.0)), bins * epochs).epsilon(1e-5)
        shuffle = PRVAccountant().compose(Shuffled(bins, Gaussian(1.0)), epochs).epsilon(1e-5)
        assert 0 < high - low < 2e-3 * high
        assert 0.7 * poisson < high < 1.1 * poisson < shuffle
        assert RDPAccountant().compose(BallsInBins(bins, Gaussian(1.0)), epochs).epsilon(1e-5) >= low


def test_replacement_and_groups_are_one_release_of_all_members_at_once() -> None:
    for relation, group, shift in (("replace_one", 1, 2), ("add_or_remove", 3, 3), ("replace_one", 2, 4)):
        event = Group(BallsInBins(10, Gaussian(3.0)), group)
        low, high = PRVAccountant(relation=relation).compose(event).interval(1e-5)
        assert high == pytest.approx(PRVAccountant().compose(Gaussian(3.0 / shift)).epsilon(1e-5), rel=1e-9)
        assert 0 < low < high


def test_one_bin_is_the_plain_release() -> None:
    assert PRVAccountant().compose(BallsInBins(1, Gaussian(1.0))).interval(1e-5) == PRVAccountant().compose(
        Gaussian(1.0)
    ).interval(1e-5)


@pytest.mark.parametrize("scale", [1e-3, 0.06, 1e3])
@pytest.mark.parametrize("bins", [2, 100, 10**5])
def test_extremes_answer_without_warnings(scale: float, bins: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = one_step.epsilon_bounds(Allocation(scale, bins), 1e-9)
        loose = RDPAccountant().compose(BallsInBins(bins, Gaussian(scale)), 3).epsilon(1e-9)
    assert 0 <= low <= high < math.inf
    assert loose >= low
