"""A small ledger file to read, cut and break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accountants import Gaussian, PoissonSampled
from dpdl.budget import Budget
from dpdl.ledger_file import LedgerFile

STEP = PoissonSampled(0.1, Gaussian(1.5))
OTHER = Gaussian(20.0)
BUDGET = Budget(epsilon=1.0, delta=1e-5)


def a_ledger(path: Path, lines: int = 4, **settings: Any) -> LedgerFile:
    """A header, and `lines` releases of two runs and kinds."""
    ledger = LedgerFile(path, **settings)
    for i in range(lines):
        ledger.record(STEP if i % 3 else OTHER, label="step" if i % 3 else "mean", run="ab"[i % 2])
    return ledger
