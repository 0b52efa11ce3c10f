"""From what went wrong at a client to a refusal that a server can count, and that says nothing of the data.

Before training has begun nothing was looked at, and an error may be told. Afterwards the refusal is the same to the
letter whatever went wrong: the kind of error, or where it came, may be about the data. The client's own log has it all.
That a round failed is told in any case, without noise; what follows is for `dpdl.federated.unanswered` to say.
"""

from __future__ import annotations

import logging

from dpdl.errors import (
    BudgetExceededError,
    CheckpointError,
    LedgerError,
    ParameterError,
    PrivacyError,
)
from dpdl.federated.messages import FitRequest, Refusal

__all__ = ["refusal_of"]

_log = logging.getLogger(__name__)


def refusal_of(error: Exception, request: FitRequest, *, client: str, begun: bool) -> Refusal:
    """The refusal to send, and a line in the client's log.

    Args:
        error: what was raised.
        request: the answer to which this is.
        client: who refuses.
        begun: whether data may have been looked at.

    Raises:
        ParameterError: it was no request that came: there is nobody to refuse.
    """
    if not isinstance(request, FitRequest):
        raise ParameterError(f"a client answers a FitRequest, got {type(request).__name__}.") from error
    _log.warning(
        "Client '%s' does not take part in round %s of '%s': %s",
        client,
        request.round,
        request.federation,
        error,
        exc_info=None if isinstance(error, PrivacyError) else error,
    )
    if begun:
        return _refusal("failed", "The round failed at the client. The client's own log says why.", request, client)
    if isinstance(error, BudgetExceededError):
        return _refusal("budget", str(error), request, client)
    if isinstance(error, PrivacyError) and not isinstance(error, (LedgerError, CheckpointError)):  # these name files
        return _refusal("request", str(error), request, client)
    what = "its ledger, or its store of replies, cannot be used as it is."
    if not isinstance(error, PrivacyError):
        what = "what went wrong may tell of its data, or of its machine."
    text = f"{type(error).__name__} at the client: {what} The client's own log says more."
    return _refusal("request", text, request, client)


def _refusal(reason: str, message: str, request: FitRequest, client: str) -> Refusal:
    return Refusal(client=client, round=request.round, reason=reason, message=message)
