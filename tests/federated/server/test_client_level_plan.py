"""The plan accounts a round as what has a proof, and holds each number that the guarantee depends on."""

import dataclasses
import json
import math
from typing import Any

import pytest

import accountants
from accountants import Gaussian, PoissonSampled, PRVAccountant, SampledWithoutReplacement
from dpdl.errors import ParameterError, PrivacyWarning
from dpdl.federated.adaptive_clipping import AdaptiveClipping
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.client_sampling import EveryClient, FixedSizeClients, PoissonClients

DELTA = 1e-5


def make(**changes: Any) -> ClientLevelPlan:
    settings: dict[str, Any] = {"clients": 1000, "noise_multiplier": 1.0, "max_update_norm": 0.5, "rounds": 100}
    if not {"sample_rate", "cohort", "sampling"} & set(changes):
        settings["sample_rate"] = 0.01
    return ClientLevelPlan(**{**settings, **changes})


FIXED: dict[str, Any] = {"sampling": "fixed_size", "cohort": 10}


@pytest.mark.parametrize(
    ("changes", "event", "amplified"),
    [
        ({"sample_rate": 0.01}, PoissonSampled(0.01, Gaussian(1.0)), True),
        ({"sample_rate": 0.01, "relation": "replace_one"}, PoissonSampled(0.01, Gaussian(1.0)), True),
        ({"sampling": "all"}, Gaussian(1.0), False),
        (FIXED, Gaussian(0.5), False),
        ({**FIXED, "relation": "zero_out"}, SampledWithoutReplacement(10, 1000, Gaussian(1.0)), True),
        ({**FIXED, "relation": "replace_one"}, SampledWithoutReplacement(10, 1000, Gaussian(1.0)), True),
        ({**FIXED, "cohort": 900, "relation": "zero_out"}, Gaussian(1.0), False),
        ({**FIXED, "cohort": 1000, "relation": "replace_one"}, Gaussian(1.0), False),
    ],
)
def test_a_round_is_accounted_as_what_has_a_proof(changes: dict[str, Any], event: Any, amplified: bool) -> None:
    plan = make(**changes)
    assert (plan.event(), plan.amplified) == (event, amplified)
    assert plan.event(3) == event * 3
    relation = changes.get("relation", "add_or_remove")
    composed = PRVAccountant(relation=relation).compose(event * 100)
    assert plan.epsilon(DELTA) == composed.epsilon(DELTA)


def test_fixed_size_under_adding_or_removing_is_bounded_by_the_exact_loss_of_the_worst_cohorts() -> None:
    # Two clients pull apart: 1 and -1. With three more at 0, cohorts of 1 of 4 neighbours, the release is a mixture of
    # normals; its hockey-stick divergence at the claimed epsilon, by quadrature, is within delta.
    import numpy as np
    from scipy.stats import norm

    plan = ClientLevelPlan(
        clients=3, noise_multiplier=1.0, max_update_norm=1.0, rounds=1, sampling="fixed_size", cohort=1
    )
    x = np.linspace(-40, 40, 400_001)

    def release(contributions: list[float]) -> Any:
        return np.mean([norm.pdf(x, centre, 1.0) for centre in contributions], axis=0)

    for others in ([-1.0, -1.0], [-1.0, 0.0]):
        with_, without = release([1.0, *others]), release(others)
        for delta in (1e-2, 1e-5):
            epsilon = plan._interval(1.0, delta).upper
            for p, q in ((with_, without), (without, with_)):
                spent = np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x)
                assert spent <= delta * (1 + 1e-6)
        bare = accountants.epsilon(noise_multiplier=1.0, sample_rate=1 / 3, steps=1, delta=1e-5)
        spent = np.trapezoid(np.maximum(with_ - math.exp(bare) * without, 0), x)
        if others == [-1.0, -1.0]:
            assert spent > 1e-5  # Poisson's number at the same rate would not have been a bound


