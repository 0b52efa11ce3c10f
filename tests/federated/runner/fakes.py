"""A server and clients that do arithmetic only, with the signatures of the real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import BudgetExceededError
from dpdl.federated.inventory import Inventory
from dpdl.federated.messages import FitReply, FitRequest, Refusal


class AddingClient:
    """Adds its number to every weight; refuses after `rounds_left` rounds. Epsilon is rounds taken times 0.5."""

    def __init__(self, name: str, number: float, rounds_left: float = math.inf, ledger: object = None) -> None:
        self.name = name
        self.number = number
        self.rounds_left = rounds_left
        self.requests: list[FitRequest] = []
        self.taken = 0
        self.releases = Inventory()
        if ledger is not None:
            self.ledger = ledger

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        self.requests.append(request)
        if self.taken >= self.rounds_left:
            return Refusal(client=self.name, round=request.round, reason="budget", message="spent")
        self.taken += 1
        update = {name: torch.full_like(tensor, self.number) for name, tensor in request.state.items()}
        return FitReply(client=self.name, round=request.round, update=update, releases=self.releases)

    def epsilon(self, delta: float) -> float:
        return 0.5 * self.taken


class BareClient:
    """Only what the protocol asks for: no epsilon."""

    name = "bare"

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        return FitReply(client=self.name, round=request.round, update={})


class MeanServer:
    """The mean of what came, over those whom `choose` names."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        *,
        choose: Callable[[int, Sequence[str]], Sequence[str]] = lambda round, names: names,
        allowed: float = math.inf,
        spent_at_close: Sequence[int] = (),
        amplified: bool | None = None,
    ) -> None:
        self.state = dict(state)
        self.round = 0
        self.plan = None if amplified is None else SimpleNamespace(amplified=amplified)
        self.calls: list[str] = []
        self.outcomes: dict[str, str] = {}
        self.updates: list[Mapping[str, Tensor]] = []
        self._choose = choose
        self._allowed = allowed
        self._spent_at_close = spent_at_close

    def open_round(self, names: Sequence[str]) -> tuple[str, ...]:
        if self.round >= self._allowed:
            raise BudgetExceededError("the server's budget is spent")
        self.round += 1
        self.calls.append("open")
        self.outcomes, self.updates = {}, []
        return tuple(self._choose(self.round, names))

    def request(self, *, steps: int | None = None) -> FitRequest:
        self.calls.append("request")
        return FitRequest(round=self.round, state=self.state, steps=steps)

    def add(self, answer: FitReply | Refusal) -> str:
        outcome = "accepted" if isinstance(answer, FitReply) else answer.reason
        if isinstance(answer, FitReply) and not all(bool(t.isfinite().all()) for t in answer.update.values()):
            outcome = "not finite"
        self.outcomes[answer.client] = outcome
        if outcome == "accepted":
            self.updates.append(answer.update)
        return outcome

    def close_round(self, answers: Sequence[FitReply | Refusal] = ()) -> Any:
        self.calls.append("close")
        if self.round in self._spent_at_close:
            raise BudgetExceededError("spent by another run")
        if self.updates:
            mean = {name: torch.stack([u[name] for u in self.updates]).mean(0) for name in self.state}
            self.state = {name: tensor + mean[name] for name, tensor in self.state.items()}
        return SimpleNamespace(round=self.round, private=SimpleNamespace(outcomes=self.outcomes))

    def abandon_round(self) -> None:
        self.calls.append("abandon")
        self.round -= 1

    def epsilon(self, delta: float) -> float:
        return 0.25 * self.round
