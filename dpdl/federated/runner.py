"""Rounds of federated learning in one process: the server asks, the chosen clients answer one after the other.

    run = run_federated(server, clients, rounds=10, evaluate=accuracy_on(model, images, labels))
    print(run.report)

Nothing of the guarantee is here. The server chooses and adds its noise, the clients keep their ledgers; the same server
and clients over a network (`dpdl.federated.flower`) take the same decisions. This process sees everything: what the
report says of an adversary holds for one outside of it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from accountants import arguments
from dpdl.claims import AdversaryReport
from dpdl.errors import BudgetExceededError, ParameterError, PlanExhaustedError
from dpdl.federated.aggregation import ACCEPTED
from dpdl.federated.client_settings import refuse_no_function
from dpdl.federated.history import History, RoundRecord
from dpdl.federated.inventory import Inventory
from dpdl.federated.messages import Client, FitReply
from dpdl.federated.report import federated_report
from dpdl.federated.round_summary import RoundSummary
from dpdl.federated.server import FederatedServer
from dpdl.federated.virtual_clients import refuse_bad_names
from dpdl.privacy_report import rounded_up
from dpdl.training import accuracy_of

__all__ = ["Evaluation", "FederatedRun", "accuracy_on", "run_federated"]

Evaluation = Callable[[Mapping[str, Tensor]], Mapping[str, float] | float]
"""Given the global model's state after a round, numbers by name, or one number, which is then called "score"."""


@dataclass(frozen=True, kw_only=True)
class FederatedRun:
    """What a run ended with.

    Attributes:
        history: round by round.
        report: what is promised to whom.
        state: the global model's, parameters and buffers by name.
        stopped: why the run ended before its rounds were played; None if it did not.
    """

    history: History
    report: AdversaryReport
    state: Mapping[str, Tensor]
    stopped: str | None = None


