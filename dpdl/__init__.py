"""Differentially private deep learning for PyTorch.

plan = dpdl.PrivacyPlan.for_loader(loader, epochs=20, epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
model, optimizer, loader = dpdl.make_private(model, optimizer, loader, plan)
"""

from dpdl.checkpoint import load_checkpoint, save_checkpoint
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.loader import PrivateLoader
from dpdl.model import PrivateModel
from dpdl.optim import PrivateOptimizer
from dpdl.per_sample import clipped_sum, per_sample_gradients, per_sample_norms
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import PrivacyReport
from dpdl.private import Private, make_private
from dpdl.validation import check

__all__ = [
    "Execution",
    "Ledger",
    "PrivacyPlan",
    "PrivacyReport",
    "Private",
    "PrivateLoader",
    "PrivateModel",
    "PrivateOptimizer",
    "check",
    "clipped_sum",
    "load_checkpoint",
    "make_private",
    "per_sample_gradients",
    "per_sample_norms",
    "save_checkpoint",
]
