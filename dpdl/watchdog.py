"""A watchdog tells how a run spends its budget, stops it in time, and can save it before it stops.

    watchdog = Watchdog(every=100, report=print, save_to="last.pt")
    model, optimizer, loader = make_private(model, optimizer, loader, plan, ledger=ledger, watchdog=watchdog)

It looks after each step. When no further step fits into the ledger's budget (or into the watchdog's own), it saves the
run, and then raises, or waits for the loop to ask. Nothing is ever overspent: the step after the last one is refused
before it is computed, whatever the loop does. A run that ends with its plan is not stopped; it is over. In a
data-parallel run each rank has one; rank 0 is asked, saves and reports, and all stop.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch.optim.lr_scheduler import LRScheduler

from accountants import arguments
from dpdl.budget import Budget
from dpdl.checkpoint import save_checkpoint
from dpdl.errors import BudgetExceededError, CheckpointError, ParameterError, WrapError
from dpdl.model import PrivateModel
from dpdl.optim import PrivateOptimizer
from dpdl.privacy_report import rounded_up, shown_delta

__all__ = ["Spending", "Watchdog"]

LOOKS = 200  # times in a planned run that epsilon is computed to see whether a fraction was passed

_SAVED = "The run is saved in {}."

_log = logging.getLogger(__name__)

WhenSpent = Literal["raise", "flag"]


@dataclass(frozen=True, kw_only=True)
class Spending:
    """How far a run has come; prints as a line.

    Attributes:
        step: steps taken.
        planned_steps: that the plan allows.
        epsilon: upper bound on what this run has spent at `delta`.
        delta: of the budget, or the one asked for.
        spent: upper bound on what counts against the budget: this run, or all runs of the ledger.
        budget: of the watchdog or the ledger; None if there is none.
        last: whether the run stops here.
    """

    step: int
    planned_steps: int
    epsilon: float
    delta: float
    spent: float
    budget: Budget | None
    last: bool

    def __str__(self) -> str:
        line = (
            f"step {self.step:,} of {self.planned_steps:,}: epsilon <= {rounded_up(self.epsilon, 3)} "
            f"at delta = {shown_delta(self.delta)}"
        )
        if self.budget is not None:
            line += f", {rounded_up(self.spent, 3)} of a budget of {self.budget.epsilon:g}"
        return f"{line}; no further step fits, the run stops" if self.last else line


class Watchdog:
    """Reports what a run spends, and stops it when the budget is spent.

    Args:
        budget: for this run alone; by default that of the ledger that make_private was given. It becomes the budget of
            the run's own ledger: all that is recorded there is held to it, and so is a run that goes on from the run's
            checkpoint, with a watchdog or without.
        delta: at which to report if there is no budget.
        every: report every so many steps.
        fractions: report when these shares of the budget are spent.
        report: called with each `Spending`, for example `print` or `rich.print`; by default they are logged.
        when_spent: "raise" a BudgetExceededError after the last step that fits, or set the "flag" `stopped`, which the
            loop asks; the next step is refused in either case.
        save_to: a checkpoint to write before stopping. If that fails, the error that ends the run says so, and it is
            tried again whenever a step is refused.

    Attributes:
        stopped: whether no further step fits.
        scheduler: a learning-rate scheduler to save along; set it once it is made.

    Guarantee:
        With a budget, no step is taken that would bring the upper bound on epsilon above it.

    Raises:
        ParameterError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        budget: Budget | None = None,
        delta: float | None = None,
        every: int | None = None,
        fractions: tuple[float, ...] = (0.5, 0.75, 0.9),
        report: Callable[[Spending], None] | None = None,
        when_spent: WhenSpent = "raise",
        save_to: str | os.PathLike[str] | None = None,
    ) -> None:
        if when_spent not in get_args(WhenSpent):
            raise ParameterError(f"when_spent must be one of {get_args(WhenSpent)}, got {when_spent!r}.")
        if budget is not None and not isinstance(budget, Budget):
            raise ParameterError(f"budget must be a Budget, got {budget!r}. Give Budget(epsilon=..., delta=...).")
        if not isinstance(fractions, (tuple, list)) or not all(_is_fraction(fraction) for fraction in fractions):
            raise ParameterError(f"fractions must be a tuple of numbers in (0, 1], got {fractions!r}.")
        if every is not None:
            every = arguments.positive_whole("every", every, remedy="Give a number of steps such as 100.")
        self.stopped = False
        self.scheduler: LRScheduler | None = None
        self._own = budget
        self._delta = None if delta is None else arguments.delta(delta)
        self._every = every
        self._fractions = sorted(fractions)
        self._report = report or _logged
        self._raises = when_spent == "raise"
        self._save_to = None if save_to is None else Path(save_to).absolute()
        self._saved: str | None = None  # what came of that
        self._run: tuple[PrivateModel, PrivateOptimizer] | None = None
        self._step = 0

    @property
    def save_to(self) -> Path | None:
        """Where the run is saved when its budget is spent; None if it is not."""
        return self._save_to

    def attach(self, model: PrivateModel, optimizer: PrivateOptimizer) -> None:
        """Watch a run, from its next step on. `make_private(..., watchdog=...)` does this.

        Args:
            model, optimizer: of the run, as `make_private` returns them.

        Raises:
            WrapError: it watches another run already.
            ParameterError: there is neither a budget nor a delta.
            LedgerError: the run is held to a stricter budget already.
        """
        if self._run is not None:
            raise WrapError("The watchdog watches a run already. Give each run one of its own.")
        ledger = optimizer.ledger
        known = self._own or ledger.budget or (None if ledger.within is None else ledger.within.budget)
        if known is not None and self._delta is not None:
            raise ParameterError(
                f"The budget's delta is {known.delta:g}; a watchdog with a budget takes no other delta."
            )
        if known is None and self._delta is None:
            raise ParameterError(
                "The watchdog has neither a budget nor a delta to report at. Give it one of them, or make_private a "
                "ledger with a budget."
            )
        if self._own is not None:
            ledger.hold_to(self._own)
        self._budget, self._run, self._step = known, (model, optimizer), optimizer.steps_taken
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def spending(self) -> Spending:
        """How far the run has come.

        Raises:
            WrapError: it watches no run yet.
        """
        optimizer = self._watched()[1]
        ledger = optimizer.ledger
        delta = self._delta if self._budget is None else self._budget.delta
        assert delta is not None
        whole = ledger if ledger.budget is not None or ledger.within is None else ledger.within
        return Spending(
            step=optimizer.steps_taken,
            planned_steps=optimizer.plan.steps,
            epsilon=ledger.epsilon(delta),
            delta=delta,
            spent=whole.interval(delta).upper,
            budget=self._budget,
            last=self.stopped,
        )

    def _watched(self) -> tuple[PrivateModel, PrivateOptimizer]:
        if self._run is None:
            raise WrapError("The watchdog watches no run. Give it to make_private, or attach it.")
        return self._run

    def _before(self, *_: Any) -> None:
        """Nothing is computed for a step that does not fit; another process may have spent since the last one."""
        optimizer = self._watched()[1]
        if optimizer.steps_taken >= optimizer.plan.steps:
            return  # the plan is over: that is the optimizer's to say
        if self.stopped or (optimizer.completes_a_batch and not optimizer.another_step_fits()):
            self._stop()
            raise self._spent_error()

    def _after(self, *_: Any) -> None:
        optimizer = self._watched()[1]
        step = optimizer.steps_taken
        if step == self._step:
            return  # a part of a logical batch
        self._step = step
        if step < optimizer.plan.steps and not optimizer.another_step_fits():
            self._stop()
            if self._raises:
                raise self._spent_error()
        elif not optimizer.is_on_first_rank:
            return
        elif self._every is not None and step % self._every == 0:
            self._report(self.spending())
        elif self._budget is not None and step % max(1, optimizer.plan.steps // LOOKS) == 0:
            self._report_fraction(self._budget)

    def _report_fraction(self, budget: Budget) -> None:
        if not self._fractions:
            return
        now = self.spending()
        passed = [fraction for fraction in self._fractions if now.spent >= fraction * budget.epsilon]
        if passed:
            self._fractions = self._fractions[len(passed) :]
            self._report(now)

    def _stop(self) -> None:
        model, optimizer = self._watched()
        first, self.stopped = not self.stopped, True
        if not optimizer.is_on_first_rank:
            return
        if self._save_to is not None and self._saved != _SAVED:
            self._saved = _SAVED
            try:
                save_checkpoint(self._save_to, model, optimizer, scheduler=self.scheduler)
            except CheckpointError as error:
                self._saved = f"The run could NOT be saved ({error}); save it now, with dpdl.save_checkpoint."
                _log.error("%s", self._saved)
        if first:
            self._report(self.spending())

    def _spent_error(self) -> BudgetExceededError:
        saved = "" if self._saved is None else f" {self._saved.replace('{}', str(self._save_to))}"
        return BudgetExceededError(
            f"The budget is spent: {self.spending()}.{saved} Nothing was overspent; publish what there is."
        )


def _is_fraction(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _logged(spending: Spending) -> None:
    _log.log(logging.WARNING if spending.last else logging.INFO, "%s", spending)
