"""A round under way: whose answers count, and what became of each.

Each chosen client's first answer to this round counts. A second one from the same client would count its data twice;
one from a client that was not chosen was drawn by nobody; one of another round (a late one, or one that was sent
again) is about other weights. None of these is looked at, and each is counted.
"""

from __future__ import annotations

from typing import final

from dpdl.errors import ParameterError
from dpdl.federated.aggregation import MALFORMED, ClippedUpdates, WeighedUpdates
from dpdl.federated.messages import FitReply, Refusal
from dpdl.federated.round_summary import PrivateRound

__all__ = ["ANOTHER_ROUND", "DUPLICATE", "LOST", "NOT_CHOSEN", "OpenRound", "refuse_no_answer"]

LOST, FAILED = "lost", "failed"
DUPLICATE, NOT_CHOSEN, ANOTHER_ROUND = "duplicate", "not chosen", "another round"
_REASONS = {"budget", "request", FAILED, LOST}  # that a refusal may give; any other is a failure


@final
class OpenRound:
    """Takes answers.

    Args:
        number: of the round, from 1.
        chosen: the clients that are asked.
        updates: where their updates are added up.
    """

    def __init__(self, number: int, chosen: tuple[str, ...], updates: ClippedUpdates | WeighedUpdates) -> None:
        self.number = number
        self.chosen = chosen
        self.updates = updates
        self._asked = frozenset(chosen)
        self._outcomes: dict[str, str] = {}
        self._refused: dict[str, int] = {}

    def add(self, answer: FitReply | Refusal) -> str:
        """Take one answer; returns what became of it."""
        refuse_no_answer(answer)
        refused = self._why_not(answer)
        if refused is not None:
            self._refused[refused] = self._refused.get(refused, 0) + 1
            return refused
        if isinstance(answer, FitReply):
            outcome = self.updates.add(answer)
        elif not isinstance(answer.reason, str):
            outcome = MALFORMED
        else:
            outcome = answer.reason if answer.reason in _REASONS else FAILED
        self._outcomes[answer.client] = outcome
        return outcome

    def private(self) -> PrivateRound:
        """What may not be published. Those who have not answered are lost."""
        updates = self.updates
        bounded = updates if isinstance(updates, ClippedUpdates) else None
        return PrivateRound(
            outcomes={name: self._outcomes.get(name, LOST) for name in self.chosen},
            refused=dict(self._refused),
            clipped=None if bounded is None else bounded.clipped,
            weights_lowered=None if bounded is None else bounded.lowered,
            excluded_tensors=updates.excluded,
            problem=updates.problem,
        )

    def _why_not(self, answer: FitReply | Refusal) -> str | None:
        """Why an answer is not looked at; None if it is."""
        if type(answer.round) is not int or not isinstance(answer.client, str):
            return MALFORMED
        if answer.round != self.number:
            return ANOTHER_ROUND
        if answer.client not in self._asked:
            return NOT_CHOSEN
        return DUPLICATE if answer.client in self._outcomes else None


def refuse_no_answer(answer: object) -> None:
    """Raise unless it is an answer.

    Raises:
        ParameterError: it is something else.
    """
    if not isinstance(answer, (FitReply, Refusal)):
        raise ParameterError(f"an answer is a FitReply or a Refusal, got {type(answer).__name__}.")
