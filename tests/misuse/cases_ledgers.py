"""Ledgers and budgets: overspending, and files that somebody has edited, cut or exchanged."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpdl
from accountants import Gaussian, NeighboringRelation, PoissonSampled
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, CheckpointError, LedgerError
from dpdl.ledger_file import LedgerFile
from tests.misuse.case import Trial, misuse
from tests.misuse.cases_saving import noisy, with_ledger
from tests.small_run import network, same, step_once, weights_of

LEDGERS = "Ledgers and budgets"

Change = Callable[[dict[str, Any]], object]


@misuse(
    LEDGERS,
    tried="a step that would overspend the budget",
    peer="deepee (D7): noticed after the step; Opacus: no budget",
    refused=BudgetExceededError,
)
def overspending(trial: Trial) -> None:
    ledger = dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=Budget(epsilon=6.0, delta=1e-5))
    private = with_ledger(ledger)
    step_once(private)
    assert 4 < private.optimizer.epsilon(1e-5) <= 6
    with trial.refused(private):
        step_once(private)
    assert private.optimizer.steps_taken == 1


@misuse(LEDGERS, tried="several runs on one dataset, each within the budget alone", refused=BudgetExceededError)
def several_runs_on_one_budget(trial: Trial) -> None:
    with LedgerFile(trial.folder / "data.ledger", budget=Budget(epsilon=6.0, delta=1e-5)) as ledger:
        step_once(with_ledger(ledger))
        second = with_ledger(ledger)
        with trial.refused(second):
            step_once(second)


def spent_ledger(folder: Path, *, budget: Budget | None = None) -> Path:
    """With three lines: a header and two releases."""
    path = folder / "data.ledger"
    with LedgerFile(path, budget=budget) as ledger:
        for noise in (2.0, 3.0):
            ledger.record(PoissonSampled(0.1, Gaussian(noise)), run="a")
    return path


@misuse(LEDGERS, tried="a ledger file with a number edited, or a line taken out", refused=LedgerError)
def an_edited_ledger_file(trial: Trial) -> None:
    path = spent_ledger(trial.folder)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 3
    for edited in (
        whole.replace(b"2.0", b"9.0"),
        lines[0] + lines[2],
        b"".join(lines[1:]),
        lines[0] + b"\n" + lines[1],
    ):
        path.write_bytes(edited)
        with trial.refused(path):
            LedgerFile(path)


@misuse(LEDGERS, tried="a ledger file emptied, or exchanged for another, while a run goes on", refused=LedgerError)
def a_ledger_file_exchanged(trial: Trial) -> None:
    path = spent_ledger(trial.folder)
    other = spent_ledger(Path(os.mkdir(trial.folder / "b") or trial.folder / "b"))
    with LedgerFile(path) as ledger:
        private = with_ledger(ledger)
        step_once(private)
        whole = path.read_bytes()
        for edited in (b"", other.read_bytes(), b"".join(whole.splitlines(keepends=True)[:-1])):
            path.write_bytes(edited)
            before = weights_of(private.model), private.optimizer.ledger.to_json()
            with trial.refused(path):
                step_once(private)
            assert same(before, (weights_of(private.model), private.optimizer.ledger.to_json()))
            path.write_bytes(whole)


@misuse(LEDGERS, tried="the ledger file is deleted while a run goes on", refused=LedgerError)
def a_ledger_file_deleted(trial: Trial) -> None:
    path = trial.folder / "data.ledger"
    with LedgerFile(path) as ledger:
        private = with_ledger(ledger)
        step_once(private)
        whole = path.read_bytes()
        path.unlink()
        before = weights_of(private.model), private.optimizer.ledger.to_json()
        with trial.refused():
            step_once(private)
        assert same(before, (weights_of(private.model), private.optimizer.ledger.to_json()))
        path.write_bytes(whole)


@misuse(LEDGERS, tried="opening a ledger file with a larger budget than it was made for", refused=LedgerError)
def a_larger_budget_later(trial: Trial) -> None:
    path = spent_ledger(trial.folder, budget=Budget(epsilon=5.0, delta=1e-5))
    for budget in (Budget(epsilon=6.0, delta=1e-5), Budget(epsilon=5.0, delta=1e-4)):
        with trial.refused(path):
            LedgerFile(path, budget=budget)


@misuse(LEDGERS, tried="a run of another neighbouring relation in a dataset's ledger", refused=LedgerError)
def another_relation_in_the_ledger(trial: Trial) -> None:
    ledger = dpdl.Ledger(relation=NeighboringRelation.REPLACE_ONE)
    model = network()
    with trial.refused(ledger, model):
        with_ledger(ledger, model=model)


@misuse(
    LEDGERS,
    tried="the ledger's JSON cut and read again as a whole ledger",
    refused=CheckpointError,
)
def an_edited_ledger(trial: Trial) -> None:
    private = noisy()
    step_once(private)
    values = json.loads(private.optimizer.ledger.to_json())
    edits: list[Change] = [
        lambda v: v.pop("entries"),
        lambda v: v.update(schema="other"),
        lambda v: v.update(relation="all"),
        lambda v: v["entries"][0].update(count=True),
        lambda v: v["entries"][0].update(event={}),
        lambda v: v["entries"].append(v["entries"][0]),
        lambda v: v.update(budget={"epsilon": -1}),
    ]
    for edit in edits:
        edited = copy.deepcopy(values)
        edit(edited)
        with trial.refused(private):
            dpdl.Ledger.from_json(json.dumps(edited))


@misuse(
    LEDGERS,
    tried="a plan with more steps than the budget allows, trained to its end",
    harmless="it ends where the budget does; not one step more is taken",
)
def a_plan_beyond_the_budget(trial: Trial) -> None:
    budget = Budget(epsilon=8.0, delta=1e-5)
    private = with_ledger(dpdl.Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=budget))
    taken = 0
    try:
        for _ in range(10):
            step_once(private)
            taken += 1
    except BudgetExceededError:
        pass
    plan = private.optimizer.plan
    assert 0 < taken < plan.steps
    assert dataclasses.replace(plan, steps=taken).epsilon(1e-5) <= budget.epsilon
    assert dataclasses.replace(plan, steps=taken + 1).epsilon(1e-5) > budget.epsilon
