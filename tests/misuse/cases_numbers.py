"""Numbers that mean nothing, or less than they seem to: plans, budgets, accountants."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import accountants
import dpdl
from dpdl.budget import Budget
from dpdl.errors import ParameterError, PrivacyWarning, UnsupportedEventError
from dpdl.watchdog import Watchdog
from tests.misuse.case import Trial, misuse
from tests.small_run import examples, small_run, step_once

PLANS = "Numbers of a plan"
CLAIMS = "Claims"
GOOD: dict[str, Any] = {
    "sample_rate": 0.1,
    "expected_batch_size": 10,
    "steps": 5,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
}


def loader(n: int = 12) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*examples(n)), batch_size=4)


def assert_plans_refused(trial: Trial, name: str, *values: object) -> None:
    for value in values:
        with trial.refused(saying=name):
            dpdl.PrivacyPlan(**{**GOOD, name: value})


@misuse(
    PLANS, tried="a noise multiplier that is NaN, negative, infinite, a text, a bool or complex", refused=ParameterError
)
def senseless_noise_multipliers(trial: Trial) -> None:
    values = (
        math.nan,
        -1.0,
        math.inf,
        "1.0",
        True,
        np.bool_(True),
        1j,
        None,
        np.float32("nan"),
        torch.tensor(math.nan),
    )
    assert_plans_refused(trial, "noise_multiplier", *values)


@misuse(
    PLANS,
    tried="a clipping norm that is 0, negative, NaN or a list",
    peer="Opacus: a float under per_layer gives 'has no len()'",
    refused=ParameterError,
)
def senseless_clipping_norms(trial: Trial) -> None:
    assert_plans_refused(trial, "max_grad_norm", 0, -1.0, math.nan, [1.0, 1.0], True)


@misuse(
    PLANS, tried="an infinite clipping norm with noise: no noise hides an unbounded gradient", refused=ParameterError
)
def noise_without_clipping(trial: Trial) -> None:
    assert_plans_refused(trial, "max_grad_norm", math.inf)


@misuse(PLANS, tried="a sampling rate of 0, above 1, or in percent", refused=ParameterError)
def senseless_sample_rates(trial: Trial) -> None:
    assert_plans_refused(trial, "sample_rate", 0, 1.01, 10, -0.1, math.nan, False)


@misuse(PLANS, tried="steps of -1, 2.5, 3.0, a bool or a text", refused=ParameterError)
def senseless_steps(trial: Trial) -> None:
    assert_plans_refused(trial, "steps", -1, 2.5, 3.0, True, "10", None, math.inf)


@misuse(PLANS, tried="an expected batch size of 0 or less, or infinite", refused=ParameterError)
def senseless_batch_sizes(trial: Trial) -> None:
    assert_plans_refused(trial, "expected_batch_size", 0, -4, math.inf, math.nan)


@misuse(
    PLANS,
    tried="clipping, sampling, noise or relations that do not exist",
    peer="Opacus: says 'hooks, ew' only",
    refused=ParameterError,
)
def unknown_choices(trial: Trial) -> None:
    for name in ("clipping", "sampling", "noise", "relation"):
        assert_plans_refused(trial, name, "other", None, 3)


@misuse(
    PLANS,
    tried="a target epsilon that is negative, NaN, infinite or a bool; a delta of 0, 1 or more",
    peer="deepee (D11): epsilon 0 and delta 0 are accepted",
    refused=ParameterError,
)
def senseless_targets(trial: Trial) -> None:
    for epsilon in (-1.0, math.nan, math.inf, True, "3"):
        with trial.refused(saying="epsilon"):
            dpdl.PrivacyPlan.for_loader(loader(), steps=3, epsilon=epsilon, delta=1e-5, max_grad_norm=1.0)  # type: ignore[arg-type]
    for delta in (0, 1, 1.5, -1e-5, math.nan, True):
        with trial.refused(saying="delta"):
            dpdl.PrivacyPlan.for_loader(loader(), steps=3, epsilon=3.0, delta=delta, max_grad_norm=1.0)


@misuse(PLANS, tried="both a budget and a noise multiplier, or neither; both epochs and steps", refused=ParameterError)
def contradicting_alternatives(trial: Trial) -> None:
    for given in ({}, {"epsilon": 3.0}, {"delta": 1e-5}, {"epsilon": 3.0, "delta": 1e-5, "noise_multiplier": 1.0}):
        with trial.refused():
            dpdl.PrivacyPlan.for_loader(loader(), steps=3, max_grad_norm=1.0, **given)
    for length in ({}, {"epochs": 1, "steps": 3}):
        with trial.refused():
            dpdl.PrivacyPlan.for_loader(loader(), noise_multiplier=1.0, max_grad_norm=1.0, **length)


@misuse(PLANS, tried="changing a plan after it was made", refused=FrozenInstanceError)
def a_plan_changed_later(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        private.optimizer.plan.noise_multiplier = 0.1  # type: ignore[misc]


@misuse(PLANS, tried="giving the optimizer another plan", refused=AttributeError)
def another_plan_for_the_optimizer(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        private.optimizer.plan = dpdl.PrivacyPlan(**GOOD)  # type: ignore[misc]


@misuse(PLANS, tried="a plan's JSON with a changed, missing or new field", refused=ParameterError)
def an_edited_plan(trial: Trial) -> None:
    values = json.loads(dpdl.PrivacyPlan(**GOOD).to_json())
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda v: v.update(noise_multiplier=-1),
        lambda v: v.pop("steps"),
        lambda v: v.update(secret=1),
        lambda v: v.update(schema="dpdl.plan/2"),
        lambda v: v.update(dataset_size=7),
    ]
    for edit in edits:
        edited = dict(values)
        edit(edited)
        with trial.refused():
            dpdl.PrivacyPlan.from_json(json.dumps(edited))


@misuse(PLANS, tried="unknown arguments", refused=TypeError)
def unknown_arguments(trial: Trial) -> None:
    with trial.refused():
        dpdl.PrivacyPlan(**GOOD, secure_mode=True)
    with trial.refused():
        dpdl.Execution(microbatch_size=4)  # type: ignore[call-arg]


@misuse(PLANS, tried="engines, dtypes and sizes that do not exist", refused=ParameterError)
def senseless_execution(trial: Trial) -> None:
    wrong: list[dict[str, Any]] = [
        {"engine": "hooks"},
        {"accumulate_dtype": torch.bfloat16},
        {"max_physical_batch_size": 0},
        {"max_physical_batch_size": True},
        {"loss_reduction": "none"},
        {"insecure_seed": -1},
        {"insecure_seed": True},
        {"compile": True},
    ]
    for settings in wrong:
        with trial.refused(saying=next(iter(settings))):
            dpdl.Execution(**settings)


@misuse(
    PLANS,
    tried="texts, None or tensors for the switches of an Execution (self_check, data_parallel, compile)",
    refused=ParameterError,
)
def senseless_switches(trial: Trial) -> None:
    for name in ("self_check", "data_parallel", "compile"):
        for value in (None, "no", 0, torch.ones(3)):
            with trial.refused(saying=name):
                dpdl.Execution(**{name: value})  # type: ignore[arg-type]


# ── claims ──────────────────────────────────────────────────────────────────────────────────────────


@misuse(CLAIMS, tried="delta >= 1/n: an example may be published outright", refused=PrivacyWarning)
def a_large_delta(trial: Trial) -> None:
    private = small_run(noise_multiplier=1.0)
    step_once(private)
    with trial.warned():
        private.optimizer.report(delta=0.1)


@misuse(
    CLAIMS,
    tried="noise_multiplier=0, for tests, left in",
    peer="Opacus: OverflowError",
    harmless="the report says NO GUARANTEE, and epsilon is infinite",
)
def no_noise(trial: Trial) -> None:
    private = small_run(noise_multiplier=0.0)
    step_once(private)
    assert private.optimizer.epsilon(1e-5) == math.inf
    assert str(private.optimizer.report(1e-5)).startswith("NO GUARANTEE")


@misuse(
    CLAIMS,
    tried="epsilon before the first step",
    peer="Opacus: prv 'cannot convert float NaN to integer', gdp IndexError",
    harmless="0.0",
)
def epsilon_before_the_first_step(trial: Trial) -> None:
    private = small_run(noise_multiplier=1.0)
    assert private.optimizer.epsilon(1e-5) == 0.0
    assert private.optimizer.report(1e-5).epsilon == 0.0


@misuse(
    CLAIMS,
    tried="hardly any noise: 0.001, and rate 0.5 over 2,000 steps",
    peer="Opacus: OverflowError, MemoryError of 83.8 GiB, or `inf` after 104 s",
    harmless="a large bound, at once",
)
def hardly_any_noise(trial: Trial) -> None:
    for noise in (1e-3, 1e-30):
        spent = accountants.epsilon(noise_multiplier=noise, sample_rate=0.5, steps=2000, delta=1e-5)
        assert spent > 1e6


@misuse(
    CLAIMS,
    tried="a seed left in (insecure_seed=0 as well)",
    peer="deepee (D3): seed=0 is ignored",
    harmless="every report says so",
)
def a_seed_left_in(trial: Trial) -> None:
    private = small_run(noise_multiplier=1.0, insecure_seed=0)
    step_once(private)
    report = private.optimizer.report(1e-5)
    assert not report.secure_randomness
    assert "insecure_seed" in str(report)


@misuse(
    CLAIMS,
    tried="self_check=False left in",
    harmless="the report says that the model was not checked",
)
def the_self_check_left_out(trial: Trial) -> None:
    private = small_run(noise_multiplier=1.0, self_check=False)
    step_once(private)
    assert any("check" in note for note in private.optimizer.report(1e-5).notes)


@misuse(
    CLAIMS,
    tried="batches of a fixed size accounted as Poisson sampling, or under add-or-remove",
    peer="deepee (D12), fastDP, PT: do",
    refused=UnsupportedEventError,
)
def fixed_sizes_under_add_or_remove(trial: Trial) -> None:
    event = accountants.SampledWithoutReplacement(256, 60_000, accountants.Gaussian(1.1))
    with trial.refused():
        accountants.PRVAccountant().compose(event * 100)


@misuse(
    CLAIMS,
    tried="a shuffled pass accounted like Poisson sampling",
    peer="Opacus: epsilon 2.99 is reported for a shuffled loader, no warning",
    harmless="an event of its own, which claims no amplification",
)
def a_shuffle_accounted(trial: Trial) -> None:
    shuffled = accountants.Shuffled(10, accountants.Gaussian(1.0))
    spent = accountants.PRVAccountant(relation="zero_out").compose(shuffled).epsilon(1e-5)
    poisson = accountants.epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=10, delta=1e-5)
    alone = accountants.epsilon(noise_multiplier=1.0, sample_rate=1, steps=1, delta=1e-5)
    assert spent > 0.999 * alone > 1.2 * poisson


@misuse(
    CLAIMS,
    tried="other noise half-way through (a schedule), by a second run on the same data",
    peer="Opacus: the GDP accountant pops its history, prv takes 45 s for 300 noises",
    harmless="each step is recorded with its own noise; the composition is at least as much as the noisier run's steps",
)
def noise_changed_half_way(trial: Trial) -> None:
    ledger = dpdl.Ledger(relation=accountants.NeighboringRelation.ADD_OR_REMOVE)
    for noise, count in ((2.0, 30), (1.0, 10)):
        for _ in range(count):
            ledger.record(accountants.PoissonSampled(0.1, accountants.Gaussian(noise)))
    spent = ledger.epsilon(1e-5)
    bounds = [
        accountants.epsilon(noise_multiplier=noise, sample_rate=0.1, steps=40, delta=1e-5) for noise in (2.0, 1.0)
    ]
    assert bounds[0] < spent < bounds[1]


@misuse(
    CLAIMS,
    tried="a budget of epsilon 0, delta 0, or one half of it",
    peer="deepee (D11): accepted",
    refused=ParameterError,
)
def senseless_budgets(trial: Trial) -> None:
    for epsilon, delta in ((0, 1e-5), (-1, 1e-5), (math.nan, 1e-5), (1.0, 0), (1.0, 1), (True, 1e-5)):
        with trial.refused():
            Budget(epsilon=epsilon, delta=delta)
    with trial.refused():
        small_run_with(Watchdog())


def small_run_with(watchdog: Watchdog) -> dpdl.Private:
    model = torch.nn.Linear(3, 2).double()
    plan = dpdl.PrivacyPlan.for_loader(loader(), steps=3, noise_multiplier=1.0, max_grad_norm=1.0)
    return dpdl.make_private(model, torch.optim.SGD(model.parameters(), 0.1), loader(), plan, watchdog=watchdog)


@misuse(
    CLAIMS,
    tried="an epsilon target of 0.001 or 100",
    peer="Opacus: 'The privacy budget is too low.', 16 s",
    harmless="planned at once, and kept",
)
def extreme_targets(trial: Trial) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epsilon in (1e-3, 100.0):
            plan = dpdl.PrivacyPlan.for_loader(loader(200), steps=50, epsilon=epsilon, delta=1e-5, max_grad_norm=1.0)
            assert 0 < plan.epsilon(1e-5) <= epsilon
