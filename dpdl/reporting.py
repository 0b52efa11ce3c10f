"""From a plan and a ledger to the report of a run."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata

import numpy
import scipy
import torch

from dpdl.account import Account
from dpdl.budget import composed
from dpdl.ledger import Ledger
from dpdl.noise import total_variation
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import PrivacyReport, rounded_up, shown_delta
from dpdl.releases import DatasetRecord, Release, counted
from dpdl.run_state import STEP, step_event
from dpdl.tally import Entry, Segment

__all__ = ["report_of"]

LARGEST_EXPONENT = 700.0  # e to a larger one is not a double

ASSUMPTIONS = (
    "one record of the dataset is one example; a person with several records is protected less",
    "only the trained weights and this report leave the private side: losses, accuracies on training data "
    "and diagnostics do not",
    "settings were not chosen by trying them on the same private data; other runs on it add to the total",
    "the model treats examples as it did when that was checked, on the first batch and now and then (engines loop and "
    "vmap compute each example on its own, whatever the model does)",
)


def report_of(
    plan: PrivacyPlan, ledger: Ledger, *, delta: float, parameters: int, secure: bool, notes: tuple[str, ...]
) -> PrivacyReport:
    """The report at `delta` of what the ledger holds.

    Args:
        plan: what the run is held to.
        ledger: what has happened; it may lie within the dataset's.
        delta: in (0, 1).
        parameters: how many numbers a step releases.
        secure: whether randomness came from keys that nobody knows.
        notes: further remarks, without a full stop.
    """
    bounds = ledger.interval(delta)
    releases = _merged(ledger.entries)
    if not secure:
        notes = (
            "noise and sampling came from insecure_seed: whoever knows the seed can remove the noise, so the claim "
            "holds only against those who do not",
            *notes,
        )
    if others := [release for release in releases if release.label != STEP]:
        listed = ", ".join(f"{release.count} x {release.event} ({release.label})" for release in others)
        notes = (*notes, f"epsilon includes what was released besides steps: {listed}")
    account = ledger.within
    dataset = None if account is None else _dataset(account, releases, ledger.run)
    of_all = None if account is None or dataset is None else _claimed(account, dataset, delta)
    if account is not None:
        assert of_all is not None
        notes = (*notes, _of_all_runs(account, of_all, delta))
    if ledger.budget is not None and ledger.budget.adaptive:
        notes = (
            *notes,
            "epsilon is of releases fixed in advance; if some were chosen by looking at earlier ones, the claim is the "
            f"run's own budget, {ledger.budget}",
        )
    if_all = _when_all_steps_are_taken(plan, ledger, delta)
    return PrivacyReport(
        epsilon=bounds.upper,
        epsilon_lower=bounds.lower,
        delta=delta,
        relation=ledger.relation.phrase,
        unit="example",
        sampling=f"Poisson sampling at rate {plan.sample_rate:.6g}",
        mechanism=(
            f"Gaussian noise of {plan.noise_multiplier:.6g} times the clipping norm {plan.max_grad_norm:g} "
            "on the sum of per-example gradients"
        ),
        accountant="PRV (numerical privacy-loss distribution, certified upper and lower bound)",
        steps=ledger.count(STEP),
        planned_steps=plan.steps,
        sample_rate=plan.sample_rate,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_batch_size=plan.expected_batch_size,
        secure_randomness=secure,
        assumptions=(
            *ASSUMPTIONS,
            _of_the_length(ledger.count(STEP), plan.steps, if_all, delta),
            _of_the_noise(bounds.upper, ledger.count(STEP), parameters),
        ),
        notes=notes,
        versions={
            "dpdl": metadata.version("dpdl"),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
        dataset_epsilon=of_all,
        planned_epsilon=if_all,
        made=datetime.datetime.now(datetime.UTC).date().isoformat(),
        run=ledger.run,
        step=step_event(plan),
        releases=releases,
        dataset=dataset,
    )


def _merged(entries: Iterable[Entry | Segment]) -> tuple[Release, ...]:
    """Those of the same run, label and kind counted together, in the order of the first."""
    counts: dict[Release, int] = {}
    for entry in entries:
        kind = Release(event=entry.event, count=1, label=entry.label, run=entry.run)
        counts[kind] = counts.get(kind, 0) + entry.count
    return tuple(replace(kind, count=count) for kind, count in counts.items())


def _dataset(account: Account, own: tuple[Release, ...], run: str) -> DatasetRecord:
    """What all runs have released, as of now; with the run's own, which another rank may be about to write there."""
    budget = account.budget
    releases = {
        replace(each, count=1): each.count
        for each in _merged(segment for run in account.runs for segment in account.of_run(run))
    }
    for each in own:
        kind = replace(each, count=1, run=run)
        releases[kind] = max(each.count, releases.get(kind, 0))
    return DatasetRecord(
        name=account.name,
        releases=tuple(replace(kind, count=count) for kind, count in releases.items()),
        id=account.id,
        budget=None if budget is None else (budget.epsilon, budget.delta),
        adaptive=budget is not None and budget.adaptive,
    )


def _claimed(account: Account, dataset: DatasetRecord, delta: float) -> float:
    """What all runs may claim together: what is spent, or the budget, if releases may be chosen by looking.

    Of the releases that the report lists: another process may have added some to the ledger since they were read.
    """
    budget = account.budget
    if budget is None or not budget.adaptive:
        return composed(counted(dataset.releases), account.relation).epsilon(delta)
    spent = composed(counted(dataset.releases), account.relation).interval(budget.delta)
    return budget.epsilon if delta >= budget.delta and spent.lower <= budget.epsilon else math.inf


def _when_all_steps_are_taken(plan: PrivacyPlan, ledger: Ledger, delta: float) -> float:
    counts = dict(ledger.counts)
    step = step_event(plan)
    left = max(0, plan.steps - ledger.count(STEP))
    counts[step] = counts.get(step, 0) + left
    return composed(counts, ledger.relation).epsilon(delta)


def _of_the_length(steps: int, planned: int, epsilon: float, delta: float) -> str:
    """A run that ends where its releases look good has a length that depends on them, which no composition covers."""
    if steps >= planned:
        return "the number of steps was fixed in advance"
    claim = f"the claim is that of all {planned:,} planned steps"
    promised = f"epsilon <= {rounded_up(epsilon)}" if math.isfinite(epsilon) else "no guarantee"
    return (
        f"the number of steps was not chosen by looking at what was released; if it was, {claim}, {promised} "
        f"at delta = {shown_delta(delta)}"
    )


def _of_the_noise(epsilon: float, steps: int, parameters: int) -> str:
    """What the distance of the noise from exact Gaussians adds, as `dpdl.noise.normals` proves."""
    more = min(1.0, (1 + math.exp(min(epsilon, LARGEST_EXPONENT))) * total_variation(steps * parameters))
    return (
        f"noise is added on a grid before rounding; how far {steps} steps of {parameters} numbers are from exact "
        f"Gaussians is not in delta, to which it adds at most {more:.1g}"
    )


def _of_all_runs(account: Account, epsilon: float, delta: float) -> str:
    """What the dataset's ledger says altogether."""
    count = len(account.runs)
    runs = f"{account.name} has {count} run{'' if count == 1 else 's'} on this data"
    budget = account.budget
    if budget is not None and budget.adaptive:
        return f"{runs}, chosen by looking at earlier ones: the claim of all together is the budget, {budget}"
    together = "" if count == 1 else " together"
    spent = f"{runs}, which{together} spent epsilon <= {rounded_up(epsilon)} at delta = {shown_delta(delta)}"
    return spent if budget is None else f"{spent} of a budget of {budget}"
