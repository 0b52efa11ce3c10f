"""Bounds on attackers: no simulated attack exceeds them, and the best one does with a tenth less noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import integrate, stats

from accountants import Gaussian, Laplace, ParameterError, PoissonSampled, UnsupportedEventError, dpsgd
from accountants.meaning.attacks import (
    advantage,
    bayes_accuracy,
    positive_predictive_value,
    posterior,
    reconstruction,
    tpr_at_fpr,
)

RUNS = 2_000_000
PLAIN, SAMPLED = 1.0, 0.3  # sampling rates


class Attack:
    """The optimal attacker against one noisy, Poisson-sampled sum, played `RUNS` times with and without the member."""

    def __init__(self, rate: float, sigma: float) -> None:
        generator = np.random.default_rng(20_240_613)
        self.rate, self.sigma = rate, sigma
        self.without = sigma * generator.standard_normal(RUNS)
        self.present = sigma * generator.standard_normal(RUNS) + (generator.random(RUNS) < rate)

    def rates(self, threshold: float) -> tuple[float, float]:
        """True and false positive rate of calling sums above the threshold members."""
        return float(np.mean(self.present > threshold)), float(np.mean(self.without > threshold))

    def threshold(self, fpr: float) -> float:
        return float(self.sigma * stats.norm.isf(fpr))

    def accuracy(self, prior: float) -> float:
        right_in, right_out = self.beliefs(self.present, prior) > 0.5, self.beliefs(self.without, prior) <= 0.5
        return float(prior * np.mean(right_in) + (1 - prior) * np.mean(right_out))

    def beliefs(self, sums: np.ndarray, prior: float) -> np.ndarray:
        """Posterior probability of membership."""
        ratio = 1 - self.rate + self.rate * np.exp((2 * sums - 1) / (2 * self.sigma**2))
        return prior * ratio / (prior * ratio + 1 - prior)


Excess = Callable[[Attack, float], float]


def excess_advantage(attack: Attack, rate: float) -> float:
    tpr, fpr = attack.rates(0.5)
    return tpr - fpr - advantage(PoissonSampled(rate, Gaussian(1.0)))


def excess_tpr(attack: Attack, rate: float) -> float:
    tpr, fpr = attack.rates(attack.threshold(0.05))
    return tpr - float(tpr_at_fpr(PoissonSampled(rate, Gaussian(1.0)), fpr))


def excess_predictive_value(attack: Attack, rate: float) -> float:
    tpr, fpr = attack.rates(attack.threshold(0.01))
    bound = positive_predictive_value(PoissonSampled(rate, Gaussian(1.0)), 0.2, fpr)
    return 0.2 * tpr / (0.2 * tpr + 0.8 * fpr) - float(bound)


def excess_accuracy(prior: float) -> Excess:
    return lambda attack, rate: attack.accuracy(prior) - bayes_accuracy(PoissonSampled(rate, Gaussian(1.0)), prior)


CASES = [
    pytest.param(rate, excess, id=f"{name} at rate {rate:g}")
    for rate in (PLAIN, SAMPLED)
    for name, excess in {
        "advantage": excess_advantage,
        "true positive rate": excess_tpr,
        "predictive value": excess_predictive_value,
        "accuracy at one half": excess_accuracy(0.5),
        "accuracy of the commoner": excess_accuracy(0.55),
        "accuracy of the rarer": excess_accuracy(0.45),
    }.items()
    if (rate, name) != (SAMPLED, "accuracy of the commoner")  # the bound is for the worse of both roles
]


@pytest.fixture(scope="module")
def attacks() -> dict[tuple[float, float], Attack]:
    return {(rate, sigma): Attack(rate, sigma) for rate in (PLAIN, SAMPLED) for sigma in (0.9, 1.0)}


@pytest.mark.parametrize(("rate", "excess"), CASES)
def test_the_best_attack_keeps_to_the_bound_and_breaks_it_with_a_tenth_less_noise(
    rate: float, excess: Excess, attacks: dict[tuple[float, float], Attack]
) -> None:
    noise = 4 * 0.5 / math.sqrt(RUNS)  # four standard deviations of a proportion, at most
    ratio_noise = noise * (10 if excess is excess_predictive_value else 2)
    assert excess(attacks[rate, 1.0], rate) < ratio_noise
    assert excess(attacks[rate, 1.0], rate) > -2 * ratio_noise - 1e-3, "the bound is loose"
    assert excess(attacks[rate, 0.9], rate) > ratio_noise


@pytest.mark.parametrize("rate", [PLAIN, SAMPLED])
@pytest.mark.parametrize("failure", [0.05, 1e-3])
def test_beliefs_exceed_the_posterior_bound_no_oftener_than_said(
    rate: float, failure: float, attacks: dict[tuple[float, float], Attack]
) -> None:
    attack, event = attacks[rate, 1.0], PoissonSampled(rate, Gaussian(1.0))
    bound = posterior(event, 0.1, failure=failure)
    for sums in (attack.present, attack.without):
        assert np.mean(attack.beliefs(sums, 0.1) > bound) <= failure
    exact = float(np.quantile(attack.beliefs(attack.present, 0.1), 1 - failure))
    assert exact < bound < exact + 0.12
    noisy = attacks[rate, 0.9]
    assert np.mean(noisy.beliefs(noisy.present, 0.1) > exact) > 1.1 * failure


def best_of_candidates(candidates: int, mu: float) -> float:
    """Success of the likeliest of equally likely orthogonal unit vectors, in Gaussian noise of scale 1 / mu."""

    def density(z: float) -> float:
        return float(stats.norm.pdf(z - mu) * stats.norm.cdf(z) ** (candidates - 1))

    return float(integrate.quad(density, -10, 10 + mu, limit=200)[0])


@pytest.mark.parametrize("candidates", [2, 10, 100])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_no_reconstruction_among_candidates_exceeds_the_bound(candidates: int, sigma: float) -> None:
    bound = float(reconstruction(Gaussian(sigma), 1 / candidates))
    assert best_of_candidates(candidates, 1 / sigma) <= bound
    assert best_of_candidates(candidates, 2 / sigma) > bound, "half the noise would be noticed"


def test_reconstruction_is_the_blow_up_of_the_baseline() -> None:
    kappa = np.array([1e-4, 0.01, 0.3])
    assert reconstruction(Gaussian(0.8), kappa) == pytest.approx(stats.norm.sf(stats.norm.isf(kappa) - 1.25), abs=1e-11)


@pytest.mark.parametrize("prior", [0.5, 0.2, 0.01, 0.8, 0.99])
def test_bayes_accuracy_is_exact_for_a_gaussian(prior: float) -> None:
    sigma, odds = 1.3, math.log((1 - prior) / prior)
    cut = sigma**2 * odds + 0.5
    exact = prior * stats.norm.sf((cut - 1) / sigma) + (1 - prior) * stats.norm.cdf(cut / sigma)
    assert bayes_accuracy(Gaussian(sigma), prior) == pytest.approx(exact, abs=1e-11)
    assert bayes_accuracy(Gaussian(sigma), prior) >= exact - 1e-15


def test_pure_privacy_bounds_the_posterior_almost_surely() -> None:
    assert posterior(Laplace(1.0), 0.5, failure=1e-12) == pytest.approx(math.e / (1 + math.e), rel=0.01)
    assert posterior(Laplace(1.0), 0.5, failure=1e-12) >= math.e / (1 + math.e) - 1e-11


def test_no_release_teaches_nothing_and_no_noise_everything() -> None:
    nothing, everything = Gaussian(1.0) * 0, Gaussian(0.0)
    assert advantage(nothing) == 0
    assert advantage(everything) == 1
    assert tpr_at_fpr(nothing, [0.0, 0.3]) == pytest.approx([0.0, 0.3], abs=1e-12)
    assert np.all(tpr_at_fpr(everything, [0.0, 0.3]) == 1)
    assert bayes_accuracy(nothing, 0.3) == pytest.approx(0.7)
    assert bayes_accuracy(everything, 0.3) == 1
    assert posterior(nothing, 0.3, failure=1e-6) == pytest.approx(0.3, rel=0.02)
    assert posterior(everything, 0.3, failure=1e-6) == 1
    assert positive_predictive_value(nothing, 0.3, 0.1) == pytest.approx(0.3)
    assert positive_predictive_value(everything, 0.3, 0.1) == pytest.approx(0.3 / (0.3 + 0.7 * 0.1))


def test_a_failure_probability_beyond_doubles_bounds_nothing() -> None:
    assert posterior(Gaussian(1.0), 0.5, failure=5e-324) == 1
    assert posterior(Gaussian(30.0), 0.5, failure=1e-250) < 1


def test_an_attack_that_accuses_nobody_wrongly_may_always_be_right() -> None:
    assert positive_predictive_value(Gaussian(1.0), 0.01, 0.0) == 1


def test_bounds_grow_with_every_step_and_fall_with_noise() -> None:
    plans = [dpsgd(noise_multiplier=s, sample_rate=0.05, steps=n) for s, n in ((1.2, 100), (1.0, 100), (1.0, 300))]
    for bound in (
        advantage,
        lambda event: float(tpr_at_fpr(event, 1e-3)),
        lambda event: bayes_accuracy(event, 0.1),
        lambda event: posterior(event, 0.1, failure=1e-3),
        lambda event: float(reconstruction(event, 1e-4)),
    ):
        values = [bound(plan) for plan in plans]
        assert values == sorted(values)
        assert values[0] < values[2]


def test_an_estimate_bounds_no_attacker() -> None:
    event = PoissonSampled(0.5, Gaussian(1.0))
    with pytest.raises(UnsupportedEventError):
        advantage(event, accountant="gdp")
    with pytest.raises(UnsupportedEventError):
        bayes_accuracy(event, 0.1, accountant="gdp")
    with pytest.raises(UnsupportedEventError):
        posterior(event, 0.1, failure=1e-3, accountant="gdp")


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_arguments_are_checked(bad: float) -> None:
    event = Gaussian(1.0)
    with pytest.raises(ParameterError, match="fpr"):
        tpr_at_fpr(event, bad)
    with pytest.raises(ParameterError, match="baseline"):
        reconstruction(event, [0.1, bad])
    for prior in (bad, 0.0, 1.0):
        with pytest.raises(ParameterError, match="prior"):
            bayes_accuracy(event, prior)
        with pytest.raises(ParameterError, match="prior"):
            positive_predictive_value(event, prior, 0.1)
    with pytest.raises(ParameterError, match="failure"):
        posterior(event, 0.5, failure=bad)
