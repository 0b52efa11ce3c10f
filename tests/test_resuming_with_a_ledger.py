"""Resuming a run whose dataset's ledger outlives it: spending is kept, budgets are kept, and the file is the same."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from accountants import Composed, Gaussian, NeighboringRelation, PRVAccountant
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, CheckpointError, LedgerError, PlanExhaustedError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.run_state import STEP, RunState
from dpdl.secure_random import RandomStream
from tests.small_run import examples, network, same, train_on, weights_of

STEPS = 9
BUDGET = Budget(epsilon=40.0, delta=1e-5)
MEAN = Gaussian(20.0)


def start(ledger: Any = None, *, seed: int | None = 3, **more: Any) -> dpdl.Private:
    model = network()
    loader = DataLoader(TensorDataset(*examples()), batch_size=4, shuffle=True)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=STEPS, noise_multiplier=1.0, max_grad_norm=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    execution = dpdl.Execution(engine="loop", insecure_seed=seed, accumulate_dtype=torch.float64, self_check=False)
    return dpdl.make_private(model, optimizer, loader, plan, execution=execution, ledger=ledger, **more)


def train(private: dpdl.Private, until: int) -> dpdl.Private:
    while private.optimizer.steps_taken < until:
        for batch in private.loader:
            train_on(private, batch)
            if private.optimizer.steps_taken == until:
                break
    return private


def saved(path: Path, private: dpdl.Private) -> Path:
    dpdl.save_checkpoint(path, private.model, private.optimizer)
    return path


def loaded(path: Path, private: dpdl.Private) -> dpdl.Private:
    dpdl.load_checkpoint(path, private.model, private.optimizer)
    return private


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.ledger"


def test_a_run_in_a_file_says_what_it_spent_and_what_all_have_spent(file: Path) -> None:
    ledger = LedgerFile(file, budget=BUDGET)
    ledger.record(MEAN, label="mean", run="statistics")
    private = train(start(ledger, run_name="trial"), 3)
    report = private.optimizer.report(1e-5)
    assert report.steps == 3
    assert report.epsilon == private.optimizer.epsilon(1e-5) < report.dataset_epsilon == ledger.epsilon(1e-5)
    assert "data.ledger has 2 runs on this data, which together spent epsilon <= " in str(report)
    assert "of a budget of epsilon 40 at delta 1e-05" in str(report)
    assert ledger.runs[0] == "statistics"
    assert ledger.runs[1].startswith("trial ")
    assert start().optimizer.report(1e-5).dataset_epsilon is None


def test_an_adaptive_budgets_claim_is_the_budget(file: Path) -> None:
    private = train(start(LedgerFile(file, budget=Budget(epsilon=40.0, delta=1e-5, adaptive=True))), 1)
    assert "the claim of all together is the budget, epsilon 40 at delta 1e-05, adaptive" in str(
        private.optimizer.report(1e-5)
    )
    assert private.optimizer.report(1e-5).dataset_epsilon == private.optimizer.report(1e-4).dataset_epsilon == 40.0
    assert private.optimizer.report(1e-6).dataset_epsilon == math.inf


def test_a_run_that_was_ended_early_says_what_it_may_claim_if_that_was_for_how_it_looked() -> None:
    private = train(start(), 3)
    private.optimizer.ledger.record(MEAN, label="mean")
    report = private.optimizer.report(1e-5)
    whole = PRVAccountant().compose(Composed([private.optimizer.plan.event(), MEAN])).epsilon(1e-5)
    assert report.planned_epsilon == pytest.approx(whole)
    assert any("all 9 planned steps, epsilon <= " in assumption for assumption in report.assumptions)
    train(private, STEPS)
    report = private.optimizer.report(1e-5)
    assert report.planned_epsilon == report.epsilon
    assert "the number of steps was fixed in advance" in report.assumptions


def test_what_is_released_besides_steps_is_in_the_report_and_is_no_step(file: Path) -> None:
    ledger = LedgerFile(file)
    private = train(start(ledger), 2)
    private.optimizer.ledger.record(MEAN, label="mean")
    report = private.optimizer.report(1e-5)
    assert report.steps == 2
    assert "besides steps: 1 x Gaussian(noise_multiplier=20.0) (mean)" in str(report)
    assert report.epsilon == report.dataset_epsilon == ledger.epsilon(1e-5)


def test_a_repeated_insecure_run_counts_once_and_a_secure_one_twice(tmp_path: Path, file: Path) -> None:
    for seed, expected, next_step in ((3, 6, 4), (None, 9, 6)):
        path = file.with_name(f"{seed}.ledger")
        first = start(LedgerFile(path), seed=seed)
        train(first, 4)
        checkpoint = saved(tmp_path / "run.pt", first)
        train(first, 6)  # and is killed
        ledger = LedgerFile(path)
        second = loaded(checkpoint, start(ledger, seed=seed))
        assert second.optimizer.ledger.count(STEP) == next_step
        train(second, next_step + (2 if seed else 3))
        assert ledger.releases == expected
        assert len(ledger.runs) == 1


def test_a_run_that_was_saved_before_its_first_step_keeps_its_identity(tmp_path: Path, file: Path) -> None:
    """Killed between there and the next checkpoint, it repeats its steps: they must have the same address."""
    checkpoint = saved(tmp_path / "run.pt", start(LedgerFile(file)))
    for _ in range(3):
        train(loaded(checkpoint, start(LedgerFile(file))), 2)
    assert LedgerFile(file).releases == 2


def test_a_run_that_gave_reservations_back_goes_on(tmp_path: Path, file: Path) -> None:
    for until in (2, 4, 6):
        with LedgerFile(file, reserve=4) as ledger:
            private = start(ledger, seed=None)
            if until > 2:
                loaded(tmp_path / "run.pt", private)
            train(private, until)
            saved(tmp_path / "run.pt", private)
    assert LedgerFile(file).releases == 6


def test_an_insecure_run_resumed_in_a_file_is_the_uninterrupted_one(tmp_path: Path, file: Path) -> None:
    whole = train(start(LedgerFile(tmp_path / "other.ledger")), STEPS)
    first = train(start(LedgerFile(file)), 4)
    checkpoint = saved(tmp_path / "run.pt", first)
    train(first, 7)
    second = train(loaded(checkpoint, start(LedgerFile(file))), STEPS)
    assert same(weights_of(whole.model), weights_of(second.model))
    assert whole.optimizer.ledger.to_json() == second.optimizer.ledger.to_json()


def test_a_run_without_a_file_is_taken_into_one(tmp_path: Path, file: Path) -> None:
    checkpoint = saved(tmp_path / "run.pt", train(start(), 4))
    ledger = LedgerFile(file)
    second = loaded(checkpoint, start(ledger))
    assert ledger.releases == 4
    train(second, 5)
    loaded(checkpoint, start(ledger))
    assert ledger.releases == 5


def test_going_back_within_a_live_run_forgets_nothing(tmp_path: Path, file: Path) -> None:
    for seed in (3, None):
        ledger = LedgerFile(file.with_name(f"{seed}.ledger"), reserve=4)
        private = train(start(ledger, seed=seed), 2)
        checkpoint = saved(tmp_path / "run.pt", private)
        train(private, 5)
        loaded(checkpoint, private)
        assert private.optimizer.ledger.releases == 5
        train(private, 6)
        assert ledger.entries[0].count >= 6


# ── the state of a run ──────────────────────────────────────────────────────────────────────────────


def test_asking_whether_a_step_is_allowed_spends_nothing_of_the_run_and_holds_the_step(file: Path) -> None:
    plan = start().optimizer.plan
    ledger = LedgerFile(file, budget=BUDGET)
    own = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, within=ledger, run="a")
    run = RunState(plan, randomness=RandomStream.from_os(), ledger=own)
    for step in range(plan.steps):
        for _ in range(2):
            run.refuse_overspending()
        assert (run.steps_taken, ledger.releases) == (step, 2 * step + 1)
        assert run.next_step() == step
        own.record(MEAN, label="mean")
        assert run.steps_taken == step + 1
        ledger = LedgerFile(file)
        assert ledger.releases == 2 * (step + 1)
        own.within = ledger
    before = own.to_json()
    with pytest.raises(PlanExhaustedError, match="steps are taken"):
        run.refuse_overspending()
    assert own.to_json() == before
    assert ledger.releases == 2 * plan.steps


def test_a_step_that_overspends_is_refused_before_anything_changes(file: Path) -> None:
    plan = start().optimizer.plan
    ledger = LedgerFile(file, budget=Budget(epsilon=0.01, delta=1e-5))
    own = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, within=ledger, run="a")
    run = RunState(plan, randomness=RandomStream.from_os(), ledger=own)
    before = (run.state_dict(), file.read_bytes())
    for ask in (run.refuse_overspending, run.next_step):
        with pytest.raises(BudgetExceededError):
            ask()
    assert (run.state_dict(), file.read_bytes()) == before


# ── refused ─────────────────────────────────────────────────────────────────────────────────────────


def refused_resuming(checkpoint: Path, private: dpdl.Private, *words: str) -> None:
    before = (private.optimizer.ledger.to_json(), private.optimizer.ledger.run)
    with pytest.raises(CheckpointError) as caught:
        loaded(checkpoint, private)
    for word in words:
        assert word in str(caught.value)
    assert (private.optimizer.ledger.to_json(), private.optimizer.ledger.run) == before


def test_a_run_of_a_file_is_not_resumed_without_it(tmp_path: Path, file: Path) -> None:
    checkpoint = saved(tmp_path / "run.pt", train(start(LedgerFile(file)), 2))
    refused_resuming(checkpoint, start(), "no ledger was given", "ledger=LedgerFile(path)")
    refused_resuming(checkpoint, start(LedgerFile(tmp_path / "other.ledger")), "other.ledger is another one")
    refused_resuming(checkpoint, start(Ledger(relation=NeighboringRelation.ADD_OR_REMOVE)), "is another one")


def test_a_file_that_has_forgotten_steps_is_refused(tmp_path: Path, file: Path) -> None:
    """Whole lines cut from its end break no chain; a checkpoint that knows of them notices."""
    private = train(start(LedgerFile(file)), 2)
    shutil.copy(file, tmp_path / "older")
    checkpoint = saved(tmp_path / "run.pt", train(private, 5))
    shutil.copy(tmp_path / "older", file)
    refused_resuming(checkpoint, start(LedgerFile(file)), "3 more releases", "older copy")


def test_a_budget_is_not_lost_or_weakened_on_the_way(tmp_path: Path) -> None:
    def memory(budget: Budget | None) -> Ledger:
        return Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=budget)

    checkpoint = saved(tmp_path / "run.pt", train(start(memory(BUDGET)), 2))
    refused_resuming(checkpoint, start(), "under a budget of epsilon 40", "this one is under none")
    refused_resuming(checkpoint, start(memory(None)), "this one is under none")
    refused_resuming(checkpoint, start(memory(Budget(epsilon=41.0, delta=1e-5))), "weaker")
    second = loaded(checkpoint, start(memory(Budget(epsilon=39.0, delta=1e-5))))
    assert second.optimizer.ledger.within is not None
    assert second.optimizer.ledger.within.of_run(second.optimizer.ledger.run)[0].count == 2


def test_another_plan_under_a_runs_name_is_refused(file: Path) -> None:
    ledger = LedgerFile(file)
    own = train(start(ledger), 2).optimizer.ledger
    with pytest.raises(LedgerError, match="another run"):
        ledger.record(MEAN, label=STEP, run=own.run, branch=own.segments[0].branch, number=1)


@pytest.mark.parametrize(
    "kept", [3, {}, {"id": "x"}, {"id": None, "budget": 3}, {"id": None, "budget": {"epsilon": -1}}]
)
def test_a_damaged_account_of_where_it_was_kept_is_refused(kept: Any) -> None:
    private = start()
    plan = private.optimizer.plan
    run = RunState(plan, randomness=RandomStream.from_insecure_seed(1))
    with pytest.raises(CheckpointError, match="damaged"):
        run.become(RunState.from_state_dict({**run.state_dict(), "kept_in": kept}, plan=plan), elsewhere=())
    with pytest.raises(CheckpointError, match="name"):
        RunState.from_state_dict({**run.state_dict(), "run": 3}, plan=plan)
