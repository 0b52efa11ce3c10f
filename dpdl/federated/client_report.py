"""What a client may claim: what it has spent, against whom, and what it sends that no claim covers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dpdl.account import Account
from dpdl.budget import Budget
from dpdl.claims import Claim
from dpdl.federated.messages import FitRequest
from dpdl.federated.unanswered import Unanswered
from dpdl.ledger import Entry, Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.privacy_report import rounded_up, shown_delta

__all__ = [
    "ADVERSARIES",
    "NOT_COVERED",
    "ClientSpending",
    "claimed",
    "claims_against_all",
    "is_round",
    "of_the_budget",
    "rounds_in",
    "run_name",
]

ADVERSARIES = ("server", "other clients", "model consumers")
NOT_COVERED = (
    "that the client took part, when, and how long it took",
    "whether a round failed; one that did ends the claims of its client",
    "the number of its records, which is treated as public",
)


@dataclass(frozen=True, kw_only=True)
class ClientSpending:
    """How much of its privacy a client has spent; prints as a line.

    Attributes:
        client: its name.
        epsilon: upper bound on all that its ledger holds.
        delta: of that epsilon.
        budget: of the ledger; None if there is none.
        rounds: by federation, rounds that have spent something; a round that was taken up again counts once.
        releases: in the ledger altogether: steps of all rounds, and whatever else was recorded.
    """

    client: str
    epsilon: float
    delta: float
    budget: Budget | None
    rounds: Mapping[str, int] = field(default_factory=dict)
    releases: int = 0

    def __str__(self) -> str:
        rounds = ", ".join(f"{count} rounds of '{name}'" for name, count in self.rounds.items()) or "no round yet"
        line = (
            f"{self.client}: epsilon <= {rounded_up(self.epsilon, 3)} at delta = {shown_delta(self.delta)} ({rounds})"
        )
        return line if self.budget is None else f"{line}, of a budget of {self.budget}"


def run_name(request: FitRequest, digest: str) -> str:
    """A round's name in a ledger: the digest tells two requests under one number apart."""
    return f"{request.federation}/round {request.round} {digest}"


def is_round(run: str, request: FitRequest) -> bool:
    """Whether a run in a ledger was a round of that number, whatever its weights."""
    federation, slash, rest = run.rpartition("/")
    return bool(slash) and federation == request.federation and rest.startswith(f"round {request.round} ")


def rounds_in(entries: Iterable[Entry]) -> dict[str, int]:
    """How many rounds of each federation there are in a ledger, from the names of its runs."""
    seen: dict[str, set[str]] = {}
    for entry in entries:
        federation, slash, rest = entry.run.rpartition("/")
        words = rest.split(" ")
        if slash and len(words) == 3 and words[0] == "round":
            seen.setdefault(federation, set()).add(words[1])
    return {federation: len(rounds) for federation, rounds in seen.items()}


def spending_of(client: str, ledger: Ledger | LedgerFile, delta: float) -> ClientSpending:
    """What a client's ledger holds, in figures."""
    entries = ledger.entries
    return ClientSpending(
        client=client,
        epsilon=ledger.epsilon(delta),
        delta=delta,
        budget=ledger.budget,
        rounds=rounds_in(entries),
        releases=sum(entry.count for entry in entries),
    )


def claimed(account: Account, delta: float) -> float:
    """The epsilon that may be claimed of a ledger at `delta`.

    What it holds; under an adaptive budget the budget, whatever has been spent of it, because then later releases may
    have been chosen by looking at earlier ones.
    """
    budget = account.budget
    if budget is None or not budget.adaptive:
        return account.interval(delta).upper
    return budget.epsilon if delta >= budget.delta else math.inf


def of_the_budget(budget: Budget | None) -> str:
    """What a claim assumes of the length of the federation: whoever asks for rounds has seen the last ones."""
    said = "how many rounds and steps were asked for was not decided by looking at updates"
    if budget is None:
        return f"{said} (there is no budget; an adaptive one would hold if it was)"
    if budget.adaptive:
        return "the ledger was adaptive from its first release"
    return (
        f"{said}; if it was, the claim is the budget of {budget}, provided that kinds of releases and their order were "
        "fixed beforehand (Budget(adaptive=True) holds without that)"
    )


def claims_against_all(
    *,
    unit: str,
    because: str,
    epsilon: float,
    delta: float,
    relation: str,
    assumes: tuple[str, ...],
    unanswered: Unanswered,
) -> dict[str, Claim]:
    """The same claim against each adversary: what leaves has its noise, and all that follows is made of it.

    A round that was not answered ends all of them: whether a client is in the mean shows in the global model.
    """
    if unanswered.why_not:
        return {name: Claim(against=name, unit=unit, because=unanswered.why_not) for name in ADVERSARIES}
    return {
        adversary: Claim(
            against=adversary,
            unit=unit,
            because=because,
            epsilon=epsilon,
            delta=delta,
            relation=relation,
            assumes=(*assumes, unanswered.assumption),
        )
        for adversary in ADVERSARIES
    }
