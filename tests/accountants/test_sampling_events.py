"""Batches that are not plain Poisson samples: claims held against small data sets enumerated in full."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import mpmath
import numpy as np
import pytest

from accountants import PRVAccountant, RDPAccountant
from accountants.components.component import DIRECTIONS, Component
from accountants.components.labelled import Labelled
from accountants.components.sampled_noise import SampledNoise
from accountants.components.shift_mixture import ShiftMixture
from accountants.components.subset_sampled import SubsetSampled
from accountants.engines import one_step
from accountants.events import (
    DiscreteGaussian,
    Event,
    Gaussian,
    Laplace,
    PoissonSampled,
    SampledWithoutReplacement,
    Shuffled,
    TruncatedPoissonSampled,
)
from accountants.reduction.normal_form import normal_form
from accountants.relation import NeighboringRelation
from tests.accountants.hockey_stick import check_pair, divergence, gaussian_mixture, laplace_mixture

EPSILONS = (0.0, 0.1, 0.3, 0.7, 1.2, 2.0)
Centres = list[tuple[float, float]]


def component(event: Event, relation: str) -> Component:
    ((only, count),) = normal_form(event, NeighboringRelation.of(relation)).counts
    assert count == 1
    return only


COMPONENTS = [
    SubsetSampled(SampledNoise("gaussian", 1.0, 0.1), SampledNoise("gaussian", 1.0, 0.1)),
    SubsetSampled(SampledNoise("gaussian", 0.3, 0.4), None),
    SubsetSampled(SampledNoise("laplace", 0.7, 0.3), None),
    Labelled(((0.9, SampledNoise("gaussian", 1.0, 0.1)), (0.1, SampledNoise("gaussian", 0.5, 0.1))), None),
    Labelled(((0.6, SampledNoise("laplace", 2.0, 0.2)), (0.4, SampledNoise("laplace", 1.0, 0.2))), None),
    component(TruncatedPoissonSampled(0.2, 3, 20, Gaussian(1.0)), "replace_one"),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("one", COMPONENTS, ids=str)
def test_pairs_are_laws_and_lattices_enclose_them(one: Component, direction: str) -> None:
    pair = one.pair(direction)  # type: ignore[arg-type]
    assert pair is not None
    check_pair(pair)


def subsets(size: int, batch: int) -> Iterator[tuple[int, ...]]:
    return itertools.combinations(range(size), batch)


def claims(event: Event, relation: str) -> tuple[list[float], list[float]]:
    """Lower and upper bounds on delta at EPSILONS."""
    bounds = [one_step.delta_bounds(component(event, relation), epsilon) for epsilon in EPSILONS]
    return [low for low, _ in bounds], [high for _, high in bounds]


def worst(pairs: Iterator[tuple[Centres, Centres]], noise: str, scale: float) -> list[float]:
    """The greatest delta at EPSILONS over explicit neighbours."""
    grid = np.linspace(-14 * scale - 6, 14 * scale + 6, 24001)
    density = gaussian_mixture if noise == "gaussian" else laplace_mixture
    result = np.zeros(len(EPSILONS))
    for first, second in pairs:
        p, q = density(grid, scale, first), density(grid, scale, second)
        for a, b in ((p, q), (q, p)):
            result = np.maximum(result, [divergence(a, b, epsilon, grid[1] - grid[0]) for epsilon in EPSILONS])
    return list(result)


def neighbours(size: int, others: tuple[float, ...], changed: tuple[float, ...]) -> Iterator[tuple[tuple, tuple]]:
    """Data sets of `size` that differ in their first example, values from the sets given."""
    for rest in itertools.product(others, repeat=size - 1):
        for x, y in itertools.combinations(changed, 2):
            yield (x, *rest), (y, *rest)


def without_replacement(data: tuple[float, ...], batch: int) -> Centres:
    choices = list(subsets(len(data), batch))
    return [(sum(data[i] for i in chosen), 1 / len(choices)) for chosen in choices]


@pytest.mark.parametrize(("noise", "make"), [("gaussian", Gaussian), ("laplace", Laplace)])
@pytest.mark.parametrize(("size", "batch"), [(2, 1), (3, 1), (4, 2), (4, 3)])
def test_fixed_batches_attain_the_claim_and_never_exceed_it(
    noise: str, make: Callable[[float], Event], size: int, batch: int
) -> None:
    scale = 1.3
    low, high = claims(SampledWithoutReplacement(batch, size, make(scale)), "replace_one")
    laws = [
        (without_replacement(a, batch), without_replacement(b, batch))
        for a, b in neighbours(size, (-1.0, 0.4, 1.0), (-1.0, 0.0, 1.0))
    ]
    truth = worst(iter(laws), noise, scale)
    assert truth == pytest.approx(high, abs=2e-5)
    assert truth == pytest.approx(low, abs=2e-5)
    less_noise = worst(iter(laws), noise, 0.9 * scale)
    assert any(less > claim + 1e-3 for less, claim in zip(less_noise, high, strict=True))


def test_zeroing_out_in_fixed_batches_is_between_the_bounds() -> None:
    low, high = claims(SampledWithoutReplacement(2, 4, Gaussian(1.3)), "zero_out")
    pairs = (
        (without_replacement(a, 2), without_replacement(b, 2)) for a, b in neighbours(4, (-1.0, 0.0, 1.0), (0.0, 1.0))
    )
    for truth, least, most in zip(worst(pairs, "gaussian", 1.3), low, high, strict=True):
        assert least - 1e-6 <= truth <= most + 1e-6


def test_two_fixed_batches_stay_below_the_claim() -> None:
    """Two steps of every pair of neighbours, on a plane grid."""
    event = SampledWithoutReplacement(1, 3, Gaussian(1.3))
    grid = np.linspace(-9, 9, 721)
    cell = (grid[1] - grid[0]) ** 2
    upper = [PRVAccountant(relation="replace_one").compose(event, 2).delta(epsilon) for epsilon in EPSILONS]
    truth = np.zeros(len(EPSILONS))
    for a, b in neighbours(3, (-1.0, 1.0), (-1.0, 1.0)):
        p, q = (gaussian_mixture(grid, 1.3, without_replacement(data, 1)) for data in (a, b))
        p, q = np.outer(p, p), np.outer(q, q)
        truth = np.maximum(truth, [divergence(p, q, epsilon, cell) for epsilon in EPSILONS])
    for exact, claim in zip(truth, upper, strict=True):
        assert 0.7 * claim <= exact <= claim + 1e-6


# Certified intervals by other software: explicit neighbours below, the same dominating pair above.
CERTIFIED = [
    (100, 1000, 4.0, 10, 1e-5, 0.7984673842217742, 0.8170683834206293),
    (4096, 50_000, 6.0, 2500, 1e-5, 6.5788956973840955, 7.356336230015634),
    (5000, 10_000, 40.0, 1000, 1e-8, 4.465721604760868, 4.504160644667203),
    (1000, 1_000_000, 8.0, 100_000, 1e-9, 0.42683800900005797, 0.4678110231778908),
]


@pytest.mark.parametrize(("batch", "size", "noise", "steps", "delta", "low", "high"), CERTIFIED)
def test_fixed_batches_agree_with_certified_intervals(
    batch: int, size: int, noise: float, steps: int, delta: float, low: float, high: float
) -> None:
    event = SampledWithoutReplacement(batch, size, Gaussian(noise))
    lower, upper = PRVAccountant(relation="replace_one").compose(event, steps).interval(delta)
    assert low * (1 - 1e-4) <= lower <= low * (1 + 1e-6)
    assert high * (1 - 1e-6) <= upper <= high * (1 + 1e-4)
    assert RDPAccountant(relation="replace_one").compose(event, steps).epsilon(delta) >= upper


@pytest.mark.parametrize(
    ("noise", "scale", "rate"), [("gaussian", 0.5, 0.1), ("gaussian", 6.0, 0.5), ("laplace", 0.8, 0.1)]
)
@pytest.mark.parametrize("t", [1e-3, 0.7, 5.0])
def test_moments_of_fixed_batches(noise: str, scale: float, rate: float, t: float) -> None:
    """Against the three parts of the pair, in 20 digits."""
    s, q, order = mpmath.mpf(scale), mpmath.mpf(rate), mpmath.mpf(t)
    with mpmath.workdps(20):

        def terms(x: mpmath.mpf) -> mpmath.mpf:
            exponent = (2 * x - 1) / (2 * s * s) if noise == "gaussian" else (1 if x > 1 else 2 * x - 1) / s
            ratio = 1 - q + q * mpmath.exp(exponent)
            weight = mpmath.npdf(x, 0, s) if noise == "gaussian" else mpmath.exp(-x / s) / (2 * s)
            return weight * (ratio ** (1 + order) + ratio**-order - 1 - ratio)

        inside = [mpmath.mpf(1) / 2 + k * s for k in range(int((t + 0.5) / scale) + 16)]
        points = inside if noise == "gaussian" else [*mpmath.linspace(0.5, 1, 5), *[1 + k * s for k in (1, 8, 90)]]
        exact = float(mpmath.log1p(mpmath.quad(terms, points)))
    (value,) = SubsetSampled(SampledNoise(noise, scale, rate), None).log_moments("add", np.array([t]))  # type: ignore[arg-type]
    assert exact <= value <= exact * (1 + 3e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_moments_of_labelled_parts_average(direction: str) -> None:
    parts = ((0.96875, SampledNoise("gaussian", 3.0, 0.01)), (0.03125, SampledNoise("gaussian", 0.4, 0.01)))
    t = np.array([1e-4, 0.3, 4.0, 30.0, 900.0])
    value = Labelled(parts, None).log_moments(direction, t)  # type: ignore[arg-type]
    moments = [(weight, one.log_moments(direction, t)) for weight, one in parts]  # type: ignore[arg-type]
    with mpmath.workdps(40):
        for k in range(len(t)):
            total = sum(mpmath.mpf(weight) * mpmath.exp(mpmath.mpf(float(moment[k]))) for weight, moment in moments)
            exact = float(mpmath.log(total))
            assert exact * (1 - 1e-13) <= value[k] <= exact * (1 + 1e-11)


def truncated(data: tuple[float | None, ...], rate: float, most: int) -> Centres:
    """Every draw, and of draws too large every subset; None is an example that is not there."""
    present = [x for x in data if x is not None]
    law: Centres = []
    for drawn in itertools.product((False, True), repeat=len(present)):
        weight = math.prod(rate if one else 1 - rate for one in drawn)
        kept = [x for x, one in zip(present, drawn, strict=True) if one]
        batches = list(itertools.combinations(kept, most)) if len(kept) > most else [tuple(kept)]
        law += [(sum(batch), weight / len(batches)) for batch in batches]
    return law


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize(
    ("relation", "changed"),
    [
        ("add_or_remove", [(x, None) for x in (-1.0, 1.0)]),
        ("replace_one", [(-1.0, 1.0), (1.0, 0.0)]),
        ("zero_out", [(-1.0, 0.0), (1.0, 0.0)]),
    ],
)
def test_truncated_batches_never_exceed_the_claim(relation: str, changed: list[tuple], most: int) -> None:
    scale, rate = 1.3, 0.5
    event = TruncatedPoissonSampled(rate, most, 4, Gaussian(scale))
    _, high = claims(event, relation)

    def pairs() -> Iterator[tuple[Centres, Centres]]:
        for size in (0, 1, 2, 3):
            for rest in itertools.product((-1.0, 0.0, 1.0), repeat=size):
                for x, y in changed:
                    yield truncated((x, *rest), rate, most), truncated((y, *rest), rate, most)

    truth = worst(pairs(), "gaussian", scale)
    for exact, claim in zip(truth, high, strict=True):
        assert exact <= claim + 1e-6
    low, _ = claims(event, relation)
    for exact, claim in zip(truth, low, strict=True):
        assert claim <= exact + 1e-6
    if relation == "add_or_remove":  # plain Poisson sampling does not cover what truncation does
        _, poisson = claims(PoissonSampled(rate, Gaussian(scale)), relation)
        assert any(exact > claim + 1e-3 for exact, claim in zip(truth, poisson, strict=True))


def test_a_batch_that_cannot_overflow_is_a_poisson_sample() -> None:
    for relation in ("add_or_remove", "replace_one", "zero_out"):
        roomy = component(TruncatedPoissonSampled(0.1, 50, 50, Gaussian(1.0)), relation)
        assert roomy == component(PoissonSampled(0.1, Gaussian(1.0)), relation)
    assert isinstance(component(TruncatedPoissonSampled(0.1, 49, 50, Gaussian(1.0)), "add_or_remove"), Labelled)


@pytest.mark.slow
def test_truncated_batches_agree_with_dp_accounting() -> None:
    """Its rate in full batches is an average and so lower, its shift there two clip norms on either side."""
    from dp_accounting import dp_event
    from dp_accounting.pld import pld_privacy_accountant

    steps, rate, most, size, noise = 20, 0.1, 35, 200, 1.0
    theirs = pld_privacy_accountant.PLDAccountant()
    step = dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=size, sampling_probability=rate, truncated_batch_size=most, noise_multiplier=noise
    )
    theirs.compose(dp_event.SelfComposedDpEvent(step, steps))
    ours = PRVAccountant().compose(TruncatedPoissonSampled(rate, most, size, Gaussian(noise)), steps).epsilon(1e-5)
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=0.02)


def test_the_probability_of_overflow_is_a_binomial_tail() -> None:
    parts = component(TruncatedPoissonSampled(0.3, 4, 11, Gaussian(1.0)), "add_or_remove").parts  # type: ignore[attr-defined]
    tail = sum(math.comb(10, j) * 0.3**j * 0.7 ** (10 - j) for j in range(4, 11))
    assert tail <= parts[1][0] <= tail * (1 + 2e-9)
    assert sum(weight for weight, _ in parts) == pytest.approx(1, abs=1e-15)


def test_a_shuffled_epoch_is_one_release_and_not_a_poisson_sample() -> None:
    """Both orders of two batches of one, on a plane grid; the other example's value known."""
    scale = 1.0
    grid = np.linspace(-9, 9, 601)
    cell = (grid[1] - grid[0]) ** 2
    low, high = claims(Shuffled(2, Gaussian(scale)), "replace_one")
    truth = np.zeros(len(EPSILONS))
    for (x, other), (y, _) in neighbours(2, (-1.0, 0.0, 1.0), (-1.0, 0.0, 1.0)):
        laws = []
        for value in (x, y):
            first, second = (gaussian_mixture(grid, scale, [(v, 1.0)]) for v in (value, other))
            laws.append((np.outer(first, second) + np.outer(second, first)) / 2)
        for p, q in (laws, laws[::-1]):
            truth = np.maximum(truth, [divergence(p, q, epsilon, cell) for epsilon in EPSILONS])
    for exact, least, most in zip(truth, low, high, strict=True):
        assert least <= exact + 1e-6
        assert exact <= most + 1e-6
    shuffle = PRVAccountant().compose(Shuffled(100, Gaussian(1.0))).interval(1e-5)
    poisson = PRVAccountant().compose(PoissonSampled(0.01, Gaussian(1.0)), 100).epsilon(1e-5)
    assert shuffle.upper == pytest.approx(PRVAccountant().compose(Gaussian(1.0)).epsilon(1e-5), rel=1e-9)
    assert shuffle.upper > 5 * poisson
    assert 0 < shuffle.lower < shuffle.upper


