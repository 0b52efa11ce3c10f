"""A plan takes numbers that make sense, says which do not, and survives being written down."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import accountants
import dpdl
from dpdl.errors import ParameterError, PrivacyWarning

GOOD: dict[str, Any] = {
    "sample_rate": 0.25,
    "expected_batch_size": 100,
    "steps": 40,
    "noise_multiplier": 1.5,
    "max_grad_norm": 1.0,
}
REALS = ("sample_rate", "expected_batch_size", "noise_multiplier", "max_grad_norm")


def plan(**changes: Any) -> dpdl.PrivacyPlan:
    return dpdl.PrivacyPlan(**{**GOOD, **changes})


def loader(n: int, batch_size: int, **settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(n, 1)), batch_size=batch_size, **settings)


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        -1.0,
        -math.inf,
        "1.0",
        b"1",
        None,
        True,
        np.True_,
        torch.tensor(True),
        1j,
        [1.0],
        np.array([1.0, 2.0]),
        torch.tensor([1.0, 2.0]),
        10**400,
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:12]}",
)
def test_what_is_not_a_positive_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"{name} must be .* got"):
        plan(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.0000001),
        ("sample_rate", math.inf),
        ("expected_batch_size", 0.0),
        ("expected_batch_size", math.inf),
        ("noise_multiplier", math.inf),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -0.0),
    ],
)
def test_numbers_outside_their_range_are_refused_with_their_value(name: str, value: float) -> None:
    with pytest.raises(ParameterError, match=name) as caught:
        plan(**{name: value})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("name", ["steps", "dataset_size"])
@pytest.mark.parametrize(
    "value",
    [
        -1,
        1.0,
        1.5,
        math.nan,
        math.inf,
        "3",
        True,
        np.True_,
        np.float64(3),
        [3],
        np.array([3, 4]),
        torch.tensor(True),
        torch.tensor(3.0),
        torch.tensor([3, 4]),
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:12]}",
)
def test_what_is_not_a_count_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"{name} must be .* got"):
        plan(**{name: value})


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array, Fraction], ids=lambda k: k.__name__)
def test_scalars_of_other_libraries_are_taken_and_become_plain(name: str, kind: Any) -> None:
    value = 100.0 if name == "expected_batch_size" else 0.5
    got = getattr(plan(**{name: kind(value)}), name)
    assert got == value
    assert type(got) is float


@pytest.mark.parametrize("kind", [np.int32, np.uint8, torch.tensor], ids=lambda k: k.__name__)
def test_integers_of_other_libraries_are_taken_and_become_plain(kind: Any) -> None:
    got = plan(steps=kind(7)).steps
    assert got == 7
    assert type(got) is int


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clipping", "per_layer"),
        ("sampling", "shuffle"),
        ("noise", "laplace"),
        ("relation", "nearby"),
        ("relation", None),
        ("clipping", ["flat"]),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"{name} must be one of \("):
        plan(**{name: value})


def test_unbounded_clipping_needs_no_noise() -> None:
    assert plan(max_grad_norm=math.inf, noise_multiplier=0.0).max_grad_norm == math.inf
    with pytest.raises(ParameterError, match="finite max_grad_norm"):
        plan(max_grad_norm=math.inf)


def test_numbers_that_contradict_each_other_are_refused() -> None:
    plan(dataset_size=400)
    with pytest.raises(ParameterError, match=r"does not fit sample_rate 0\.25 of 1000 .* draws 250"):
        plan(dataset_size=1000)


def test_a_relation_is_taken_by_name_or_member() -> None:
    member = accountants.NeighboringRelation.ZERO_OUT
    assert plan(relation=member) == plan(relation="zero_out")


def test_replacing_an_example_costs_more_than_removing_one_at_the_same_noise() -> None:
    assert plan(relation="zero_out").epsilon(1e-5) == plan().epsilon(1e-5)
    assert plan(relation="replace_one").epsilon(1e-5) > 1.2 * plan().epsilon(1e-5)


def test_a_plan_cannot_be_changed_after_it_is_made() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().noise_multiplier = 0.0  # type: ignore[misc]


# ── epsilon and delta ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [None, 400])
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf, "1e-5", None, True, 1j])
def test_a_delta_that_is_no_probability_is_refused(delta: Any, size: int | None) -> None:
    for ask in (plan(dataset_size=size).epsilon, lambda d: plan(dataset_size=size).calibrated(epsilon=1.0, delta=d)):
        with pytest.raises(ParameterError, match="delta"):
            ask(delta)


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf, "3", True])
def test_a_budget_that_is_no_number_is_refused(epsilon: Any) -> None:
    with pytest.raises(ParameterError, match="epsilon"):
        plan().calibrated(epsilon=epsilon, delta=1e-5)


@pytest.mark.parametrize("delta", [1 / 400, 0.01, 0.5])
def test_a_delta_of_one_over_n_or_more_is_warned_of(delta: float) -> None:
    with pytest.warns(PrivacyWarning, match=r"1/n = 0\.0025 for 400"):
        plan(dataset_size=400).epsilon(delta)
    with pytest.warns(PrivacyWarning, match="smaller delta"):
        plan(dataset_size=400).calibrated(epsilon=1.0, delta=delta)


def test_a_smaller_delta_is_not_warned_of() -> None:
    assert plan(dataset_size=400).epsilon(1 / 401) > 0  # warnings of this kind are errors in this suite


def test_epsilon_is_the_accountants_and_bounds_go_round_it() -> None:
    bounds = plan().interval(1e-5)
    assert plan().epsilon(1e-5) == bounds.upper >= bounds.lower >= 0
    assert bounds.upper == accountants.epsilon(noise_multiplier=1.5, sample_rate=0.25, steps=40, delta=1e-5)


def test_no_noise_is_no_privacy_and_no_steps_cost_nothing() -> None:
    assert plan(noise_multiplier=0.0).epsilon(1e-5) == math.inf
    assert plan(steps=0).epsilon(1e-5) == 0.0


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
def test_a_calibrated_plan_keeps_its_budget_and_wastes_little(target: float) -> None:
    calibrated = plan().calibrated(epsilon=target, delta=1e-5)
    assert 0.98 * target <= calibrated.epsilon(1e-5) <= target
    assert dataclasses.replace(calibrated, noise_multiplier=1.5) == plan()


def test_the_event_is_that_of_the_plan_or_of_its_beginning() -> None:
    one = accountants.PoissonSampled(0.25, accountants.Gaussian(1.5))
    assert plan().event() == one * 40
    assert plan().event(3) == one * 3


# ── from a loader ───────────────────────────────────────────────────────────────────────────────────


@given(n=st.integers(1, 10_000), batch_size=st.integers(1, 12_000), epochs=st.integers(1, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_loaders_plan_comes_from_integers(n: int, batch_size: int, epochs: int) -> None:
    """The rate is the nearest double to batch / n: not that of a rounded number of steps (930 / 10 is 93)."""
    made = dpdl.PrivacyPlan.for_loader(loader(n, batch_size), epochs=epochs, noise_multiplier=1.0, max_grad_norm=1.0)
    drawn = min(n, batch_size)
    assert made.sample_rate == float(Fraction(drawn, n))
    assert made.expected_batch_size == drawn
    assert made.steps == epochs * math.ceil(n / batch_size)
    assert made.dataset_size == n


def test_the_last_incomplete_batch_counts_as_a_step_unless_it_is_dropped() -> None:
    def steps(**settings: Any) -> int:
        made = dpdl.PrivacyPlan.for_loader(loader(10, 4, **settings), epochs=1, noise_multiplier=1.0, max_grad_norm=1.0)
        return made.steps

    assert (steps(), steps(drop_last=True)) == (3, 2)


def test_a_loaders_budget_becomes_noise() -> None:
    made = dpdl.PrivacyPlan.for_loader(loader(1000, 50), epochs=2, epsilon=2.0, delta=1e-5, max_grad_norm=1.0)
    assert 1.95 <= made.epsilon(1e-5) <= 2.0


@pytest.mark.parametrize(
    "given_",
    [
        {"noise_multiplier": 1.0},
        {"epochs": 1, "steps": 3, "noise_multiplier": 1.0},
        {"epochs": 1},
        {"epochs": 1, "epsilon": 3.0},
        {"epochs": 1, "delta": 1e-5},
        {"epochs": 1, "epsilon": 3.0, "delta": 1e-5, "noise_multiplier": 1.0},
        {"epochs": 1, "delta": 1e-5, "noise_multiplier": 1.0},
        {"epochs": 0, "noise_multiplier": 1.0},
        {"epochs": 1.5, "noise_multiplier": 1.0},
        {"epochs": "2", "noise_multiplier": 1.0},
        {"steps": -1, "noise_multiplier": 1.0},
    ],
    ids=str,
)
def test_too_few_or_too_many_alternatives_are_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=r"epochs|steps|epsilon and delta"):
        dpdl.PrivacyPlan.for_loader(loader(10, 2), max_grad_norm=1.0, **given_)


# ── on paper ────────────────────────────────────────────────────────────────────────────────────────


@given(
    rate=st.floats(1e-6, 1.0),
    sigma=st.floats(0.0, 1e3),
    clip=st.floats(1e-6, 1e6),
    steps=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_json_gives_the_same_plan_again(rate: float, sigma: float, clip: float, steps: int) -> None:
    made = plan(sample_rate=rate, noise_multiplier=sigma, max_grad_norm=clip, steps=steps)
    assert dpdl.PrivacyPlan.from_json(made.to_json()) == made


def test_json_gives_the_same_plan_again_without_clipping() -> None:
    made = plan(max_grad_norm=math.inf, noise_multiplier=0.0)
    assert dpdl.PrivacyPlan.from_json(made.to_json()) == made
    json.loads(made.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def as_json(**changes: Any) -> str:
    return json.dumps({**json.loads(plan().to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "{}",
        as_json(schema="dpdl.plan/2"),
        as_json(schema=None),
        as_json(unknown=1),
        as_json(steps=-1),
        as_json(steps=2.5),
        as_json(noise_multiplier="1"),
        as_json(noise_multiplier=True),
        plan().to_json().replace("steps", "step"),
        None,
        3,
    ],
)
def test_what_is_not_a_plan_is_refused(text: Any) -> None:
    with pytest.raises(ParameterError):
        dpdl.PrivacyPlan.from_json(text)


def test_a_plan_reads_as_a_sentence() -> None:
    text = str(plan(dataset_size=400, steps=1234))
    assert text.startswith("1,234 steps; each draws every example independently with probability 0.25 (100 of 400")
    for words in ("L2 norm 1 ", "noise of 1.5 times", "adding or removing one example."):
        assert words in text
