"""Every exception of the library, in one tree.

    PrivacyError                          (accountants.errors)
    ├── ParameterError (ValueError)       a number or name outside its range
    ├── UnsupportedEventError             no proof for this event and relation
    ├── ModelError                        the model cannot be trained privately as it is
    │   ├── ExampleMixingError            one example changes what another one computes
    │   └── EngineMismatchError           an engine disagrees with plain autograd on this model
    ├── LossError                         the loss is not the mean or sum that was declared
    ├── LoaderError                       the data loader cannot be sampled as the plan says
    ├── StepError                         a call out of order: no batch, no backward, another batch
    │   └── PlanExhaustedError            the plan's steps are all taken
    ├── BudgetExceededError               a release would spend more than the ledger's budget
    ├── LedgerError                       a ledger file is damaged, another data set's, or under another budget
    ├── WrapError                         these objects cannot be made private (again)
    ├── ProcessGroupError                 another process of the run has ended, or is elsewhere
    ├── ChannelError                      another party of a split network does not answer, or not to what was asked
    ├── ManifestError                     two parties of a split network have not agreed on the same run
    ├── CheckpointError                   a saved state is damaged or belongs to another plan
    └── DataError                         input files are missing or broken

    PrivacyWarning (UserWarning)          legal, but weaker than it looks

All are raised before anything is spent, and leave weights, ledger and generators as they were.

Outside the tree: `dpdl.audit.AuditFailure`, an `AssertionError`: of a test that failed, not of a call that was refused.
"""

from __future__ import annotations

from accountants.errors import ParameterError, PrivacyError, UnsupportedEventError

__all__ = [
    "BudgetExceededError",
    "ChannelError",
    "CheckpointError",
    "DataError",
    "EngineMismatchError",
    "ExampleMixingError",
    "LedgerError",
    "LoaderError",
    "LossError",
    "ManifestError",
    "ModelError",
    "ParameterError",
    "PlanExhaustedError",
    "PrivacyError",
    "PrivacyWarning",
    "ProcessGroupError",
    "StepError",
    "UnsupportedEventError",
    "WrapError",
]


class ModelError(PrivacyError):
    """The model, as it is, cannot be trained with per-example privacy."""


class ExampleMixingError(ModelError):
    """A module lets one example influence what is computed for another, or keeps state from data."""


class EngineMismatchError(ModelError):
    """An engine's gradients differ from one-at-a-time autograd on this model."""


class LossError(PrivacyError):
    """The loss is not the mean (or sum) over examples that `loss_reduction` declares."""


class LoaderError(PrivacyError):
    """The data loader cannot be sampled the way the plan's accounting assumes."""


class StepError(PrivacyError):
    """A call came out of order: no private batch, no backward, or one of another batch."""


class PlanExhaustedError(StepError):
    """All steps of the plan are taken; one more would spend privacy nobody planned."""


class BudgetExceededError(PrivacyError):
    """A release would bring the ledger beyond its budget. It has not happened, and nothing was recorded."""


class LedgerError(PrivacyError):
    """A ledger file is damaged, of another data set, or was made under a stricter budget or another relation."""


class WrapError(PrivacyError):
    """These objects cannot be made private: wrapped already, or not of a kind that can be."""


class ProcessGroupError(PrivacyError):
    """Another process of a data-parallel run has ended, or does not answer."""


class ChannelError(PrivacyError):
    """Another party of a split network does not answer, or not to what was asked."""


class ManifestError(PrivacyError):
    """Two parties of a split network have not agreed on the same run."""


class CheckpointError(PrivacyError):
    """A saved state is damaged, or belongs to another plan or model."""


class DataError(PrivacyError):
    """Input files are missing or broken."""


class PrivacyWarning(UserWarning):
    """Something legal whose guarantee is weaker than it may look."""
