"""A budget allows what the accountant says it does, to the last release, and no more; and says so quickly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    NeighboringRelation,
    PoissonSampled,
    PrivacyFilter,
    PRVAccountant,
)
from dpdl.budget import Allowance, Budget
from dpdl.errors import BudgetExceededError, ParameterError
from dpdl.ledger import Ledger

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE
STEP, OTHER, MEAN = PoissonSampled(0.05, Gaussian(1.3)), PoissonSampled(0.1, Gaussian(2.0)), Gaussian(15.0)
BUDGET = Budget(epsilon=1.0, delta=1e-5)


def epsilon_of(counts: dict[Event, int]) -> float:
    return PRVAccountant().compose(Composed([event * n for event, n in counts.items()])).epsilon(1e-5)


def ledger(**settings: Any) -> Ledger:
    return Ledger(relation=ADD_OR_REMOVE, **{"budget": BUDGET, **settings})


def record_while_it_fits(ledger: Ledger, event: Event) -> int:
    count = 0
    while ledger.fits(event):
        ledger.record(event)
        count += 1
    return count


# ── the value ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"epsilon": "3"}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": None}, "delta"),
        ({"adaptive": 1}, "adaptive"),
        ({"order": 8.0}, "order"),
        ({"adaptive": True, "order": 1.0}, "order"),
        ({"adaptive": True, "order": 1.01}, "order"),
    ],
)
def test_nonsense_is_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ParameterError, match=word):
        Budget(**{"epsilon": 1.0, "delta": 1e-5, **values})


@pytest.mark.parametrize("budget", [BUDGET, Budget(epsilon=2, delta=1e-6, adaptive=True, order=20.0)])
def test_a_budget_reads_back(budget: Budget) -> None:
    assert Budget.from_dict(budget.to_dict()) == budget


@pytest.mark.parametrize("values", [None, 3, {}, {"epsilon": 1.0}, {**BUDGET.to_dict(), "more": 1}])
def test_what_is_not_a_budget_is_refused(values: object) -> None:
    with pytest.raises(ParameterError):
        Budget.from_dict(values)


def test_stricter_is_stricter_in_everything() -> None:
    adaptive = Budget(epsilon=1.0, delta=1e-5, adaptive=True)
    assert BUDGET.is_at_least_as_strict_as(BUDGET)
    assert adaptive.is_at_least_as_strict_as(BUDGET)
    assert not BUDGET.is_at_least_as_strict_as(adaptive)
    assert not Budget(epsilon=1.0, delta=1e-5, adaptive=True, order=30.0).is_at_least_as_strict_as(adaptive)
    assert Budget(epsilon=0.9, delta=1e-6).is_at_least_as_strict_as(BUDGET)
    assert not Budget(epsilon=0.9, delta=1e-4).is_at_least_as_strict_as(BUDGET)
    assert not Budget(epsilon=1.1, delta=1e-6).is_at_least_as_strict_as(BUDGET)


# ── what fits ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("event", [STEP, OTHER, MEAN, Laplace(20.0)])
def test_exactly_as_many_releases_fit_as_the_accountant_allows(event: Event) -> None:
    book = ledger()
    count = record_while_it_fits(book, event)
    assert epsilon_of({event: count}) <= 1.0 < epsilon_of({event: count + 1})
    assert ledger().remaining(event) == count > 3


@given(
    order=st.lists(st.sampled_from([STEP, OTHER, MEAN]), min_size=1, max_size=10),
    epsilon=st.floats(0.3, 0.8),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_in_any_order_nothing_is_overspent_and_nothing_is_refused_that_fits(order: list[Event], epsilon: float) -> None:
    """The oracle computes epsilon anew for each release."""
    book = ledger(budget=Budget(epsilon=epsilon, delta=1e-5))
    counts: dict[Event, int] = {}
    for event in order * 4:
        after = {**counts, event: counts.get(event, 0) + 1}
        fits = epsilon_of(after) <= epsilon
        assert book.fits(event) is fits
        if fits:
            book.record(event)
            counts = after
        else:
            before = book.to_json()
            with pytest.raises(BudgetExceededError):
                book.record(event)
            assert book.to_json() == before


def test_a_release_without_noise_never_fits() -> None:
    with pytest.raises(BudgetExceededError, match="inf"):
        ledger().record(Gaussian(0.0))


def test_the_error_says_what_is_spent_what_was_asked_what_there_is_and_what_to_do() -> None:
    book = ledger()
    count = record_while_it_fits(book, MEAN)
    with pytest.raises(BudgetExceededError) as caught:
        book.record(MEAN)
    text = str(caught.value)
    for word in ("epsilon 1 at delta 1e-05", f"{epsilon_of({MEAN: count}):.6g} is spent", "Gaussian", "15.0"):
        assert word in text
    for word in (f"{epsilon_of({MEAN: count + 1}):.6g}", "Nothing was released or recorded", "Publish what there is"):
        assert word in text


def test_a_long_run_computes_epsilon_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    allows = Budget.allows

    def counted(self: Budget, counts: Any, relation: Any) -> bool:
        asked.append(1)
        return allows(self, counts, relation)

    monkeypatch.setattr(Budget, "allows", counted)
    book = ledger(budget=Budget(epsilon=3.0, delta=1e-5))
    count = record_while_it_fits(book, PoissonSampled(0.01, Gaussian(1.0)))
    assert count > 2000
    assert len(asked) < 60


def test_two_kinds_that_alternate_compute_epsilon_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    allows = Budget.allows

    def counted(self: Budget, counts: Any, relation: Any) -> bool:
        asked.append(1)
        return allows(self, counts, relation)

    monkeypatch.setattr(Budget, "allows", counted)
    book, taken = ledger(budget=Budget(epsilon=3.0, delta=1e-5)), 0
    for event in itertools.cycle([STEP, OTHER]):
        if not book.fits(event):
            break
        book.record(event)
        taken += 1
    assert taken > 150
    assert len(asked) < taken


def test_what_is_below_a_corner_needs_no_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    allowance = Allowance(BUDGET, ADD_OR_REMOVE)
    assert allowance.fits({}, STEP)
    monkeypatch.setattr(Budget, "allows", lambda *_: pytest.fail("computed"))
    assert allowance.fits({STEP: 10}, STEP)
    assert allowance.covers({STEP: 10})
    assert not allowance.covers({STEP: 10, OTHER: 1})


def test_a_corner_that_does_not_know_others_releases_is_not_used() -> None:
    """As many steps as fit alone do not fit beside what others have released since."""
    allowance = Allowance(BUDGET, ADD_OR_REMOVE)
    alone = allowance.remaining({}, STEP)
    assert allowance.fits({}, STEP)
    others = {MEAN: ledger().remaining(MEAN)}
    assert not allowance.fits({**others, STEP: alone // 2}, STEP)


# ── adaptive budgets ────────────────────────────────────────────────────────────────────────────────


def test_an_adaptive_budget_is_the_filters() -> None:
    order = PrivacyFilter(epsilon=1.0, delta=1e-5, planned=STEP * 100).order
    budget = Budget(epsilon=1.0, delta=1e-5, adaptive=True, order=order)
    keeper = PrivacyFilter(epsilon=1.0, delta=1e-5, order=order)
    expected = 0
    while keeper.request(STEP):
        expected += 1
    count = record_while_it_fits(ledger(budget=budget), STEP)
    assert abs(count - expected) <= 1  # sums are rounded up, in another order
    assert 0 < count < ledger().remaining(STEP)  # type: ignore[operator]


# ── ledgers within ledgers ──────────────────────────────────────────────────────────────────────────


def test_the_narrower_budget_refuses_and_neither_ledger_changes() -> None:
    wide, narrow = Budget(epsilon=1.0, delta=1e-5), Budget(epsilon=0.5, delta=1e-5)
    for outer_budget, inner_budget in ((wide, narrow), (narrow, wide), (narrow, None), (None, narrow)):
        outer = ledger(budget=outer_budget)
        inner = ledger(budget=inner_budget, within=outer, run="a")
        record_while_it_fits(inner, STEP)
        assert inner.releases == outer.releases == ledger(budget=narrow).remaining(STEP)
        assert inner.remaining(STEP) == 0
        before = (outer.to_json(), inner.to_json())
        with pytest.raises(BudgetExceededError):
            inner.record(STEP)
        assert (outer.to_json(), inner.to_json()) == before


def test_runs_in_one_ledger_add_up() -> None:
    data = ledger()
    runs = [ledger(budget=None, within=data, run=name) for name in ("a", "b")]
    for run in runs:
        run.record(STEP)
        run.record(MEAN, label="mean")
    assert [(e.run, e.label, e.count) for e in data.entries] == [
        ("a", "step", 1),
        ("a", "mean", 1),
        ("b", "step", 1),
        ("b", "mean", 1),
    ]
    assert data.epsilon(1e-5) == epsilon_of({STEP: 2, MEAN: 2}) > runs[0].epsilon(1e-5)
    assert runs[0].count("mean") == 1
    assert data.runs == ("a", "b")
