"""From a plan and a ledger to the report of a run."""

from __future__ import annotations

import platform
from importlib import metadata

import numpy
import scipy
import torch

from dpdl.ledger import Ledger
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import PrivacyReport

__all__ = ["report_of"]

ASSUMPTIONS = (
    "one record of the dataset is one example; a person with several records is protected less",
    "only the trained weights and this report leave the private side: losses, accuracies on training data "
    "and diagnostics do not",
    "settings were not chosen by trying them on the same private data; other runs on it add to the total",
    "noise is added on a grid before rounding; how far it is from exact Gaussians is not in delta, to which it adds "
    "less than 1e-6 for ten million parameters, 10,000 steps and epsilon 3",
    "the model treats examples as it did when that was checked, on the first batch and now and then (engines loop and "
    "vmap compute each example on its own, whatever the model does)",
)


def report_of(
    plan: PrivacyPlan, ledger: Ledger, *, delta: float, secure: bool, notes: tuple[str, ...]
) -> PrivacyReport:
    """The report at `delta` of what the ledger holds.

    Args:
        plan: what the run is held to.
        ledger: what has happened.
        delta: in (0, 1).
        secure: whether randomness came from keys that nobody knows.
        notes: further remarks, without a full stop.
    """
    bounds = ledger.interval(delta)
    if not secure:
        notes = (
            "noise and sampling came from insecure_seed: whoever knows the seed can remove the noise, so the claim "
            "holds only against those who do not",
            *notes,
        )
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
        steps=ledger.releases,
        planned_steps=plan.steps,
        sample_rate=plan.sample_rate,
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        expected_batch_size=plan.expected_batch_size,
        secure_randomness=secure,
        assumptions=ASSUMPTIONS,
        notes=notes,
        versions={
            "dpdl": metadata.version("dpdl"),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
    )
