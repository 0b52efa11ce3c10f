"""A `FederatedServer` as Flower's strategy: Flower carries the messages, the server decides and accounts.

    server = FederatedServer(model.state_dict(), sampling=PoissonClients(0.1), plan=plan, ledger=ledger)

    @app.main()
    def main(grid, context):
        DPStrategy(server, clients=10).start(grid, num_rounds=20)

Who takes part is drawn by the server, over the names of all clients that were ever there: one that has gone is drawn
like any other and counts as lost, so that sample rate and denominator stay those of the plan. Replies are ordered by
client before they are summed, so that the result does not depend on who answers first.

Public: the state, and what the server's plan says. Which clients took part, and the counts in Flower's `Result`, are
not covered by a claim about clients; keep them at the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from dpdl.errors import BudgetExceededError, DataError, ParameterError
from dpdl.federated.flower.nodes import Nodes
from dpdl.federated.flower.records import (
    arrays_from_tensors,
    record_from_request,
    reply_from_record,
    tensors_from_arrays,
)
from dpdl.federated.flower.refusals import refusal_from_error
from dpdl.federated.messages import FitReply, FitRequest, Refusal, Scalar
from dpdl.federated.round_summary import RoundSummary
from dpdl.federated.server import FederatedServer

__all__ = ["DPStrategy"]

_LOG = logging.getLogger("flwr")  # what Flower streams to whoever has submitted the run


class DPStrategy(Strategy):
    """Flower's strategy for a server with, or without, client-level privacy.

    Args:
        server: it holds the state and the plan, draws clients, adds noise, and keeps the ledger.
        clients: how many clients to wait for before the first round.
        steps: local steps of each round; None leaves them to the clients.
        timeout: how many seconds a round waits for answers. Whoever has not answered then is lost, and a request that
            has not been taken up by then is void: a client that comes back later does not train, and spend, in vain.
        patience: how many seconds to wait for the clients.
        names: names of clients by node, of those that need not be asked.

    Attributes:
        server: as given.
        stopped: why the last run ended before its rounds; None if it did not.
        summaries: of the rounds that this object has closed. Their `private` part may not be published.

    Guarantee:
        That of the server: Flower adds nothing to it and takes nothing from it. The same clients, server and insecure
        seed give the same states as in one process, whoever answers first.

    Raises:
        ParameterError: an argument is out of range.
    """

    def __init__(
        self,
        server: FederatedServer,
        *,
        clients: int = 1,
        steps: int | None = None,
        timeout: float = 3600.0,
        patience: float = 600.0,
        names: Mapping[int, str] | None = None,
    ) -> None:
        if clients < 1 or timeout <= 0 or patience <= 0:
            raise ParameterError(
                f"clients must be at least 1, timeout and patience above 0 seconds, got {clients!r}, {timeout!r}, "
                f"{patience!r}."
            )
        self.server = server
        self.stopped: str | None = None  # why the run has ended before its last round
        self.summaries: list[RoundSummary] = []  # of the rounds that this object has closed; partly private
        self._clients = clients
        self._steps = steps
        self._timeout = timeout
        self._patience = patience
        self._nodes = Nodes(names)
        self._request: FitRequest | None = None
        self._asked: tuple[str, ...] = ()
        self._messages: dict[str, Message] = {}  # to those that are there
        self._unreached: tuple[str, ...] = ()

    # ── a round ─────────────────────────────────────────────────────────────────────────────────────

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the clients of a round and ask them. The server's own state and round count, not Flower's.

        Raises:
            BudgetExceededError: the server's ledger refuses the round; nobody is asked.
            ChannelError: too few clients are there.
            ParameterError: train_config holds something other than plain values.
        """
        settings = _settings(config)
        self._nodes.meet(grid, at_least=self._clients, timeout=self._patience)
        self._asked = tuple(self.server.open_round(self._nodes.names))
        with self._or_abandon():
            self._request = self.server.request(steps=self._steps, config=settings)
            content = record_from_request(self._request)
        nodes = {name: self._nodes.node_of(name) for name in self._asked}
        self._unreached = tuple(name for name, node in nodes.items() if node is None)
        _LOG.info(
            "round %d: %d clients drawn, %d of them not there", self._request.round, len(nodes), len(self._unreached)
        )
        self._messages = {
            name: Message(
                content=content,
                dst_node_id=node,
                message_type=MessageType.TRAIN,
                ttl=self._timeout,
                group_id=str(self._request.round),
            )
            for name, node in nodes.items()
            if node is not None
        }
        return list(self._messages.values())

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Close the round with whatever has come. Who has not answered is lost, and the noise is not less for it.

        Returns:
            The new state, and how many were asked and what became of their answers, which is not to be published.

        Raises:
            ParameterError: no round is open.
        """
        if self._request is None:
            raise ParameterError("aggregate_train was called before configure_train. Use start, or call them in turn.")
        summary = self.server.close_round(self._answers(self._request, replies))
        self._request = None
        self.summaries.append(summary)
        counts = {"asked": summary.private.chosen, **summary.private.counts}
        return arrays_from_tensors(self.server.state), MetricRecord(dict(counts))

    def _answers(self, request: FitRequest, replies: Iterable[Message]) -> list[FitReply | Refusal]:
        """One for each client that was drawn, in their order."""
        found: dict[str, FitReply | Refusal] = {}
        names = {message.metadata.message_id: name for name, message in self._messages.items()}  # sent by now
        for message in replies:
            name = names.get(message.metadata.reply_to_message_id)  # Flower's own errors come from no node
            if name is not None and name not in found:
                found[name] = _answer(message, request, name)
        for name in self._asked:
            if name not in found:
                why = "it was not there" if name in self._unreached else "no answer came in time"
                found[name] = Refusal(client=name, round=request.round, reason="lost", message=why)
            if isinstance(answer := found[name], Refusal):
                _LOG.info("round %d: %s %s: %s", request.round, name, answer.reason, answer.message)
        return [found[name] for name in self._asked]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody is asked: a loss that a client computes on its data is a release that no mechanism covers."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """There is nothing to aggregate."""

    def summary(self) -> None:
        """Log what is promised."""
        plan = self.server.plan
        _LOG.info("\t├──> %s", "no client-level plan: the server promises nothing of its own" if plan is None else plan)

    # ── a run ───────────────────────────────────────────────────────────────────────────────────────

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Rounds, one after another, until all are done or the server's ledger refuses one.

        Args:
            grid: Flower's.
            initial_arrays: leave it out; the server has the state. Given, it must be that state.
            num_rounds: how many rounds to run now; a server that was resumed counts on from its own.
            timeout: of a round, in place of the strategy's own.
            train_config: settings for the clients.
            evaluate_config: not taken: clients are not asked to evaluate.
            evaluate_fn: given the round's number and the state, numbers on public data; before and after each round.

        Returns:
            Flower's result. If a round was refused, it holds those before, and `stopped` says why.

        Raises:
            BudgetExceededError: the ledger refuses even the first of them.
            ParameterError: initial_arrays is another state, or evaluate_config is given.
        """
        if evaluate_config is not None:
            raise ParameterError(
                "evaluate_config is given, but clients do not evaluate: their losses would leave without protection. "
                "Evaluate on public data with evaluate_fn."
            )
        if initial_arrays is not None:
            _refuse_other_state(tensors_from_arrays(initial_arrays), self.server.state)
        self._timeout = self._timeout if timeout is None else timeout
        self.stopped = None
        self.summary()
        result = Result(arrays=arrays_from_tensors(self.server.state))
        _evaluate(evaluate_fn, self.server.round, result)
        for number in range(num_rounds):
            try:
                requests = self.configure_train(self.server.round + 1, result.arrays, train_config or _NONE, grid)
            except BudgetExceededError as refused:
                if number == 0:
                    raise
                self.stopped = str(refused)
                _LOG.warning("the run ends after round %d: %s", self.server.round, refused)
                break
            with self._or_abandon():
                replies = grid.send_and_receive(messages=requests, timeout=self._timeout) if requests else ()
            result.arrays, counts = self.aggregate_train(self.server.round, replies)
            result.train_metrics_clientapp[self.server.round] = counts
            _evaluate(evaluate_fn, self.server.round, result)
        return result

    @contextmanager
    def _or_abandon(self) -> Iterator[None]:
        """Take a round back whose messages cannot be carried: nothing was released, and the server can go on."""
        try:
            yield
        except BaseException:
            self.server.abandon_round()
            self._request = None
            raise


