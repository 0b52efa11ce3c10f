"""A client that does not take part, as Flower's error message and back.

What a server learns of a refusal is its reason, which it counts, and a text that says nothing of the data. Flower
itself sends the text of whatever exception a `ClientApp` raises, and an exception may quote a row of data;
`client_app` therefore answers with one of these instead.
"""

from __future__ import annotations

from flwr.app import Error
from flwr.common.constant import ErrorCode

from dpdl.errors import ParameterError
from dpdl.federated.messages import Refusal

__all__ = ["error_from_refusal", "refusal_from_error"]

# Flower's own codes end at 8, and are what happened to the message; these say why a client said no.
_CODES = {"budget": 1001, "request": 1002, "failed": 1003}
_REASONS = {code: reason for reason, code in _CODES.items()}
_LOST = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}


def error_from_refusal(refusal: Refusal) -> Error:
    """What the client sends.

    Raises:
        ParameterError: a reason that a client cannot give.
    """
    if refusal.reason not in _CODES:
        raise ParameterError(f"a client's reason must be one of {sorted(_CODES)}, got {refusal.reason!r}.")
    return Error(code=_CODES[refusal.reason], reason=refusal.message)


def refusal_from_error(error: Error, *, client: str, round: int) -> Refusal:
    """What the server counts. Flower's own errors are "lost" if no answer came, and "failed" otherwise."""
    if error.code in _REASONS:
        return Refusal(client=client, round=round, reason=_REASONS[error.code], message=error.reason or "")
    reason = "lost" if error.code in _LOST else "failed"
    return Refusal(client=client, round=round, reason=reason, message=f"Flower's error {error.code}: {error.reason}")
