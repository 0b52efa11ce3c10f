"""Inverting along a line: every part against an oracle, and the whole against the lattice, which shares none of it."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest

from accountants import Composed, Gaussian, PoissonSampled
from accountants.components.component import DIRECTIONS, Direction
from accountants.components.sampled_noise import SampledNoise
from accountants.engines import renyi_bound
from accountants.engines.contour import ContourSum, Line, StepTransform
from accountants.engines.contour_certificate import ContourCertificate, ContourProfile
from accountants.engines.contour_laws import ContourLaws, place_line, sampled_gaussians, survey
from accountants.engines.lattice_certificate import LatticeCertificate
from accountants.engines.quadrature import LossNodes, loss_nodes
from accountants.engines.thinning import thinned
from accountants.reduction.normal_form import NormalForm, normal_form
from accountants.relation import NeighboringRelation

TAIL = 1e-20
CASES = [(0.01, 1.0), (1e-5, 1.0), (1e-5, 0.3), (0.5, 10.0), (0.1, 0.3), (1e-3, 30.0), (0.9, 5.0), (1.0, 2.0)]


def form_of(event: object) -> NormalForm:
    return normal_form(event, NeighboringRelation.ADD_OR_REMOVE)  # type: ignore[arg-type]


def nodes_of(
    rate: float, scale: float, direction: Direction, tilt: float, frequency: float, tail: float = TAIL
) -> LossNodes:
    nodes = loss_nodes(SampledNoise("gaussian", scale, rate), direction, tail, tilt, 1.0, frequency)
    assert nodes is not None
    return nodes


def transform_by_mpmath(rate: float, scale: float, direction: Direction, z: complex) -> mpmath.mpc:
    """M(z) as an integral over outcomes, written from the definition."""
    with mpmath.workdps(22):
        q, s = mpmath.mpf(rate), mpmath.mpf(scale)

        def integrand(x: mpmath.mpf) -> mpmath.mpc:
            ratio = 1 - q + q * mpmath.exp((2 * x - 1) / (2 * s * s))
            power = 1 + z if direction == "remove" else -z
            return mpmath.npdf(x, 0, s) * mpmath.exp(power * mpmath.log(ratio))

        return mpmath.quad(integrand, mpmath.linspace(-22 * s, 22 * s + 2 + z.real, 60))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rate", "scale"), CASES[:4], ids=str)
@pytest.mark.parametrize(("tilt", "frequency"), [(1.5, 0.0), (2.0, 25.0)])
def test_nodes_give_the_transform_to_rounding(
    rate: float, scale: float, direction: Direction, tilt: float, frequency: float
) -> None:
    nodes = nodes_of(rate, scale, direction, tilt, frequency, 1e-100)
    log_mass = float(nodes.log_moments(np.array([tilt]))[0])
    ours = np.sum(np.exp(nodes.log_weight + tilt * nodes.loss - log_mass) * np.exp(1j * frequency * nodes.loss))
    truth = complex(transform_by_mpmath(rate, scale, direction, complex(tilt, frequency)) / mpmath.exp(log_mass))
    assert abs(ours - truth) < 1e-13
    # The same integral with 10 % less noise is told apart.
    other = complex(transform_by_mpmath(rate, scale * 0.9, direction, complex(tilt, frequency)) / mpmath.exp(log_mass))
    assert abs(ours - other) > 2e-11


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rate", "scale"), CASES, ids=str)
def test_weights_add_up_to_everything_that_was_not_cut(rate: float, scale: float, direction: Direction) -> None:
    component = SampledNoise("gaussian", scale, rate)
    nodes = loss_nodes(component, direction, 1e-4, 1.0, 1.0, 0.0)
    assert nodes is not None
    assert np.exp(nodes.log_weight).sum() == pytest.approx(1 - nodes.cut, abs=1e-14)
    assert 0 < nodes.cut <= 2e-4


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("rate", "scale"), CASES, ids=str)
def test_decay_bounds_the_transform_at_every_frequency(rate: float, scale: float, direction: Direction) -> None:
    tilt = 0.7
    nodes = nodes_of(rate, scale, direction, tilt, 300.0)
    weights, _ = nodes.tilted(tilt)
    mass, variation = nodes.decay(tilt)
    frequencies = np.geomspace(0.3, 300.0, 60)
    modulus = np.abs(np.exp(1j * np.multiply.outer(frequencies, nodes.loss)) @ weights)
    bound = np.min(1 - mass[:, None] + variation[:, None] / frequencies, axis=0)
    assert np.all(modulus <= bound + 1e-12)
    if rate > 0.4:  # and not by far: a quarter of the variation is no bound
        quarter = np.min(1 - mass[:, None] + variation[:, None] / 4 / frequencies, axis=0)
        assert np.any(modulus > quarter + 1e-12)


def test_fourier_sum_equals_the_direct_one() -> None:
    nodes = nodes_of(0.02, 0.9, "remove", 2.0, 60.0)
    line = Line(tilt=2.0, extra=1.0, width=7.3, count=64)
    transform = StepTransform.of(nodes, line)
    weights, _ = nodes.tilted(2.0)
    direct = np.exp(1j * np.multiply.outer(line.frequencies(weights.dtype), nodes.loss - transform.mean)) @ weights
    error = np.abs(np.exp(transform.log_transform) - direct)
    assert np.all(error <= 2 * np.abs(direct) * transform.rounding + 1e-16)
    assert error.max() < 1e-14


def test_two_steps_equal_the_double_integral() -> None:
    """delta of two steps by nested quadrature over both outcomes, against both bounds."""
    rate, scale, epsilon = 0.3, 1.0, 0.4
    form = form_of(PoissonSampled(rate, Gaussian(scale)) * 2)
    x = np.linspace(-12, 14, 40_001)
    step = x[1] - x[0]
    loss = np.log(1 - rate + rate * np.exp(x - 0.5))
    absent = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * step
    present = absent * np.exp(loss)
    order = np.argsort(loss)
    tail = np.concatenate([np.cumsum(present[order][::-1])[::-1], [0.0]])
    tail_absent = np.concatenate([np.cumsum(absent[order][::-1])[::-1], [0.0]])
    start = np.searchsorted(loss[order], epsilon - loss, side="right")
    truth = float(np.sum(present * tail[start]) - math.exp(epsilon) * np.sum(absent * tail_absent[start]))
    bounds = ContourProfile(form, "remove").log_delta_interval(epsilon)
    assert bounds is not None
    assert math.exp(bounds[0]) == pytest.approx(truth, rel=2e-4)
    assert math.exp(bounds[1]) == pytest.approx(truth, rel=2e-4)


def plans(count: int, seed: int) -> list[tuple[float, float, int, float]]:
    rng = np.random.default_rng(seed)
    return [
        (
            float(10 ** rng.uniform(-6, 0)),
            float(10 ** rng.uniform(-1, 2)),
            int(10 ** rng.uniform(0.5, 6)),
            float(10 ** rng.uniform(-14, -2)),
        )
        for _ in range(count)
    ]


def check_against_the_lattice(rate: float, scale: float, steps: int, delta: float) -> bool:
    form = form_of(PoissonSampled(rate, Gaussian(scale)) * steps)
    answered = False
    for direction in DIRECTIONS:
        bounds = ContourCertificate(form, direction, delta, 1.0).interval([steps])
        if bounds is None:
            continue
        answered = True
        certificate = LatticeCertificate(form, direction, delta)
        upper = certificate.upper([steps], renyi_bound.epsilon_upper(form, delta))
        lower = certificate.lower([steps], upper)
        assert bounds[0] <= upper * (1 + 1e-9)
        assert bounds[1] >= lower * (1 - 1e-9)
        assert bounds[1] - bounds[0] <= 1e-4 * bounds[1]
    return answered


def test_intervals_overlap_the_lattices() -> None:
    assert sum(check_against_the_lattice(*plan) for plan in plans(24, 5)) >= 14


@pytest.mark.slow
def test_intervals_overlap_the_lattices_on_many_plans() -> None:
    assert sum(check_against_the_lattice(*plan) for plan in plans(300, 6)) >= 200


def test_an_interval_excludes_a_percent_more_and_less_noise() -> None:
    delta = 1e-6
    truth = ContourCertificate(form_of(PoissonSampled(0.01, Gaussian(1.0)) * 1000), "remove", delta, 1.0)
    bounds = truth.interval([1000])
    assert bounds is not None
    for scale in (0.99, 1.01):
        other = ContourCertificate(form_of(PoissonSampled(0.01, Gaussian(scale)) * 1000), "remove", delta, 1.0)
        wrong = other.interval([1000])
        assert wrong is not None
        assert wrong[1] < bounds[0] or wrong[0] > bounds[1]


def test_counts_below_the_greatest_share_the_laws() -> None:
    step = PoissonSampled(0.02, Gaussian(1.1))
    shared = ContourCertificate(form_of(step * 1024), "remove", 1e-7, 0.5)
    for count in (512, 700, 1024):
        bounds, alone = shared.interval([count]), ContourCertificate(form_of(step * count), "remove", 1e-7, 1.0)
        exact = alone.interval([count])
        assert bounds is not None
        assert exact is not None
        assert bounds[0] <= exact[1]
        assert exact[0] <= bounds[1]
        assert bounds[1] - bounds[0] <= 1e-6 * bounds[1]


def test_many_scales_equal_the_sum_of_all_of_them() -> None:
    scales = np.geomspace(0.8, 4.0, 90)
    form = form_of(Composed([PoissonSampled(0.03, Gaussian(float(scale))) * 5 for scale in scales]))
    steps = sampled_gaussians(form)
    assert steps is not None
    terrain = survey(steps, "remove", 1e-6)
    assert terrain is not None
    line = place_line(terrain, terrain.cumulants.expected(math.log(1e-6)), 1e-6, 1.0)
    assert line is not None
    laws = ContourLaws.of(steps, "remove", 1e-6, line)
    assert laws is not None
    assert laws.fixed is not None
    assert len(laws.fixed) < 60
    assert sum(laws.fixed) == pytest.approx(450)
    transforms = []
    for component, _ in steps:
        nodes = loss_nodes(component, "remove", 1e-15, line.tilt, line.extra, line.last)
        assert nodes is not None
        transforms.append(StepTransform.of(nodes, line))
    counts = [count for _, count in steps]
    exact = [ContourSum(transforms, counts, line, np.zeros(line.count), upper=upper) for upper in (False, True)]
    lower, upper = (laws.composed(counts, upper=side).epsilon(1e-6, 100.0) for side in (False, True))
    assert lower <= exact[1].epsilon(1e-6, 100.0)
    assert exact[0].epsilon(1e-6, 100.0) <= upper
    assert upper - lower <= 1e-6 * upper


def test_thinned_steps_keep_their_number_and_their_first_moments() -> None:
    steps = [(SampledNoise("gaussian", 1 / float(mu), 0.1), 2.0) for mu in np.linspace(0.2, 1.0, 300)]
    few = thinned(steps, 6)
    assert len(few) == 6
    for power in range(12):  # Gauss's rule is exact for polynomials of degree 11
        whole = sum(count / component.scale**power for component, count in steps)
        assert sum(count / component.scale**power for component, count in few) == pytest.approx(whole, rel=1e-10)
    assert sum(count / component.scale**13 for component, count in few) != pytest.approx(
        sum(count / component.scale**13 for component, count in steps), rel=1e-12
    )