_NONE = ConfigRecord()


def _answer(message: Message, request: FitRequest, name: str) -> FitReply | Refusal:
    """What a client says; an answer that is not one to this request is a failure, and is not summed."""
    if message.has_error():
        return refusal_from_error(message.error, client=name, round=request.round)
    try:
        reply = reply_from_record(message.content, base=request.state)
    except DataError as error:
        return Refusal(client=name, round=request.round, reason="failed", message=str(error))
    if reply.client != name or reply.round != request.round:
        why = f"it answered as '{reply.client}' to round {reply.round}"
        return Refusal(client=name, round=request.round, reason="failed", message=why)
    return reply


def _settings(config: ConfigRecord) -> dict[str, Scalar]:
    settings: dict[str, Scalar] = {}
    for name, value in config.items():
        if not isinstance(value, bool | int | float | str):
            raise ParameterError(f"train_config has {name!r} = {value!r}: only bool, int, float and str are passed on.")
        settings[name] = value
    return settings


def _evaluate(
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None, round: int, result: Result
) -> None:
    if evaluate_fn is not None and (numbers := evaluate_fn(round, result.arrays)) is not None:
        _LOG.info("round %d: %s", round, dict(numbers))
        result.evaluate_metrics_serverapp[round] = numbers


def _refuse_other_state(given: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    same = given.keys() == held.keys() and all(torch.equal(given[name], held[name].cpu()) for name in given)
    if not same:
        raise ParameterError(
            "initial_arrays is another state than the server's. Leave it out: FederatedServer(state, ...) has it."
        )