def run_federated(
    server: FederatedServer,
    clients: Mapping[str, Client] | Iterable[Client],
    *,
    rounds: int,
    steps: int | None = None,
    evaluate: Evaluation | None = None,
    every: int = 1,
    progress: bool | Console = True,
    delta: float = 1e-5,
    shared_persons: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> FederatedRun:
    """Play rounds, as many as asked for or as the server's budget allows.

    Args:
        server: chooses clients, adds up what they send.
        clients: by name (`VirtualClients` is such a mapping), or just clients.
        rounds: how many, from where the server is.
        steps: local steps a round; None leaves that to the clients.
        evaluate: tests the global model.
        every: rounds between two looks at evaluation and epsilons; the last round is always looked at.
        progress: whether to show a bar on stderr, or the console to show it on.
        delta: of every epsilon.
        shared_persons: whether a person may have records with several clients; the report then adds up what they spent.
        stop: asked after each round; True ends the run.

    Returns:
        History, report and state. If the server's budget or plan ends before the rounds, `stopped` says so.

    Guarantee:
        None of its own: `FederatedRun.report` has the claims of the server and of each client.

    Raises:
        BudgetExceededError, PlanExhaustedError: the server's budget or plan does not allow even the first round.
        ParameterError: an argument is out of range, or two clients have one name.
    """
    rounds = arguments.positive_whole("rounds", rounds, remedy="Give a number of rounds such as 10.")
    every = arguments.positive_whole("every", every, remedy="Give 1 to look after every round.")
    delta = arguments.delta(delta)
    if not callable(getattr(server, "open_round", None)):
        raise ParameterError(f"server must be a FederatedServer, got {server!r}.")
    if evaluate is not None:
        refuse_no_function("evaluate", evaluate, remedy="Give one of the global state, such as accuracy_on(...).")
    refuse_no_function("stop", stop, remedy="Give one that is asked after each round, or leave it out.")
    by_name = _by_name(clients)
    run = _Run(server, by_name, delta=delta, steps=steps, evaluate=evaluate)
    stopped: str | None = None
    with _Bar(progress, rounds) as bar:
        for number in range(1, rounds + 1):
            try:
                run.play()
            except (BudgetExceededError, PlanExhaustedError) as error:
                if number == 1:
                    raise
                stopped = str(error)
                break
            if number % every == 0 or number == rounds:
                run.look()
            bar.show(run.records[-1])
            if number < rounds and stop():
                stopped = f"Stopped after {number} of {rounds} rounds, as asked."
                break
    run.look()
    return FederatedRun(
        history=History(delta=delta, rounds=tuple(run.records), secret_participation=_participation_is_secret(server)),
        report=federated_report(
            server=server,
            clients=[by_name[name] for name in run.asked],
            delta=delta,
            shared_persons=shared_persons,
            inventories={name: tuple(found) for name, found in run.inventories.items()},
        ),
        state={name: tensor.detach().clone() for name, tensor in server.state.items()},
        stopped=stopped,
    )


def accuracy_on(model: nn.Module, inputs: Tensor, labels: Tensor) -> Evaluation:
    """An evaluation: the fraction of examples that the global model, in eval mode, gives their label.

    Args:
        model: of the global model's architecture; a copy of it is used.
        inputs: shape [N, ...], which no client's guarantee covers: test data.
        labels: shape [N].
    """
    copied = copy.deepcopy(model)
    device = next((parameter.device for parameter in copied.parameters()), torch.device("cpu"))

    def evaluate(state: Mapping[str, Tensor]) -> dict[str, float]:
        copied.load_state_dict(dict(state))
        return {"accuracy": accuracy_of(copied, inputs, labels, device=device)}

    return evaluate


class _Run:
    """Rounds under way."""

    def __init__(
        self,
        server: FederatedServer,
        clients: Mapping[str, Client],
        *,
        delta: float,
        steps: int | None,
        evaluate: Evaluation | None,
    ) -> None:
        self.server = server
        self.clients = clients
        self.delta = delta
        self.steps = steps
        self.evaluate = evaluate
        self.records: list[RoundRecord] = []
        self.asked: dict[str, None] = {}  # over all rounds, in order
        self.inventories: dict[str, dict[Inventory, None]] = {}  # the different ones of each client's replies
        self._epsilon: dict[str, float] = {}
        self._stale: dict[str, None] = {}  # whose epsilon is older than the last request to them
        self._looked = False  # at the last record

    def play(self) -> None:
        """One round. If it breaks off, the server takes it back: what clients have spent by then stays spent."""
        began = time.perf_counter()
        chosen = self.server.open_round(tuple(self.clients))
        try:
            request = self.server.request(steps=self.steps)
            for name in chosen:
                self.asked[name] = None
                self._stale[name] = None  # a training that fails spends something, too
                answer = self.clients[name].answer(request)
                if isinstance(answer, FitReply):
                    self.inventories.setdefault(name, {})[answer.releases] = None
                self.server.add(answer)
        except BaseException:
            self.server.abandon_round()
            raise
        summary = self._close()
        outcomes = summary.private.outcomes
        refused: dict[str, tuple[str, ...]] = {}
        for name, outcome in outcomes.items():
            if outcome != ACCEPTED:
                refused[outcome] = (*refused.get(outcome, ()), name)
        self.records.append(
            RoundRecord(
                round=summary.round,
                chosen=tuple(chosen),
                answered=tuple(name for name, outcome in outcomes.items() if outcome == ACCEPTED),
                refused=refused,
                seconds=time.perf_counter() - began,
            )
        )
        self._looked = False

    def _close(self) -> RoundSummary:
        try:
            return self.server.close_round()
        except BudgetExceededError:  # somebody else has spent what this round needed
            self.server.abandon_round()
            raise

    def look(self) -> None:
        """Evaluation and epsilons after the last round, once."""
        if self._looked:
            return
        self._looked = True
        for name in self._stale:
            self._epsilon[name] = _epsilon_of(self.clients[name], self.delta)
        self._stale.clear()
        evaluation: Mapping[str, float] | None = None
        if self.evaluate is not None:
            found = self.evaluate(self.server.state)
            evaluation = dict(found) if isinstance(found, Mapping) else {"score": float(found)}
        self.records[-1] = replace(
            self.records[-1],
            client_epsilon=dict(self._epsilon),
            server_epsilon=None if self.server.plan is None else self.server.epsilon(self.delta),
            evaluation=evaluation,
        )


class _Bar:
    """Rounds, evaluation, epsilons and refusals as they come, on stderr."""

    def __init__(self, progress: bool | Console, rounds: int) -> None:
        self._progress = Progress(
            TextColumn("rounds"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[last]}"),
            TimeRemainingColumn(),
            console=progress if isinstance(progress, Console) else Console(stderr=True),
            disable=progress is False,
        )
        self._task = self._progress.add_task("rounds", total=rounds, last="")
        self._refusals = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, record: RoundRecord) -> None:
        """Move the bar; show what was looked at."""
        self._refusals += sum(map(len, record.refused.values()))
        self._progress.advance(self._task)
        if record.client_epsilon is None and record.evaluation is None:
            return
        parts = [f"{name} {value:.3g}" for name, value in (record.evaluation or {}).items()]
        if record.largest_epsilon is not None and math.isfinite(record.largest_epsilon):
            parts.append(f"clients' epsilon <= {rounded_up(record.largest_epsilon)}")
        if record.server_epsilon is not None:
            parts.append(f"server's epsilon <= {rounded_up(record.server_epsilon)}")
        if self._refusals:
            parts.append(f"{self._refusals} refusals")
        self._progress.update(self._task, last="  ".join(parts))


def _by_name(clients: Mapping[str, Client] | Iterable[Client]) -> Mapping[str, Client]:
    if isinstance(clients, Mapping):
        refuse_bad_names(list(clients))
        return clients
    if not isinstance(clients, Iterable):
        raise ParameterError(f"clients must be clients, or clients by name, got {clients!r}.")
    listed = list(clients)
    for client in listed:
        if not isinstance(getattr(client, "name", None), str) or not callable(getattr(client, "answer", None)):
            raise ParameterError(f"a client has a name and answers requests (DPClient, PlainClient), got {client!r}.")
    refuse_bad_names([client.name for client in listed])
    if not listed:
        raise ParameterError("there are no clients. Give at least one.")
    return {client.name: client for client in listed}


def _epsilon_of(client: Client, delta: float) -> float:
    """What a client has spent, over all that its ledger knows; infinite if it keeps none, and guarantees nothing."""
    epsilon: Callable[[float], float] | None = getattr(client, "epsilon", None)
    return math.inf if epsilon is None else float(epsilon(delta))


def _participation_is_secret(server: FederatedServer) -> bool:
    """Whether the server's claim counts on nobody knowing whom it chose."""
    return server.plan is not None and server.plan.amplified
