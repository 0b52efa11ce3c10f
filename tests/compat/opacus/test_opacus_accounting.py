"""What a facade run reports is what happened in it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

import accountants
from dpdl.compat.opacus import PrivacyEngine
from dpdl.compat.opacus.accountants import (
    GaussianAccountant,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
    register_accountant,
    registry,
)
from dpdl.compat.opacus.accountants.utils import get_noise_multiplier
from dpdl.compat.opacus.schedulers import ExponentialNoise, LambdaGradClip, LambdaNoise, StepNoise
from dpdl.compat.opacus.utils.batch_memory_manager import BatchMemoryManager
from dpdl.errors import ParameterError, PrivacyWarning
from tests.compat.opacus.small_run import loader, network, private, step

DELTA = 1e-5


def _gaussian_epsilon(sigma: float, times: int, delta: float) -> float:
    """Of `times` Gaussians (Balle and Wang 2018, Theorem 8): an equation in epsilon."""
    mu = math.sqrt(times) / sigma

    def excess(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(brentq(excess, 0, 500))


def test_epsilon_is_that_of_the_steps_taken_at_the_rate_that_was_drawn() -> None:
    engine = PrivacyEngine()
    # 930 examples in batches of 10: a rate of 1/93, and 93 batches a pass, in whole numbers.
    model, optimizer, batches = private(engine, data=loader(n=930, batch_size=10), noise_multiplier=1.3)
    assert engine.get_epsilon(DELTA) == 0.0
    assert len(batches) == 93
    for batch in itertools.islice(batches, 5):
        step(model, optimizer, batch)
    assert engine.accountant.history == [(1.3, 10 / 930, 5)]
    expected = accountants.epsilon(noise_multiplier=1.3, sample_rate=10 / 930, steps=5, delta=DELTA)
    assert engine.get_epsilon(DELTA) == expected


def test_a_pass_that_is_broken_off_counts_what_was_taken() -> None:
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, batches = private(engine, data=loader(batch_size=4), noise_multiplier=1.0)
    step(model, optimizer, next(iter(batches)))
    assert engine.accountant.history == [(1.0, 4 / 12, 1)]


def test_parts_of_a_batch_count_once() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, noise_multiplier=1.0)
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=5, optimizer=optimizer) as parts:
        for batch in parts:
            step(model, optimizer, batch)
    assert engine.accountant.history == [(1.0, 1.0, 1)]


def test_without_poisson_sampling_every_pass_is_a_whole_gaussian() -> None:
    engine = PrivacyEngine()
    with pytest.warns(PrivacyWarning, match="amplifies nothing"):
        model, optimizer, batches = private(
            engine, data=loader(batch_size=4, shuffle=True), noise_multiplier=4.0, poisson_sampling=False
        )
    for _ in range(3):
        for batch in batches:
            step(model, optimizer, batch)
    step(model, optimizer, next(iter(batches)))  # a fourth pass has begun
    assert engine.accountant.history == [(4.0, 1.0, 4)]
    exact = _gaussian_epsilon(4.0, 4, DELTA)
    assert exact * (1 - 1e-6) <= engine.get_epsilon(DELTA) <= exact * (1 + 1e-4)


def test_less_noise_within_a_pass_is_charged_again_without_poisson_sampling() -> None:
    engine = PrivacyEngine()
    with pytest.warns(PrivacyWarning):
        model, optimizer, batches = private(
            engine, data=loader(batch_size=4), noise_multiplier=2.0, poisson_sampling=False
        )
    schedule = LambdaNoise(optimizer, noise_lambda=lambda epoch: [1.0, 2.0, 0.5][epoch])
    for batch in batches:
        step(model, optimizer, batch)
        if schedule.last_epoch < 2:
            schedule.step()
    assert engine.accountant.history == [(2.0, 1.0, 1), (1.0, 1.0, 1)]


def test_schedules_are_accounted_for_step_by_step() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, data=loader(batch_size=4), noise_multiplier=2.0, max_grad_norm=1.0)
    noise = StepNoise(optimizer, step_size=2, gamma=0.5)
    clip = LambdaGradClip(optimizer, scheduler_function=lambda epoch: 1 / (1 + epoch))
    for batch in batches:
        step(model, optimizer, batch)
        noise.step()
        clip.step()
    assert engine.accountant.history == [(2.0, 4 / 12, 2), (1.0, 4 / 12, 1)]
    assert optimizer.max_grad_norm == 1 / 4
    state = noise.state_dict()
    again = StepNoise(optimizer, step_size=7, gamma=0.1)
    again.load_state_dict(state)
    assert again.state_dict() == state
    with pytest.raises(ParameterError, match="not be negative"):
        ExponentialNoise(optimizer, gamma=-1.0).step()


def test_noise_covers_the_largest_norm_that_parts_were_clipped_to() -> None:
    model, optimizer, batches = private(noise_multiplier=1.0, max_grad_norm=8.0)
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=6, optimizer=optimizer) as parts:
        for batch in parts:
            step(model, optimizer, batch, criterion=lambda out, _: 0 * out.mean())
            optimizer.max_grad_norm = 1e-3
    # Noise alone: 26 numbers of standard deviation 8 / 12, or of 1e-3 / 12 if the last part's norm were used.
    assert max(float(p.grad.abs().max()) for p in model.parameters()) > 0.1


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_with_epsilon_ends_within_the_budget(accountant: str) -> None:
    engine = PrivacyEngine(accountant=accountant)
    model, optimizer, batches = engine.make_private_with_epsilon(
        **_parts(),
        data_loader=loader(n=60, batch_size=6),
        target_epsilon=2.0,
        target_delta=DELTA,
        epochs=2,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for batch in batches:
            step(model, optimizer, batch)
    assert 1.98 < engine.get_epsilon(DELTA) <= 2.0


@pytest.mark.filterwarnings("ignore::dpdl.errors.PrivacyWarning")
def test_with_epsilon_holds_without_poisson_sampling_too() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = engine.make_private_with_epsilon(
        **_parts(),
        data_loader=loader(n=60, batch_size=6),
        target_epsilon=2.0,
        target_delta=DELTA,
        epochs=2,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for _ in range(2):
        for batch in batches:
            step(model, optimizer, batch)
    assert 1.98 < engine.get_epsilon(DELTA) <= 2.0
    with pytest.warns(PrivacyWarning, match="spent something already"):
        engine.make_private_with_epsilon(
            module=model,
            optimizer=optimizer,
            data_loader=loader(n=60, batch_size=6),
            target_epsilon=2.0,
            target_delta=DELTA,
            epochs=1,
            max_grad_norm=1.0,
        )


def _parts() -> dict[str, Any]:
    model = network()
    return {"module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("epsilon", [0.3, 3.0])
def test_noise_multiplier_keeps_its_promise(accountant: str, epsilon: float) -> None:
    sigma = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=DELTA, sample_rate=0.01, epochs=5, accountant=accountant
    )
    trial = create_accountant(accountant)
    trial.history = [(sigma, 0.01, 500)]
    assert epsilon - 0.01 < trial.get_epsilon(DELTA) <= epsilon
    with pytest.raises(ParameterError, match="either"):
        get_noise_multiplier(target_epsilon=1.0, target_delta=DELTA, sample_rate=0.01, epochs=1, steps=1)


@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.5, 0.04, 2250), (0.8, 0.01, 1000), (4.0, 1.0, 10)])
def test_rdp_is_the_formula_with_moments_by_quadrature(sigma: float, rate: float, steps: int) -> None:
    alpha = 6.0  # whole or not, one formula: the moment of the sampled Gaussian's likelihood ratio
    ratio = lambda x: 1 - rate + rate * mpmath.exp((2 * x - 1) / (2 * sigma**2))  # noqa: E731
    density = lambda x: mpmath.npdf(x, 0, sigma)  # noqa: E731
    moment = mpmath.quad(lambda x: density(x) * ratio(x) ** alpha, [-20 * sigma, 0, alpha, 30 * sigma])
    rdp = steps * float(mpmath.log(moment)) / (alpha - 1)
    expected = rdp + math.log1p(-1 / alpha) - (math.log(DELTA) + math.log(alpha)) / (alpha - 1)
    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    assert accountant.get_epsilon(DELTA, alphas=[alpha]) == pytest.approx(expected, rel=1e-6)
    assert accountant.get_privacy_spent(delta=DELTA, alphas=[alpha])[1] == alpha
    assert accountant.get_epsilon(DELTA) <= expected


def test_epsilon_of_hopeless_runs_is_infinite_at_once() -> None:
    for kind in (PRVAccountant, RDPAccountant):
        accountant = kind()
        assert accountant.get_epsilon(DELTA) == 0.0
        accountant.step(noise_multiplier=0.0, sample_rate=0.5)
        assert accountant.get_epsilon(DELTA) == math.inf


def test_gdp_is_an_estimate_and_takes_one_setting() -> None:
    with pytest.warns(PrivacyWarning, match="estimate"):
        accountant = GaussianAccountant()
    assert accountant.get_epsilon(DELTA) == 0.0
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    assert isinstance(accountant.get_epsilon(DELTA), accountants.Estimate)
    with pytest.raises(ValueError, match="one noise multiplier"):
        accountant.step(noise_multiplier=1.1, sample_rate=0.1)
    assert accountant.history == [(1.0, 0.1, 1)]


def test_states_of_accountants() -> None:
    accountant = PRVAccountant()
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    again = PRVAccountant()
    again.load_state_dict(accountant.state_dict())
    assert again.history == [(1.0, 0.1, 2)]
    for broken in (
        {},
        {"history": []},
        {"history": [], "mechanism": "rdp"},
        {"history": [(1, -2, 3)], "mechanism": "prv"},
    ):
        with pytest.raises(ParameterError):
            again.load_state_dict(broken)
    assert again.history == [(1.0, 0.1, 2)]


def test_accountants_of_ones_own() -> None:
    class Mine(PRVAccountant):
        @classmethod
        def mechanism(cls) -> str:
            return "mine"

    register_accountant("mine", Mine)
    try:
        assert PrivacyEngine(accountant="mine").accountant.mechanism() == "mine"
        with pytest.raises(ValueError, match="registered already"):
            register_accountant("mine", Mine)
    finally:
        del registry._ACCOUNTANTS["mine"]


def test_an_accountant_that_refuses_stops_the_step_before_its_noise() -> None:
    with pytest.warns(PrivacyWarning):
        engine = PrivacyEngine(accountant="gdp")
    model, optimizer, batches = private(engine, data=loader(batch_size=4), noise_multiplier=1.0)
    steps = iter(batches)
    step(model, optimizer, next(steps))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.noise_multiplier = 0.5
    with pytest.raises(ParameterError):
        step(model, optimizer, next(steps))
    assert all(bool((p == b).all()) for p, b in zip(model.parameters(), before, strict=True))


def test_bounds_are_opacus_own_or_tighter() -> None:
    pytest.importorskip("opacus")
    from opacus import accountants as theirs

    for sigma, rate, steps in [(1.1, 0.01, 1000), (0.7, 0.005, 3000)]:
        ours, other = RDPAccountant(), theirs.RDPAccountant()
        ours.history = other.history = [(sigma, rate, steps)]
        assert ours.get_epsilon(DELTA) == pytest.approx(other.get_epsilon(DELTA), rel=1e-6)
        prv, its = PRVAccountant(), theirs.PRVAccountant()
        prv.history = its.history = [(sigma, rate, steps)]
        assert its.get_epsilon(DELTA) - 0.03 < prv.get_epsilon(DELTA) < its.get_epsilon(DELTA)
