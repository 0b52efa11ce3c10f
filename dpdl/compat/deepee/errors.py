"""The facade's own errors: each is one of `dpdl.errors` and of the built-in kind that deepee raises in its place.

    StepError ──▶ OrderError (RuntimeError)                    a call out of order
    ModelError ─▶ ForwardError (RuntimeError)                  a normalisation that has nothing to normalise by
    PrivacyError ▶ ImplausibleEpsilonError (RuntimeError)      an epsilon that protects nobody

`BadModuleError` is in `snooper`, `PrivacyBudgetExhausted` in `watchdog`, where deepee has them. Its ValueErrors are
`dpdl.errors.ParameterError`, which is one.
"""

from __future__ import annotations

from dpdl.errors import ModelError, PrivacyError, StepError

__all__ = ["ForwardError", "ImplausibleEpsilonError", "OrderError"]


class OrderError(StepError, RuntimeError):
    """A step's calls came out of order, or a gradient would be stepped on that has no noise."""


class ForwardError(ModelError, RuntimeError):
    """The forward failed on inputs too small for a normalisation."""


class ImplausibleEpsilonError(PrivacyError, RuntimeError):
    """The epsilon is so large that reporting it as a guarantee would mislead."""