def test_a_shuffled_epoch_of_discrete_noise_is_bounded_by_one_release() -> None:
    event = DiscreteGaussian(1.0, 8)
    shuffled = PRVAccountant().compose(Shuffled(9, event), 2).epsilon(1e-5)
    assert shuffled == pytest.approx(PRVAccountant().compose(event, 2).epsilon(1e-5), rel=1e-6)


def test_replacing_in_poisson_samples_is_the_mixture_of_opposite_shifts() -> None:
    scale, rate = 1.1, 0.3
    mixture = component(PoissonSampled(rate, Gaussian(scale)), "replace_one")
    assert isinstance(mixture, ShiftMixture)
    low, high = claims(PoissonSampled(rate, Gaussian(scale)), "replace_one")
    laws = [[(0.0, 1 - rate), (x, rate)] for x in (-1.0, 0.0, 1.0)]
    truth = worst(itertools.combinations(laws, 2), "gaussian", scale)  # type: ignore[arg-type]
    assert truth == pytest.approx(low, abs=1e-5)
    assert truth == pytest.approx(high, abs=1e-5)


@pytest.mark.parametrize(
    "events",
    [
        [SampledWithoutReplacement(batch, 1000, Gaussian(1.0)) for batch in (1, 10, 100, 999)],
        [SampledWithoutReplacement(50, 1000, Laplace(noise)) for noise in (30.0, 3.0, 0.3)],
        [TruncatedPoissonSampled(rate, 20, 1000, Gaussian(1.0)) for rate in (0.001, 0.01, 0.03)],
        [TruncatedPoissonSampled(0.01, most, 1000, Gaussian(1.0)) for most in (1000, 30, 20, 10, 1)],
        [TruncatedPoissonSampled(0.01, 20, size, Gaussian(1.0)) for size in (20, 500, 1000, 3000)],
        [Shuffled(10, Gaussian(noise)) for noise in (8.0, 2.0, 0.5)],
    ],
    ids=lambda events: type(events[0]).__name__,
)
@pytest.mark.parametrize("relation", ["replace_one", "zero_out"])
def test_epsilon_grows_with_what_is_revealed(events: list[Event], relation: str) -> None:
    bounds = [PRVAccountant(relation=relation).compose(event, 7).epsilon(1e-6) for event in events]
    assert all(a <= b * (1 + 2e-4) for a, b in itertools.pairwise(bounds))
    assert bounds[0] < bounds[-1]


@pytest.mark.parametrize("relation", ["replace_one", "zero_out"])
@pytest.mark.parametrize("noise", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("batch", [1, 100, 9_999_999])
def test_extremes_answer_without_warnings(noise: float, batch: int, relation: str) -> None:
    size = 10_000_000
    for kind in (Gaussian, Laplace):
        for event in (
            SampledWithoutReplacement(batch, size, kind(noise)),
            TruncatedPoissonSampled(min(1.0, batch / size), batch, size, kind(noise)),
            Shuffled(batch, kind(noise)),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                one = component(event, relation)
                low, high = one_step.epsilon_bounds(one, 1e-9)
                loose = RDPAccountant(relation=relation).compose(event, 3).epsilon(1e-9)
                one_step.delta_bounds(one, 1e6)
            assert 0 <= low <= high < math.inf
            assert loose >= low
