"""dp_accounting and prv-accountant, each where it can be trusted."""

from __future__ import annotations

import math

import numpy as np
import pytest

import accountants
from accountants import Gaussian, PoissonSampled, PRVAccountant, rdp

dp_accounting = pytest.importorskip("dp_accounting")
pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
rdp_peer = pytest.importorskip("dp_accounting.rdp")


def plans(count: int, seed: int) -> list[tuple[float, float, int, float]]:
    rng = np.random.default_rng(seed)
    return [
        (
            float(10 ** rng.uniform(-4, 0)),
            float(10 ** rng.uniform(-0.3, 1)),
            int(10 ** rng.uniform(0, 4)),
            float(10 ** rng.uniform(-8, -3)),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), plans(40, 1))
def test_rdp_equals_dp_accounting_at_integer_orders(q: float, sigma: float, steps: int, delta: float) -> None:
    orders = [2, 3, 5, 8, 16, 32, 64]
    peer = rdp_peer.RdpAccountant(orders)
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    peer.compose(event, steps)
    ours = steps * rdp(PoissonSampled(q, Gaussian(sigma)), orders)
    assert ours == pytest.approx(np.asarray(peer._rdp), rel=1e-3)


def check_against_pld(q: float, sigma: float, steps: int, delta: float) -> None:
    low, high = accountants.interval(noise_multiplier=sigma, sample_rate=q, steps=steps, delta=delta)
    bounds = []
    for pessimistic in (False, True):
        one = pld.from_gaussian_mechanism(
            sigma,
            sampling_prob=q,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=1e-4,
            use_connect_dots=pessimistic,
        )
        bounds.append(one.self_compose(steps).get_epsilon_for_delta(delta))
    # Its floor on delta is near 1e-11, so its bounds hold to that: compare with a little to spare.
    assert high >= bounds[0] * (1 - 1e-4) - 1e-6
    assert low <= bounds[1] * (1 + 1e-4) + 1e-6


# Beyond epsilon 600 the peer's exp(-loss) underflows, and both of its bounds exceed the truth.
MODERATE = [p for p in plans(260, 2) if p[2] * p[0] ** 2 / p[1] ** 2 < 20][:200]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), MODERATE[:8])
def test_interval_overlaps_connect_the_dots(q: float, sigma: float, steps: int, delta: float) -> None:
    check_against_pld(q, sigma, steps, delta)


@pytest.mark.slow
@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), MODERATE[8:])
def test_interval_overlaps_connect_the_dots_on_many_plans(q: float, sigma: float, steps: int, delta: float) -> None:
    check_against_pld(q, sigma, steps, delta)


@pytest.mark.parametrize(("q", "sigma", "steps", "delta"), [(0.01, 1.0, 1000, 1e-5), (0.002, 0.8, 500, 1e-6)])
def test_interval_meets_prv_accountants(q: float, sigma: float, steps: int, delta: float) -> None:
    peer = pytest.importorskip("prv_accountant")
    mechanism = peer.PoissonSubsampledGaussianMechanism(noise_multiplier=sigma, sampling_probability=q)
    engine = peer.PRVAccountant(
        prvs=[mechanism], max_self_compositions=[steps], eps_error=0.05, delta_error=delta / 1000
    )
    lower, _, upper = engine.compute_epsilon(delta=delta, num_self_compositions=[steps])
    low, high = PRVAccountant().compose(PoissonSampled(q, Gaussian(sigma)), steps).interval(delta)
    assert lower <= high
    assert low <= upper
    assert not math.isclose(lower, upper)
