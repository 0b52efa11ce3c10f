"""What the owner of a client's data can ask of it, whatever its mechanism: what was spent, and what went unanswered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

from dpdl.federated.client_report import ClientSpending, spending_of
from dpdl.federated.round_account import RoundAccount
from dpdl.federated.unanswered import Unanswered
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile

__all__ = ["AccountableClient"]


class AccountableClient(ABC):
    """A client with a ledger, and marks of rounds beside it. It may wrap another one, its attribute `client`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the server calls it."""

    @property
    @abstractmethod
    def _account(self) -> RoundAccount:
        """Its own, not that of a client it wraps."""

    @final
    @property
    def ledger(self) -> Ledger | LedgerFile:
        """All that was released of this data, by this client and whoever else has the ledger."""
        return self._account.ledger

    @final
    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon, at delta in (0, 1), of all that the ledger holds: all rounds, all
        federations, all else. Its unit and relation are the ledger's.
        """
        return self.ledger.epsilon(delta)

    @final
    @property
    def unanswered(self) -> Unanswered:
        """Rounds on this data that were begun and not answered."""
        return self._account.marks.look()

    @final
    def go_on(self, *, not_the_data: str | None = None) -> None:
        """Answer again after rounds that were not answered, here and in the client that this one wraps.

        Args:
            not_the_data: what ended them, if neither the data nor weights that somebody sent had a part in it: the
                owner's word, which reports then cite. Without it no claim holds any more; see
                `dpdl.federated.unanswered`.

        Raises:
            ParameterError: the reason is not one line of text.
            LedgerError: the marks cannot be written.
        """
        self._account.marks.go_on(not_the_data=not_the_data)
        wrapped = getattr(self, "client", None)
        if isinstance(wrapped, AccountableClient):
            wrapped.go_on(not_the_data=not_the_data)

    @final
    def spending(self, delta: float) -> ClientSpending:
        """How much was spent at delta, of what budget, and in which federations."""
        return spending_of(self.name, self.ledger, delta)
