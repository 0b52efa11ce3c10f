"""Private normalisation statistics over Flower: the server asks, each client releases its noisy moments once.

    def moments(context):
        return PrivateMoments(..., ledger=ledger_path(context), kept=ledger_path(context).with_suffix(".moments"))

    app = client_app(client, make_moments=moments)

    @server_side.main()
    def main(grid, context):
        answers = ask_moments(grid, clients=10)              # before the first round
        found = combined_moments(a for a in answers.values() if isinstance(a, NoisyMoments))

Flower makes a client anew for each message, so what was released is kept in a file: a server that asks again gets the
same, and nothing is spent. Moments that are not kept are refused, as is a ledger in memory.

That a client cannot release its moments (a value that is not finite, say) may be decided by its data, so it counts as a
round that was begun and not answered: `dpdl.federated.unanswered`. A spent budget is no secret of the data's.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from accountants import arguments
from dpdl.errors import BudgetExceededError, DataError, LedgerError, ParameterError, PrivacyError
from dpdl.federated.flower.nodes import Nodes
from dpdl.federated.flower.refusals import refusal_from_error
from dpdl.federated.messages import Refusal
from dpdl.federated.noisy_moments import NoisyMoments
from dpdl.federated.private_moments import PrivateMoments
from dpdl.federated.unanswered import unanswered_rounds_of
from dpdl.ledger_file import LedgerFile

__all__ = ["MOMENTS_QUERY", "answer_moments", "ask_moments"]

MOMENTS_QUERY = "query.dpdl_moments"
_MOMENTS = "dpdl.moments"
_LOG = logging.getLogger("dpdl.federated.flower")


# ── at the client ───────────────────────────────────────────────────────────────────────────────────


def answer_moments(make_moments: Callable[[Context], PrivateMoments] | None, context: Context) -> RecordDict | Refusal:
    """What the node answers to `MOMENTS_QUERY`. Raises nothing: what went wrong is in the node's own log.

    Args:
        make_moments: makes the node's moments from Flower's context; None if it releases none.
        context: the node's.
    """
    if make_moments is None:
        return Refusal(client="", round=0, reason="request", message="this client releases no moments")
    name, begun = "", False
    try:
        moments = make_moments(context)
        name = moments.name
        _refuse_forgetful(moments)
        found = moments.released
        if found is None:
            marks = unanswered_rounds_of(moments.ledger)
            marks.refuse_to_go_on(1)
            with marks.under_way(moments.run) as mark:
                begun = True
                try:
                    found = moments.release()
                except BudgetExceededError:
                    mark.answered = True  # the ledger has decided it, not the data
                    raise
                mark.answered = True
        return RecordDict({_MOMENTS: ConfigRecord({"json": json.dumps(found.to_dict())})})
    except Exception as error:  # a boundary: whatever has gone wrong, its text is the node's alone
        _LOG.exception("%s does not release its moments", name or "a client")
        reason = "failed" if begun or not isinstance(error, PrivacyError) else "request"
        if isinstance(error, BudgetExceededError):
            reason = "budget"
        text = f"{type(error).__name__}, see the node's own log"
        return Refusal(client=name, round=0, reason=reason, message=text)


def _refuse_forgetful(moments: PrivateMoments) -> None:
    """Raise if the next process would not know what this one has released."""
    if not isinstance(moments.ledger, LedgerFile):
        raise LedgerError(
            f"The moments of {moments.name!r} have a ledger in memory. Flower makes them anew for each message, so "
            "that it would forget what was spent. Give a LedgerFile, or a path."
        )
    if moments.kept is None:
        raise ParameterError(
            f"The moments of {moments.name!r} are not kept. Flower makes them anew for each message: a server that "
            "asks twice would have them released, and paid for, twice. Give PrivateMoments(..., kept=file)."
        )


# ── at the server ───────────────────────────────────────────────────────────────────────────────────


def ask_moments(
    grid: Grid, *, clients: int = 1, timeout: float = 3600.0, patience: float = 600.0
) -> dict[str, NoisyMoments | Refusal]:
    """Ask every client for its moments.

    Args:
        grid: Flower's.
        clients: how many clients to wait for.
        timeout: how many seconds to wait for their answers.
        patience: how many seconds to wait for the clients.

    Returns:
        By client, in the order of their names: noisy moments, which are released and may be kept; or why there are
        none: "budget", "request", "failed" or "lost". Give the former to `combined_moments`.

    Guarantee:
        Each client's own: its ledger bounds what the moments spent. Nothing is added here.

    Raises:
        ChannelError: too few clients are there.
        ParameterError: an argument is out of range.
    """
    arguments.positive_whole("clients", clients, remedy="Give the number of clients to wait for.")
    if not timeout > 0 or not patience > 0:
        raise ParameterError(f"timeout and patience must be above 0 seconds, got {timeout!r} and {patience!r}.")
    nodes = Nodes()
    nodes.meet(grid, at_least=clients, timeout=patience)
    asked = {name: node for name in nodes.names if (node := nodes.node_of(name)) is not None}
    questions = {
        name: Message(content=RecordDict(), dst_node_id=node, message_type=MOMENTS_QUERY, ttl=timeout)
        for name, node in asked.items()
    }
    answers = list(grid.send_and_receive(list(questions.values()), timeout=timeout))
    return {name: _answer_to(question, answers, name) for name, question in questions.items()}


def _answer_to(question: Message, answers: list[Message], name: str) -> NoisyMoments | Refusal:
    for answer in answers:
        if answer.metadata.reply_to_message_id != question.metadata.message_id:
            continue
        if answer.has_error():
            return refusal_from_error(answer.error, client=name, round=0)
        try:
            moments = _from_record(answer.content)
        except (DataError, ParameterError) as error:
            return Refusal(client=name, round=0, reason="failed", message=str(error))
        if moments.client != name:
            why = f"it answered as {moments.client!r}"
            return Refusal(client=name, round=0, reason="failed", message=why)
        return moments
    return Refusal(client=name, round=0, reason="lost", message="no answer came in time")


def _from_record(content: RecordDict) -> NoisyMoments:
    text = content.config_records.get(_MOMENTS, ConfigRecord()).get("json")
    if not isinstance(text, str):
        raise DataError("The answer has no moments. The ClientApp must be made by client_app(..., make_moments=...).")
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"The moments in the answer cannot be read: {error}.") from error
    return NoisyMoments.from_dict(values)
