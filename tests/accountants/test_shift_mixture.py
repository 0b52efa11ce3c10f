"""Mixtures of shifted noise: divergences, masses and moments against mpmath, and the real mechanism by simulation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import mpmath
import numpy as np
import pytest

from accountants.components.component import DIRECTIONS, Direction
from accountants.components.noise_laws import Noise, skellam_log_pmf, skellam_log_ratio
from accountants.components.sampled_noise import SampledNoise
from accountants.components.shift_mixture import ShiftMixture
from accountants.engines import one_step
from accountants.engines.lattice import dominated, dominating
from accountants.prv_accountant import PRVAccountant
from accountants.reduction.normal_form import NormalForm
from tests.accountants.test_lattice import curve, truth

NOTHING = ((0.0, 1.0),)
NOISES: tuple[Noise, ...] = ("gaussian", "laplace", "discrete_gaussian", "skellam")


def drawn(size: int, rate: float, unit: float = 1.0) -> tuple[tuple[float, float], ...]:
    return tuple((j * unit, math.comb(size, j) * rate**j * (1 - rate) ** (size - j)) for j in range(size + 1))


def group(noise: Noise, scale: float, size: int, rate: float, unit: float = 1.0) -> ShiftMixture:
    return ShiftMixture(noise, scale, drawn(size, rate, unit), NOTHING)


def replaced(noise: Noise, scale: float, size: int, rate: float, unit: float = 1.0) -> ShiftMixture:
    return ShiftMixture(noise, scale, drawn(size, rate, unit), drawn(size, rate, -unit))


COMPONENTS = [
    group("gaussian", 1.0, 3, 0.1),
    replaced("gaussian", 0.8, 1, 0.3),
    replaced("gaussian", 4.0, 2, 0.6),
    group("laplace", 0.9, 2, 0.2),
    replaced("laplace", 2.0, 1, 0.4),
    group("discrete_gaussian", 1.5, 1, 0.2),
    replaced("discrete_gaussian", 9.0, 2, 0.3, 3.0),
    ShiftMixture("discrete_gaussian", 0.7, ((1.0, 1.0),), NOTHING),
    group("skellam", 2.0, 2, 0.2),
    replaced("skellam", 30.0, 1, 0.5, 2.0),
    ShiftMixture("skellam", 3.0, ((2.0, 1.0),), NOTHING),
]
DISCRETE = [component for component in COMPONENTS if component.noise in ("discrete_gaussian", "skellam")]


class Oracle:
    """One component by mpmath: densities or masses at an outcome, and sums over outcomes."""

    def __init__(self, component: ShiftMixture, direction: Direction) -> None:
        self.noise, self.scale = component.noise, mpmath.mpf(component.scale)
        laws = [[(mpmath.mpf(m), mpmath.mpf(w)) for m, w in law] for law in (component.present, component.absent)]
        self.p_law, self.q_law = laws if direction == "remove" else laws[::-1]
        shifts = [m for m, _ in component.present + component.absent]
        self.low, self.high = min(shifts), max(shifts)
        self.total = mpmath.mpf(1)
        if self.noise == "discrete_gaussian":
            self.total = mpmath.nsum(lambda k: mpmath.exp(-(k**2) / (2 * self.scale**2)), [-mpmath.inf, mpmath.inf])

    def density(self, x: mpmath.mpf) -> mpmath.mpf:
        match self.noise:
            case "gaussian":
                return mpmath.npdf(x, 0, self.scale)
            case "laplace":
                return mpmath.exp(-abs(x) / self.scale) / (2 * self.scale)
            case "discrete_gaussian":
                return mpmath.exp(-(x**2) / (2 * self.scale**2)) / self.total
            case _:
                return mpmath.besseli(abs(int(x)), self.scale) * mpmath.exp(-self.scale)

    def p(self, x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.fsum(w * self.density(x - m) for m, w in self.p_law)

    def q(self, x: mpmath.mpf) -> mpmath.mpf:
        return mpmath.fsum(w * self.density(x - m) for m, w in self.q_law)

    def expectation(self, f: Callable[[mpmath.mpf], mpmath.mpf], reach: float) -> mpmath.mpf:
        """Integral or sum of f over outcomes up to `reach` scales beyond the shifts; all families are that short."""
        if self.noise == "gaussian" or self.noise == "laplace":
            inner = {0.0, *(float(m) for m, _ in self.p_law + self.q_law)}
            far = reach * float(self.scale)
            beyond = np.linspace(1, far, 9)
            edges = sorted({*(self.low - beyond), *inner, *np.linspace(self.low, self.high, 9), *(self.high + beyond)})
            return mpmath.quad(f, [mpmath.mpf(edge) for edge in edges], method="gauss-legendre", maxdegree=4)
        deviation = float(self.scale) if self.noise == "discrete_gaussian" else math.sqrt(float(self.scale))
        far = math.ceil(reach * deviation) + 40
        return mpmath.fsum(f(mpmath.mpf(x)) for x in range(int(self.low) - far, int(self.high) + far + 1))

    def delta(self, epsilon: float) -> mpmath.mpf:
        tilt = mpmath.exp(epsilon)
        if self.noise in ("discrete_gaussian", "skellam"):
            return self.expectation(lambda x: max(self.p(x) - tilt * self.q(x), mpmath.mpf(0)), 12)
        # The excess changes sign once: split there, so that quadrature sees smooth functions.
        left, right = mpmath.mpf(self.low) - 60 * self.scale, mpmath.mpf(self.high) + 60 * self.scale
        sign = 1 if self.p(right) > tilt * self.q(right) else -1
        if sign < 0 and self.p(left) <= tilt * self.q(left):
            return mpmath.mpf(0)
        for _ in range(200):
            middle = (left + right) / 2
            if (self.p(middle) > tilt * self.q(middle)) == (sign > 0):
                right = middle
            else:
                left = middle
        start, stop = (right, mpmath.mpf(self.high) + 80 * self.scale)
        if sign < 0:
            start, stop = mpmath.mpf(self.low) - 80 * self.scale, left
        kinks = [mpmath.mpf(m) for m, _ in self.p_law + self.q_law]
        panels = [*kinks, *np.linspace(float(start), float(stop), 25)]
        inner = sorted({start, stop, *(edge for edge in panels if start < edge < stop)})
        return mpmath.quad(lambda x: self.p(x) - tilt * self.q(x), inner, method="gauss-legendre", maxdegree=4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("component", COMPONENTS, ids=str)
def test_divergence_equals_mpmath(component: ShiftMixture, direction: Direction) -> None:
    oracle = Oracle(component, direction)
    pair = component.pair(direction)
    with mpmath.workdps(25):
        for epsilon in (-0.4, 0.3, 1.1):
            assert truth(pair, epsilon) == pytest.approx(float(oracle.delta(epsilon)), rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("component", COMPONENTS, ids=str)
def test_one_step_interval_holds_the_divergence(component: ShiftMixture) -> None:
    with mpmath.workdps(25):
        exact = max(Oracle(component, direction).delta(0.2) for direction in DIRECTIONS)
        low, high = one_step.delta_bounds(component, 0.2)
        assert low <= exact <= high
        assert high - low <= 1e-12


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("component", COMPONENTS, ids=str)
@pytest.mark.parametrize("cells", [7, 60, 900])
def test_lattice_laws_enclose_the_hockey_stick(component: ShiftMixture, direction: Direction, cells: int) -> None:
    pair = component.pair(direction)
    low, high = pair.tails(1e-12)
    spacing = (high - low) / cells
    above = dominating(pair, spacing, (-60.0, 60.0), 1e-12)
    below = dominated(pair, spacing, (-60.0, 60.0), 1e-12)
    for epsilon in np.linspace(max(low, -3.0), min(high, 9.0), 41):
        value = truth(pair, float(epsilon))
        assert curve(below, float(epsilon)) <= value + 1e-14
        assert curve(above, float(epsilon)) >= value - 1e-14
    if cells == 900:
        assert curve(above, 0.0) - curve(below, 0.0) <= 0.04 * truth(pair, 0.0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("component", COMPONENTS, ids=str)
def test_moments_are_upper_bounds_tight_to_1e_9(component: ShiftMixture, direction: Direction) -> None:
    oracle = Oracle(component, direction)
    t = [0.05, 3.5]
    bounds = component.log_moments(direction, np.array(t))
    with mpmath.workdps(25):
        for moment, bound in zip(t, bounds, strict=True):

            def term(x: mpmath.mpf, moment: float = moment) -> mpmath.mpf:
                return oracle.p(x) ** (1 + moment) * oracle.q(x) ** -moment

            reach = 40 if component.noise == "laplace" else 12 + 10 * (1 + 2 * moment) / float(component.scale)
            exact = float(mpmath.log(oracle.expectation(term, reach)))
            assert exact <= bound <= exact * (1 + 1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
@pytest.mark.parametrize(("scale", "rate"), [(0.5, 0.3), (1.0, 0.01), (20.0, 0.1)])
def test_one_example_added_is_sampled_noise(noise: Noise, scale: float, rate: float, direction: Direction) -> None:
    mixture, known = group(noise, scale, 1, rate), SampledNoise(noise, scale, rate)  # type: ignore[arg-type]
    low, high = known.pair(direction).tails(1e-10)
    inner = np.linspace(low, high, 1000)[1:-1]  # off the ends, which the two may round differently
    levels = np.concatenate([[-np.inf], inner, [np.inf]])
    for ours, theirs in zip(mixture.pair(direction).cells(levels), known.pair(direction).cells(levels), strict=True):
        assert np.allclose(np.cumsum(ours), np.cumsum(theirs), rtol=0, atol=1e-14)
    t = np.array([1e-3, 0.5, 3.0, 8.0])
    assert mixture.log_moments(direction, t) == pytest.approx(known.log_moments(direction, t), rel=3e-9)


def test_moments_of_a_tiny_rate_keep_their_precision() -> None:
    """With remainders of third order dropped, the moment is t (1 + t) / 2 times rate^2 times chi squared."""
    rate = 1e-7
    chi_squared = math.expm1(1.0)
    for component in (group("gaussian", 1.0, 1, rate), ShiftMixture("gaussian", 1.0, NOTHING, drawn(1, rate, -1.0))):
        for direction in DIRECTIONS:
            moment = component.log_moments(direction, np.array([1.0]))[0]
            assert moment == pytest.approx(rate**2 * chi_squared, rel=1e-6)


@pytest.mark.parametrize("noise", NOISES)
def test_far_moments_are_bounded_and_increase(noise: Noise) -> None:
    t = np.geomspace(1e-7, 1e8, 40)
    for direction in DIRECTIONS:
        moments = group(noise, 2.0, 2, 0.05).log_moments(direction, t)
        divergences = moments / t
        assert np.all(divergences[1:] >= divergences[:-1] * (1 - 2e-5))


@pytest.mark.parametrize("variance", [1e-3, 1.0, 50.0, 1e4])
def test_skellam_masses_and_ratios_equal_mpmath(variance: float) -> None:
    orders = sorted({0, 1, 3, 17, int(math.sqrt(variance)), int(8 * math.sqrt(variance)) + 20})
    log_pmf = skellam_log_pmf(variance, np.array(orders, dtype=float))
    ratios = skellam_log_ratio(variance, 3.0, np.array(orders, dtype=float))
    with mpmath.workdps(40):

        def exact(k: int) -> mpmath.mpf:
            return mpmath.log(mpmath.besseli(abs(k), variance, maxterms=10**6)) - variance

        for k, mass, ratio in zip(orders, log_pmf, ratios, strict=True):
            assert mass == pytest.approx(float(exact(k)), rel=1e-14, abs=2e-14)
            assert ratio == pytest.approx(float(exact(k - 3) - exact(k)), rel=2e-14, abs=2e-15)


@pytest.mark.parametrize("component", DISCRETE[:4], ids=str)
def test_three_steps_equal_their_enumeration(component: ShiftMixture) -> None:
    """Every outcome of three steps, as products of masses, against the certified interval."""
    exact = 0.0
    epsilon = 0.8
    for direction in DIRECTIONS:
        oracle = Oracle(component, direction)
        x = range(int(oracle.low) - 60, int(oracle.high) + 61)
        with mpmath.workdps(20):
            p = np.array([float(oracle.p(mpmath.mpf(k))) for k in x])
            q = np.array([float(oracle.q(mpmath.mpf(k))) for k in x])
        kept = (p > 1e-13) | (q > 1e-13)
        p, q = p[kept], q[kept]
        twice_p, twice_q = np.multiply.outer(p, p).ravel(), np.multiply.outer(q, q).ravel()
        tilted = math.exp(epsilon) * q
        excess = sum(np.maximum(a * twice_p - b * twice_q, 0).sum() for a, b in zip(p, tilted, strict=True))
        exact = max(exact, float(excess))
    interval = PRVAccountant()._delta_interval(NormalForm(((component, 3),)), epsilon)
    assert interval.lower * (1 - 1e-9) - 1e-11 <= exact <= interval.upper * (1 + 1e-9) + 1e-11
    assert interval.upper - interval.lower <= 5e-3 * interval.upper


def simulated(vectors: np.ndarray, scale: float, rate: float, runs: int, seed: int) -> np.ndarray:
    """Gaussian noise on a Poisson-sampled sum of vectors; shape [runs, 2]."""
    rng = np.random.default_rng(seed)
    included = rng.random((runs, len(vectors))) < rate
    return included @ vectors + scale * rng.standard_normal((runs, vectors.shape[1]))


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.5])
def test_two_examples_removed_are_no_easier_to_see_than_claimed(angle: float) -> None:
    """The sampler, the sum and the noise in two dimensions; a 10 % smaller noise shows where the vectors agree."""
    rate, scale, epsilon, runs = 0.5, 1.2, 0.5, 400_000
    pair_of_examples = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    component = group("gaussian", scale, 2, rate)
    claimed = truth(component.pair("remove"), epsilon)
    direction = pair_of_examples.sum(axis=0) / np.linalg.norm(pair_of_examples.sum(axis=0))
    # The attack that is best against collinear examples: outcomes beyond where the loss reaches epsilon.
    x = np.linspace(-5, 8, 20001)
    density = sum(w * np.exp(-((x - m) ** 2) / (2 * scale**2)) for m, w in component.present)
    threshold = x[np.argmax(density > math.exp(epsilon) * np.exp(-(x**2) / (2 * scale**2)))]

    def attacked(noise_scale: float) -> float:
        present = simulated(pair_of_examples, noise_scale, rate, runs, 1) @ direction > threshold
        absent = simulated(np.zeros((1, 2)), noise_scale, rate, runs, 2) @ direction > threshold
        return float(present.mean() - math.exp(epsilon) * absent.mean())

    error = 4 * (1 + math.exp(epsilon)) * 0.5 / math.sqrt(runs)
    assert attacked(scale) <= claimed + error
    if angle == 0:
        assert attacked(scale) >= claimed - error
        assert attacked(0.9 * scale) > claimed + error


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("scale", [1e-3, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("rate", [1e-7, 0.3, 1.0])
def test_extreme_parameters_warn_of_nothing_and_keep_all_mass(noise: Noise, scale: float, rate: float) -> None:
    laws = [drawn(3, rate), drawn(3, rate, -1.0)] if rate < 1 else [((3.0, 1.0),), ((-3.0, 1.0),)]
    component = ShiftMixture(noise, scale, *laws)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for direction in DIRECTIONS:
            pair = component.pair(direction)
            low, high = pair.tails(1e-13)
            levels = np.concatenate([[-np.inf], np.linspace(low - 1e-9, high + 1e-9, 300), [np.inf]])
            for masses in pair.cells(levels):
                assert np.all(masses >= 0)
                assert masses.sum() == pytest.approx(1.0, abs=1e-12)
            assert np.all(component.log_moments(direction, np.geomspace(1e-6, 1e7, 20)) >= 0)
            assert 0 <= one_step.delta_bounds(component, 1e6)[1] <= 1
