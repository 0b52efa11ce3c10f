"""Differentially private deep learning for PyTorch.

    plan = dpdl.PrivacyPlan.for_loader(loader, epochs=20, epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    model, optimizer, loader = dpdl.make_private(model, optimizer, loader, plan)

The training loop stays as it was; `optimizer.report(delta=1e-5)` says what was spent.
"""

from dpdl.budget import Budget
from dpdl.checkpoint import load_checkpoint, save_checkpoint
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.loader import PrivateLoader
from dpdl.model import PrivateModel
from dpdl.optim import PrivateOptimizer
from dpdl.per_sample import clipped_sum, per_sample_gradients, per_sample_norms
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import PrivacyReport
from dpdl.private import Private, make_private
from dpdl.tradeoff import sweep
from dpdl.validation import check, fix, fix_report
from dpdl.watchdog import Spending, Watchdog

__all__ = [
    "Budget",
    "Execution",
    "Ledger",
    "LedgerFile",
    "PrivacyPlan",
    "PrivacyReport",
    "Private",
    "PrivateLoader",
    "PrivateModel",
    "PrivateOptimizer",
    "Spending",
    "Watchdog",
    "check",
    "clipped_sum",
    "fix",
    "fix_report",
    "load_checkpoint",
    "make_private",
    "per_sample_gradients",
    "per_sample_norms",
    "save_checkpoint",
    "sweep",
]
