"""The package prv_accountant behind our interface: it agrees with us, and its limits are refused by name."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pytest

from accountants import Gaussian, Laplace, NeighboringRelation, PoissonSampled, PRVAccountant
from accountants.engines.prv_package import EPSILON_ERROR, LEAST_DELTA, delta_interval, epsilon_interval
from accountants.errors import PrivacyError, UnsupportedEventError
from accountants.events import Event
from accountants.reduction.normal_form import NormalForm, normal_form


def form_of(event: Event, relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE) -> NormalForm:
    return normal_form(event, relation)


def step(rate: float, noise_multiplier: float) -> Event:
    return PoissonSampled(rate, Gaussian(noise_multiplier))


PLANS: list[tuple[Event, float]] = [
    (step(0.01, 1.0) * 1000, 1e-5),
    (step(0.001, 0.6) * 3000, 1e-6),
    (step(0.5, 5.0) * 300, 1e-9),
    (step(1e-5, 0.5) * 1000, 1e-6),
    (Gaussian(10.0) * 100, 1e-6),
    (Gaussian(2.0) + step(0.01, 1.2) * 1000, 1e-5),
    (step(0.01, 3.0) * 500 + step(0.01, 2.0) * 500 + step(0.02, 1.5) * 100, 1e-5),
    (step(0.999, 0.1) * 3, 1e-5),
]


@pytest.fixture(autouse=True)
def _needs_the_package(request: pytest.FixtureRequest) -> None:
    if "absent" not in request.node.name:
        pytest.importorskip("prv_accountant")


@pytest.mark.parametrize(("event", "delta"), PLANS, ids=lambda value: str(value)[:60])
def test_its_interval_contains_ours_and_is_as_wide_as_its_error(event: Event, delta: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower, upper = epsilon_interval(form_of(event), delta)
    low, high = PRVAccountant().compose(event).interval(delta)
    assert lower <= low + 1e-9
    assert high - 1e-9 <= upper
    assert upper - lower <= 2.5 * EPSILON_ERROR


@pytest.mark.parametrize("wrong", [0.9, 1.1])
def test_its_interval_would_show_a_wrong_noise_scale(wrong: float) -> None:
    lower, upper = epsilon_interval(form_of(step(0.01, 1.0) * 3000), 1e-5)
    epsilon = PRVAccountant().compose(step(0.01, wrong), 3000).epsilon(1e-5)
    assert not lower <= epsilon <= upper


def test_delta_interval_contains_ours() -> None:
    event = step(0.01, 1.0) * 1000
    lower, upper = delta_interval(form_of(event), 1.5)
    low, high = PRVAccountant().compose(event).delta_interval(1.5)
    assert 0 < lower <= low
    assert high <= upper < 1


def test_replacement_without_sampling_is_a_gaussian_with_half_the_noise() -> None:
    replaced = epsilon_interval(form_of(Gaussian(4.0), NeighboringRelation.REPLACE_ONE), 1e-5)
    assert replaced == epsilon_interval(form_of(Gaussian(2.0)), 1e-5)


@pytest.mark.parametrize(
    ("event", "delta", "reason"),
    [
        (Laplace(2.0) * 10, 1e-5, "knows Gaussian noise"),
        (step(0.01, 1.0) * 10 + PoissonSampled(0.1, Laplace(2.0)), 1e-5, "knows Gaussian noise"),
        (step(0.01, 1.0) * 10, LEAST_DELTA / 2, "not reliable below delta"),
        (step(0.01, 0.05) * 10, 1e-5, "noise between 0.1 and 1000"),
        (step(0.01, 2000.0) * 10, 1e-5, "noise between 0.1 and 1000"),
        (step(0.5, 1.0) * 10_000, 1e-5, "mesh of .* points"),
        (step(1e-3, 1.0) * 10**9, 1e-5, "mesh of .* points"),
        (step(0.37, 0.13) * 72, 1e-5, "Discrete mean differs"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason_and_the_remedy(event: Event, delta: float, reason: str) -> None:
    with pytest.raises(UnsupportedEventError, match=rf"'prv-accountant' .*{reason}.* Use the default engine\."):
        epsilon_interval(form_of(event), delta)


def test_delta_interval_refuses_what_epsilon_interval_refuses() -> None:
    with pytest.raises(UnsupportedEventError, match="knows Gaussian noise"):
        delta_interval(form_of(Laplace(2.0) * 10), 1.0)


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Discrete mean differs from continuous mean significantly."),
        ValueError("Floating point errors will dominate for such small values of delta."),
        IndexError("index 10 is out of bounds"),
    ],
)
def test_its_own_failures_are_quoted(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("prv_accountant.PRVAccountant.compute_epsilon", fail)
    with pytest.raises(UnsupportedEventError, match=str(failure).rstrip(".")) as caught:
        epsilon_interval(form_of(step(0.01, 1.0) * 10), 1e-5)
    assert caught.value.__cause__ is failure


def test_doubts_of_its_quadrature_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubt(*_: Any, **__: Any) -> tuple[float, float, float]:
        warnings.warn_explicit("slowly convergent", UserWarning, "file.py", 1, module="prv_accountant.accountant")
        return 1.0, 1.0, 1.0

    monkeypatch.setattr("prv_accountant.PRVAccountant.compute_epsilon", doubt)
    with pytest.raises(UnsupportedEventError, match=r"gave up: slowly convergent\. Use"):
        epsilon_interval(form_of(step(0.01, 1.0) * 10), 1e-5)


def test_bounds_that_are_no_interval_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prv_accountant.PRVAccountant.compute_epsilon", lambda *_, **__: (np.nan, np.nan, np.nan))
    with pytest.raises(UnsupportedEventError, match="returned"):
        epsilon_interval(form_of(step(0.01, 1.0) * 10), 1e-5)


def test_a_machine_without_80_bit_floats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    double = np.finfo(np.float64)
    monkeypatch.setattr("accountants.engines.prv_package.np.finfo", lambda _: double)
    with pytest.raises(UnsupportedEventError, match="long double"):
        epsilon_interval(form_of(step(0.01, 1.0) * 10_000), 1e-9)


def test_numpy_counts_are_taken() -> None:
    event = step(0.01, 1.0)
    low, high = epsilon_interval(form_of(event * np.int64(100)), 1e-5)  # type: ignore[arg-type]
    assert (low, high) == epsilon_interval(form_of(event * 100), 1e-5)


def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prv_accountant", None)
    with pytest.raises(PrivacyError, match="pip install prv-accountant"):
        epsilon_interval(form_of(step(0.01, 1.0) * 10), 1e-5)
