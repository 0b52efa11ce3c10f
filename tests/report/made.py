"""Reports to look at, made from a plan and a ledger without training."""

from __future__ import annotations

import dataclasses
from typing import Any

import dpdl
from accountants import Gaussian, PoissonSampled
from dpdl.account import Account
from dpdl.ledger import Ledger
from dpdl.reporting import report_of
from dpdl.tally import Segment

DELTA = 1e-5
RATE, SIGMA, STEPS = 256 / 4000, 2.0, 480
STEP = PoissonSampled(RATE, Gaussian(SIGMA))


def a_report(
    *,
    noise_multiplier: float = SIGMA,
    taken: int = STEPS,
    other: Gaussian | None = None,
    label: str = "mean of the ages",
    account: Account | None = None,
    secure: bool = True,
    notes: tuple[str, ...] = (),
    run: str = "digits 3f2a",
    relation: str = "add_or_remove",
    delta: float = DELTA,
    **changes: Any,
) -> dpdl.PrivacyReport:
    """A run of `taken` of 480 steps, perhaps with one other release, perhaps in a ledger that others share."""
    plan = dpdl.PrivacyPlan(
        sample_rate=RATE,
        expected_batch_size=256,
        steps=STEPS,
        noise_multiplier=noise_multiplier,
        max_grad_norm=0.1,
        relation=relation,
    )
    ledger = Ledger(relation=plan.relation, within=account, run=run)
    if other is not None:
        ledger.record(other, label=label)
    if taken:
        step = PoissonSampled(RATE, Gaussian(noise_multiplier))
        ledger.adopt((Segment(run="", branch=f"key of {run}", label="step", event=step, first=0, count=taken),))
    report = report_of(plan, ledger, delta=delta, parameters=26_010, secure=secure, notes=notes)
    return dataclasses.replace(report, **changes)
