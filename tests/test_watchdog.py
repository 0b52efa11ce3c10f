"""The watchdog reports, saves and stops; nothing is overspent, whatever the loop does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from accountants import Gaussian, NeighboringRelation, PoissonSampled
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, LedgerError, ParameterError, PlanExhaustedError, WrapError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.watchdog import Spending, Watchdog
from tests.small_run import examples, network, refused, same, train_on, weights_of

DELTA = 1e-3
STEPS = 12
EVENT = PoissonSampled(0.5, Gaussian(2.0))


def spent_by(steps: int) -> float:
    book = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE)
    for _ in range(steps):
        book.record(EVENT)
    return book.epsilon(DELTA)


BUDGET = Budget(epsilon=spent_by(5), delta=DELTA)  # for five steps of the twelve


def watched(watchdog: Watchdog | None, *, physical: int | None = None, **more: Any) -> dpdl.Private:
    model = network()
    loader = DataLoader(TensorDataset(*examples()), batch_size=6, shuffle=True)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=STEPS, noise_multiplier=2.0, max_grad_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    execution = dpdl.Execution(insecure_seed=3, max_physical_batch_size=physical, accumulate_dtype=torch.float64)
    return dpdl.make_private(model, optimizer, loader, plan, execution=execution, watchdog=watchdog, **more)


def train(private: dpdl.Private) -> None:
    while private.optimizer.steps_taken < STEPS:
        for batch in private.loader:
            train_on(private, batch)


@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("where", ["watchdog", "ledger", "file"])
def test_the_run_stops_after_the_last_step_that_fits_and_is_saved(
    tmp_path: Path, where: str, physical: int | None
) -> None:
    path = tmp_path / "last.pt"
    ledger: Ledger | LedgerFile | None = None
    if where == "ledger":
        ledger = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=BUDGET)
    elif where == "file":
        ledger = LedgerFile(tmp_path / "data.ledger", budget=BUDGET)
    watchdog = Watchdog(budget=BUDGET if where == "watchdog" else None, save_to=path)
    private = watched(watchdog, ledger=ledger, physical=physical)
    with pytest.raises(BudgetExceededError, match=r"step 5 of 12.*saved in .*last\.pt"):
        train(private)
    assert watchdog.stopped
    assert private.optimizer.steps_taken == 5
    assert private.optimizer.epsilon(DELTA) <= BUDGET.epsilon
    assert same(dict(torch.load(path, weights_only=True)["model"]), weights_of(private.model))


def test_a_loop_that_ignores_the_flag_is_refused(tmp_path: Path) -> None:
    watchdog = Watchdog(budget=BUDGET, when_spent="flag", save_to=tmp_path / "last.pt")
    private = watched(watchdog)
    batches = iter(private.loader)
    while not watchdog.stopped:
        try:
            train_on(private, next(batches))
        except StopIteration:
            batches = iter(private.loader)
    assert private.optimizer.steps_taken == 5
    with refused(private, BudgetExceededError, "step 5 of 12", "last.pt"):
        train(private)


def test_without_a_watchdog_the_ledger_refuses_all_the_same() -> None:
    private = watched(None, ledger=Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=BUDGET))
    with pytest.raises(BudgetExceededError, match="One more release would overspend"):
        train(private)
    assert private.optimizer.steps_taken == 5
    assert private.optimizer.epsilon(DELTA) <= BUDGET.epsilon


def test_what_others_spend_in_between_stops_the_run_too(tmp_path: Path) -> None:
    path = tmp_path / "data.ledger"
    ledger, other = LedgerFile(path, budget=BUDGET), LedgerFile(path)
    watchdog = Watchdog(save_to=tmp_path / "last.pt")
    private = watched(watchdog, ledger=ledger)
    batches = iter(private.loader)
    train_on(private, next(batches))
    for _ in range(4):
        other.record(EVENT, run="other")
    with pytest.raises(BudgetExceededError):
        train_on(private, next(batches))
    assert private.optimizer.steps_taken == 1
    assert ledger.epsilon(DELTA) <= BUDGET.epsilon
    assert (tmp_path / "last.pt").exists()


def test_a_run_that_ends_with_its_plan_is_not_stopped(tmp_path: Path) -> None:
    watchdog = Watchdog(budget=Budget(epsilon=spent_by(STEPS), delta=DELTA), save_to=tmp_path / "last.pt")
    private = watched(watchdog)
    train(private)
    assert not watchdog.stopped
    assert not (tmp_path / "last.pt").exists()
    with pytest.raises(PlanExhaustedError):
        iter(private.loader)


def test_it_reports_as_it_goes() -> None:
    seen: list[Spending] = []
    train(watched(Watchdog(delta=DELTA, every=4, report=seen.append)))
    assert [report.step for report in seen] == [4, 8, 12]
    assert [report.epsilon for report in seen] == [spent_by(step) for step in (4, 8, 12)]
    assert str(seen[0]).startswith("step 4 of 12: epsilon <= ")


def test_it_reports_when_a_share_of_the_budget_is_spent() -> None:
    seen: list[Spending] = []
    watchdog = Watchdog(budget=BUDGET, fractions=(0.7, 0.5, 0.51), when_spent="flag", report=seen.append)
    private = watched(watchdog)
    with pytest.raises(BudgetExceededError):
        train(private)
    shares = [report.spent / BUDGET.epsilon for report in seen]
    first = [next(step for step in range(1, 6) if spent_by(step) >= f * BUDGET.epsilon) for f in (0.5, 0.51, 0.7)]
    assert [report.step for report in seen] == [*sorted(set(first)), 5]
    assert shares == sorted(shares)
    assert [report.last for report in seen] == [False] * (len(seen) - 1) + [True]
    assert "no further step fits" in str(seen[-1])


def test_what_counts_against_a_shared_budget_is_what_all_have_spent(tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "data.ledger", budget=BUDGET)
    ledger.record(EVENT, run="other")
    seen: list[Spending] = []
    private = watched(Watchdog(every=1, report=seen.append), ledger=ledger)
    train_on(private, next(iter(private.loader)))
    assert (seen[0].epsilon, seen[0].spent) == (spent_by(1), spent_by(2))
    assert f"of a budget of {BUDGET.epsilon:g}" in str(seen[0])


def test_by_default_reports_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    private = watched(Watchdog(budget=BUDGET, every=2, fractions=()))
    with caplog.at_level(logging.INFO, "dpdl.watchdog"), pytest.raises(BudgetExceededError):
        train(private)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert "step 5 of 12" in caplog.text


def test_a_checkpoint_that_could_not_be_written_is_not_said_to_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "not yet"
    watchdog = Watchdog(budget=BUDGET, save_to=folder / "last.pt")
    private = watched(watchdog)
    for _ in range(2):
        with pytest.raises(BudgetExceededError, match=r"could NOT be saved \(.*last\.pt could not be written"):
            train(private)
    folder.mkdir()  # and the next time it is tried again
    with pytest.raises(BudgetExceededError, match=r"is saved in .*last\.pt"):
        train(private)
    assert (folder / "last.pt").exists()


def test_a_full_disk_does_not_end_a_run_that_asks_the_flag(tmp_path: Path) -> None:
    watchdog = Watchdog(budget=BUDGET, when_spent="flag", save_to=tmp_path / "nowhere" / "last.pt")
    private = watched(watchdog)
    for batch in (b for _ in range(3) for b in private.loader):
        train_on(private, batch)
        if watchdog.stopped:
            break
    assert private.optimizer.steps_taken == 5


def test_a_scheduler_is_saved_along(tmp_path: Path) -> None:
    watchdog = Watchdog(budget=BUDGET, save_to=tmp_path / "last.pt")
    private = watched(watchdog)
    watchdog.scheduler = torch.optim.lr_scheduler.StepLR(private.optimizer, 2)
    with pytest.raises(BudgetExceededError):
        train(private)
    again = watched(None)
    scheduler = torch.optim.lr_scheduler.StepLR(again.optimizer, 2)
    dpdl.load_checkpoint(tmp_path / "last.pt", again.model, again.optimizer, scheduler=scheduler)
    assert again.optimizer.steps_taken == 5


def test_it_can_be_attached_later_and_once() -> None:
    private = watched(None)
    watchdog = Watchdog(budget=BUDGET)
    with pytest.raises(WrapError, match="no run"):
        watchdog.spending()
    watchdog.attach(private.model, private.optimizer)
    with pytest.raises(WrapError, match="already"):
        watchdog.attach(private.model, private.optimizer)
    with pytest.raises(BudgetExceededError):
        train(private)
    assert private.optimizer.steps_taken == 5


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"when_spent": "shout"}, "when_spent"),
        ({"budget": 3.0}, "budget"),
        ({"fractions": (0.5, 1.5)}, "fractions"),
        ({"fractions": ("a",)}, "fractions"),
        ({"fractions": 0.5}, "fractions"),
        ({"every": 0}, "every"),
        ({"delta": 2.0}, "delta"),
    ],
)
def test_nonsense_is_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(ParameterError, match=word):
        Watchdog(**values)


def test_a_watchdog_without_a_budget_or_delta_is_refused() -> None:
    with pytest.raises(ParameterError, match="neither a budget nor a delta"):
        watched(Watchdog())
    with pytest.raises(ParameterError, match="no other delta"):
        watched(Watchdog(budget=BUDGET, delta=1e-4))
    with pytest.raises(WrapError, match="watchdog"):
        watched("a dog")  # type: ignore[arg-type]


def test_a_ledger_of_another_kind_or_relation_is_refused() -> None:
    with pytest.raises(WrapError, match="LedgerFile"):
        watched(None, ledger="data.ledger")
    with pytest.raises(LedgerError, match="relation='replace_one'"):
        watched(None, ledger=Ledger(relation=NeighboringRelation.REPLACE_ONE, budget=BUDGET))