def test_poisson_needs_a_small_fraction_of_what_no_amplification_claims() -> None:
    assert make(sample_rate=0.01).epsilon(DELTA) < 0.75
    assert make(sampling="all").epsilon(DELTA) > 90


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_rate": 0.05},
        {"sampling": "all"},
        FIXED,
        {**FIXED, "relation": "zero_out"},
        {"sample_rate": 0.05, "adaptive_clipping": AdaptiveClipping()},
    ],
)
def test_calibrated_is_within_the_budget_and_no_noisier_than_it_must_be(changes: dict[str, Any]) -> None:
    plan = make(**changes).calibrated(epsilon=2.0, delta=DELTA)
    assert 1.999 < plan.epsilon(DELTA) <= 2.0
    assert dataclasses.replace(plan, noise_multiplier=1.0) == make(**changes)


def test_calibrated_says_what_is_out_of_reach() -> None:
    with pytest.raises(ParameterError, match="out of reach"):
        make(**FIXED).calibrated(epsilon=0.0, delta=1e-12)


def test_derived_numbers() -> None:
    poisson, fixed, everybody = make(sample_rate=0.05), make(**FIXED), make(sampling="all")
    assert (poisson.expected_cohort, fixed.expected_cohort, everybody.expected_cohort) == (50, 10, 1000)
    assert (poisson.denominator, make(sample_rate=0.05, expected_weight=3.0).denominator) == (50, 150)
    assert poisson.client_sampling == PoissonClients(0.05)
    assert fixed.client_sampling == FixedSizeClients(10)
    assert everybody.client_sampling == EveryClient()
    assert poisson.update_noise_multiplier == 1.0
    assert poisson.bit_noise is None


def test_the_sentence_has_every_number_and_why_nothing_is_amplified() -> None:
    text = str(make(**FIXED, max_weight=3.0))
    for part in ("100 rounds", "10 of 1,000 clients", "L2 norm 0.5", "at most 3", "noise of 1 times", "divided by 10"):
        assert part in text
    assert "not amplified by sampling: a client that joins" in text
    assert "adding or removing one client" in text
    assert "as long as nobody learns who took part" in str(make())
    assert "0.3 quantile" in str(make(adaptive_clipping=AdaptiveClipping(quantile=0.3)))


@pytest.mark.parametrize("adaptive", [None, AdaptiveClipping(quantile=0.7, bit_noise_multiplier=30.0)])
def test_json_goes_there_and_back(adaptive: AdaptiveClipping | None) -> None:
    plan = make(adaptive_clipping=adaptive, relation="zero_out")
    assert ClientLevelPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "change", [{"schema": "dpdl.plan/1"}, {"clients": None}, {"more": 1}, {"adaptive_clipping": {"quantile": 0.5}}]
)
def test_json_of_something_else_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        ClientLevelPlan.from_json(json.dumps({**json.loads(make().to_json()), **change}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clients": 0}, "clients"),
        ({"rounds": -1}, "rounds"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"max_update_norm": 0.0}, "max_update_norm"),
        ({"max_update_norm": math.inf}, "max_update_norm"),
        ({"max_weight": 0.0}, "max_weight"),
        ({"expected_weight": math.nan}, "expected_weight"),
        ({"sampling": "shuffled"}, "sampling"),
        ({"sampling": "poisson"}, "needs a sample_rate"),
        ({"sampling": "all", "cohort": 3}, "has no cohort"),
        ({"sampling": "fixed_size", "cohort": 10, "sample_rate": 0.1}, "has no sample_rate"),
        ({"sampling": "fixed_size", "cohort": 1001}, "at most clients"),
        ({"sample_rate": 0.0}, "rate"),
        ({"relation": "swap"}, "relation"),
        ({"adaptive_clipping": 0.5}, "AdaptiveClipping"),
        ({"adaptive_clipping": AdaptiveClipping(bit_noise_multiplier=0.5)}, "bit_noise_multiplier"),
    ],
)
def test_what_is_out_of_range_or_contradicts_itself_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        make(**changes)


def test_a_delta_that_allows_publishing_a_client_is_warned_of() -> None:
    with pytest.warns(PrivacyWarning, match="1/N"):
        make().epsilon(1e-3)
