"""deepee's watchdog over the budget, with bounds in place of estimates, and before the release instead of after it.

A release is amplified by sampling if its batch was drawn by the watched loader: `SampledWithoutReplacement`, exactly
the batch size. A batch from elsewhere counts as if every example were in it. Neighbouring data sets differ by replacing
one example, because the sizes of data set and batches are public and fixed; docs/accounting.md has what that costs.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from accountants import (
    Composed,
    Event,
    Gaussian,
    NeighboringRelation,
    PRVAccountant,
    SampledWithoutReplacement,
    arguments,
)
from dpdl.budget import Allowance, Budget
from dpdl.compat.deepee.dataloader import UniformWORSubsampler
from dpdl.compat.deepee.errors import ImplausibleEpsilonError, OrderError
from dpdl.errors import BudgetExceededError, ParameterError
from dpdl.ledger import Entry, Ledger
from dpdl.privacy_report import rounded_up, shown_delta

__all__ = ["RELATION", "PrivacyBudgetExhausted", "PrivacyWatchdog"]

# Sizes of data sets and batches are public, so neighbours have the same.
RELATION = NeighboringRelation.REPLACE_ONE
# Where deepee's search for an epsilon ends. An attacker's odds may change by e^500: that is no protection to report.
LARGEST_EPSILON = 500.0

_logger = logging.getLogger("dpdl.compat.deepee")


class PrivacyBudgetExhausted(BudgetExceededError):
    """One more step would spend more than the target."""


class Watched(Protocol):
    """What a watchdog needs to know of a wrapper; one without a ledger is taken at its word for the steps."""

    noise_multiplier: float


class PrivacyWatchdog:
    """Reports the privacy spent as a training goes, warns, or stops it.

    Args:
        dataloader: a `UniformDataLoader`, or a `DataLoader` whose batch sampler is a `UniformWORSubsampler`.
            Of any other, no amplification is claimed.
        target_epsilon: > 0, what may be spent.
        target_delta: in (0, 1).
        report_every_n_steps: how often epsilon is computed and logged.
        abort: whether to refuse the step that would spend more than the target, instead of warning of it.
        save: whether to save the model then.
        path: where its state dict goes.
        fallback_to_rdp: whether an epsilon above 500 is reported instead of refused. It is a bound as any other; no
            Rényi estimate of another sampling takes its place.

    Raises:
        ParameterError: epsilon or delta out of range, or no place to save to.
    """

    def __init__(
        self,
        dataloader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        report_every_n_steps: int = 100,
        abort: bool | None = False,
        save: bool | None = False,
        path: str | Path | None = None,
        fallback_to_rdp: bool = False,
    ) -> None:
        _log_to_stderr_unless_configured()
        if not isinstance(dataloader, DataLoader):
            raise ParameterError(
                f"dataloader must be a DataLoader, got {type(dataloader).__name__}. Give the UniformDataLoader that "
                "batches come from."
            )
        self._budget = Budget(epsilon=target_epsilon, delta=target_delta)
        self.dataloader = dataloader
        self.target_epsilon = target_epsilon
        self.target_delta = target_delta
        self.report_every_n_steps = arguments.positive_whole(
            "report_every_n_steps", report_every_n_steps, remedy="Count the steps between two reports."
        )
        self.abort = abort
        self.save = save
        self.path = path
        self.fallback_to_rdp = fallback_to_rdp
        self.wrapper: Watched | None = None
        self._allowance = Allowance(self._budget, RELATION)
        self._warned_of_foreign_batch = False
        self._is_exhausted = False
        self._refuse_unsaveable()
        self._say_what_is_unusual()

    def _refuse_unsaveable(self) -> None:
        if not (self.abort and self.save):
            return
        if not self.path:
            raise ParameterError("When setting 'save', a path to save to must be provided: path='model.pt'.")
        folder = Path(self.path).parent
        if not folder.is_dir():
            raise ParameterError(
                f"path {str(self.path)!r}: there is no folder {str(folder)!r}. Make it before training."
            )

    def _say_what_is_unusual(self) -> None:
        if self._sampler is None:
            _logger.critical(
                "Batches of this loader are not drawn uniformly without replacement: every step will count as if all "
                "examples were in it. Use a UniformDataLoader, or a DataLoader whose batch_sampler is a "
                "UniformWORSubsampler."
            )
        if self.fallback_to_rdp:
            _logger.critical(
                "fallback_to_rdp: an epsilon above %g will be reported instead of refused. It is an upper bound, not "
                "an RDP estimate, and nobody is protected by it.",
                LARGEST_EPSILON,
            )
        if not self.abort and (self.save or self.path):
            _logger.warning("'save' and 'path' are ignored without abort=True.")

    # ── what a release is ───────────────────────────────────────────────────────────────────────────

    @property
    def _sampler(self) -> UniformWORSubsampler | None:
        sampler = self.dataloader.batch_sampler
        return sampler if isinstance(sampler, UniformWORSubsampler) else None

    def event_of_release(self, noise_multiplier: float, batch_size: int) -> Event:
        """What a release made now is: uses up one draw of the loader, if there is one of this size.

        Args:
            noise_multiplier: noise std over the clip norm.
            batch_size: examples of the wrapper's batch.
        """
        noise = Gaussian(noise_multiplier)
        sampler = self._sampler
        if sampler is not None and sampler.use_draw(batch_size):
            return SampledWithoutReplacement(sampler.batch_size, sampler.sample_size, noise)
        if not self._warned_of_foreign_batch and sampler is not None:
            self._warned_of_foreign_batch = True
            _logger.critical(
                "A batch of %d examples did not come from the watched loader (which draws %d of %d): the step counts "
                "as if all examples were in it.",
                batch_size,
                sampler.batch_size,
                sampler.sample_size,
            )
        return noise

    def _event_as_planned(self) -> Event:
        """A release as the loader and wrapper promise it."""
        if self.wrapper is None:
            raise OrderError("WatchDog must be attached to a PrivacyWrapper: PrivacyWrapper(..., watchdog=watchdog).")
        noise, sampler = Gaussian(self.wrapper.noise_multiplier), self._sampler
        if sampler is None:
            return noise
        return SampledWithoutReplacement(sampler.batch_size, sampler.sample_size, noise)

    def _entries(self, steps_taken: int) -> list[Entry]:
        """The first `steps_taken` releases: as the ledger has them, and as planned where they are yet to come."""
        planned = self._event_as_planned()
        wanted = arguments.steps(steps_taken, "steps_taken")
        entries: list[Entry] = []
        ledger = getattr(self.wrapper, "ledger", None)
        if isinstance(ledger, Ledger):
            wanted += getattr(self.wrapper, "releases_before", 0)
            for entry in ledger.entries:
                count = min(entry.count, wanted)
                wanted -= count
                entries += [Entry(event=entry.event, count=count)] * (count > 0)
        return entries + [Entry(event=planned, count=wanted)] * (wanted > 0)

    # ── what was spent ──────────────────────────────────────────────────────────────────────────────

    def calc_epsilon(self, steps_taken: int) -> float:
        """An upper bound on the epsilon of the first `steps_taken` steps at `target_delta`.

        Raises:
            OrderError: not attached to a wrapper.
            ImplausibleEpsilonError: it is above 500, and fallback_to_rdp is not set.
        """
        return self._epsilon_of(self._entries(steps_taken))

    def _epsilon_of(self, entries: list[Entry]) -> float:
        event = Composed(tuple(entry.event * entry.count for entry in entries))
        spent = PRVAccountant(relation=RELATION).compose(event).epsilon(self.target_delta)
        if spent > LARGEST_EPSILON and not self.fallback_to_rdp:
            raise ImplausibleEpsilonError(
                f"Epsilon is {spent:.6g}, above {LARGEST_EPSILON:g}: no guarantee. The noise_multiplier is likely "
                "implausible; increase it. To train without privacy attach no watchdog, or set fallback_to_rdp=True to "
                "have such numbers reported."
            )
        return spent

    def before_release(self, event: Event) -> None:
        """Ask whether a release of `event` fits beside what the wrapper's ledger holds; nothing has left yet.

        Raises:
            PrivacyBudgetExhausted: it does not, and abort is set.
            ImplausibleEpsilonError: see `calc_epsilon`.
            ParameterError: there is nothing to save, or no path, when it stops.
        """
        ledger = getattr(self.wrapper, "ledger", None)
        assert isinstance(ledger, Ledger)  # only a wrapper calls this
        if (self._is_exhausted and not self.abort) or self._allowance.fits(_counts(ledger), event):
            return
        if self.abort:
            self._stop(ledger)
        self._warn(self._epsilon_of([*ledger.entries, Entry(event=event, count=1)]))
        self._is_exhausted = True  # from here on reports repeat the warning

    def inform(self, steps_taken: int) -> None:
        """Report after `steps_taken`; of a wrapper with a ledger, stop if no further step of its kind fits.

        Raises:
            PrivacyBudgetExhausted: abort is set, and the budget is spent.
            OrderError, ImplausibleEpsilonError: see `calc_epsilon`.
            ParameterError: as for `abort_training`.
        """
        ledger = getattr(self.wrapper, "ledger", None)
        reports = steps_taken % self.report_every_n_steps == 0
        if reports or not isinstance(ledger, Ledger):
            spent = self.calc_epsilon(steps_taken)
            if reports:
                _logger.info("Privacy spent at %d steps: %s", steps_taken, rounded_up(spent))
            if spent > self.target_epsilon:
                if self.abort:
                    self.abort_training(epsilon_spent=spent, save=self.save, path=self.path)
                self._warn(spent)
        if self.abort and isinstance(ledger, Ledger) and ledger.entries:
            last = ledger.entries[-1].event
            if not self._allowance.fits(_counts(ledger), last):
                self._stop(ledger)

    def _stop(self, ledger: Ledger) -> None:
        spent = PRVAccountant(relation=RELATION).compose(ledger.event).epsilon(self.target_delta)
        self.abort_training(epsilon_spent=spent, save=self.save, path=self.path)

    def _warn(self, spent: float) -> None:
        _logger.warning("Privacy budget exhausted. %s", self._comparison(spent))

    def _comparison(self, spent: float) -> str:
        return (
            f"Epsilon spent is {rounded_up(spent, 4)}, epsilon allowed is {self.target_epsilon:g} at delta "
            f"{shown_delta(self.target_delta)}, replacing one example."
        )

    def abort_training(self, epsilon_spent: float, save: bool | None = False, path: str | Path | None = None) -> None:
        """Save the wrapped model's state dict if asked to, and raise.

        Args:
            epsilon_spent: for the message.
            save: whether to save.
            path: where to.

        Raises:
            PrivacyBudgetExhausted: always.
            ParameterError: there is nothing to save, or no path.
        """
        message = f"Privacy budget exhausted. {self._comparison(epsilon_spent)}"
        if epsilon_spent <= self.target_epsilon:
            message += " One more step would exceed that; it was not taken."
        if save:
            model = getattr(self.wrapper, "wrapped_model", None)
            if not isinstance(model, nn.Module) or path is None:
                raise ParameterError(f"Nothing to save, or no path: model {type(model).__name__}, path {path!r}.")
            torch.save(model.state_dict(), path)
            message += f" The model's state dict is in {str(path)!r}."
        raise PrivacyBudgetExhausted(message)


def _counts(ledger: Ledger) -> dict[Event, int]:
    counts: dict[Event, int] = {}
    for entry in ledger.entries:
        counts[entry.event] = counts.get(entry.event, 0) + entry.count
    return counts


def _log_to_stderr_unless_configured() -> None:
    """deepee's users see reports without configuring logging; the root logger is theirs and left alone."""
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not _logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s:%(message)s"))
        _logger.addHandler(handler)
