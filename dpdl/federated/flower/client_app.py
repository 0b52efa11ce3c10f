"""A client of dpdl's as Flower's `ClientApp`.

    def client(context):                                # once a message: Flower keeps no process for a node
        return make_client(*partition(context), ledger=ledger_path(context))

    app = client_app(client)

What a client has spent is in its own ledger file, and nowhere else that counts: Flower's `context.state` lives in the
memory of a SuperNode and is gone when that starts again. The app keeps a note there of what the ledger held, and
refuses if the file holds less: somebody has put back an older one.

Nothing but what the client means to send goes out. If anything breaks, the text of the exception stays in the node's
own log, and the server gets its type: Flower would send the text, which may quote a row of the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod

from dpdl.errors import LedgerError, ParameterError
from dpdl.federated.flower.moments import MOMENTS_QUERY, answer_moments
from dpdl.federated.flower.nodes import NAME_QUERY, name_reply
from dpdl.federated.flower.records import record_from_reply, request_from_record
from dpdl.federated.flower.refusals import error_from_refusal
from dpdl.federated.messages import Client, Refusal
from dpdl.federated.private_moments import PrivateMoments
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile

__all__ = ["client_app", "ledger_path", "partition"]

_LOG = logging.getLogger("dpdl.federated.flower")
_NOTE = "dpdl.ledgers"  # in context.state


def client_app(
    make_client: Callable[[Context], Client],
    *,
    mods: Sequence[Mod] = (),
    make_moments: Callable[[Context], PrivateMoments] | None = None,
) -> ClientApp:
    """A `ClientApp` that answers `DPStrategy`, and, if it has moments, `ask_moments`.

    Args:
        make_client: makes the node's client from Flower's context. It is called for each message, possibly in a new
            process, so whatever the client must remember is in files.
        mods: Flower's, around training; not those of its differential privacy, which take replies for weights.
        make_moments: makes what the client releases for normalisation, of the client's name, over a ledger file, and
            `kept` in a file. By default it releases none.

    Returns:
        An app with a handler of training, one that tells the client's name, and one for its moments. Exceptions become
        error messages that name their type; what they say stays in the node's log.

    Guarantee:
        That of the client which `make_client` makes: what leaves is its reply and its inventory.

    Raises:
        ParameterError: a mod that clips or noises what it takes for weights.
    """
    for mod in mods:
        if isinstance(mod, LocalDpMod) or mod in (fixedclipping_mod, adaptiveclipping_mod):
            raise ParameterError(
                f"mods has {getattr(mod, '__name__', type(mod).__name__)}, which expects a reply to hold weights; "
                "dpdl's hold updates. Wrap the client in LocalUpdateDP, or give the server a ClientLevelPlan."
            )
    app = ClientApp()

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        answer = _answer(make_client, message, context)
        if isinstance(answer, Refusal):
            _LOG.warning("round %d refused (%s): %s", answer.round, answer.reason, answer.message)
            return Message(error_from_refusal(answer), reply_to=message)
        return Message(answer, reply_to=message)

    @app.query(NAME_QUERY.removeprefix("query."))
    def tell_name(message: Message, context: Context) -> Message:
        try:
            return Message(name_reply(make_client(context).name), reply_to=message)
        except Exception as error:  # as in `_answer`
            _LOG.exception("the client of node %d could not be made", context.node_id)
            refusal = Refusal(client="", round=0, reason="failed", message=_of(error))
            return Message(error_from_refusal(refusal), reply_to=message)

    @app.query(MOMENTS_QUERY.removeprefix("query."))
    def tell_moments(message: Message, context: Context) -> Message:
        answer = answer_moments(make_moments, context)
        content = error_from_refusal(answer) if isinstance(answer, Refusal) else answer
        return Message(content, reply_to=message)

    return app


def partition(context: Context) -> tuple[int, int]:
    """Which partition the node holds, of how many: its "partition-id" and "num-partitions".

    Flower's simulation sets both. A SuperNode has them from its command line:
    `--node-config 'partition-id=0 num-partitions=2'`.

    Args:
        context: of the node, as Flower gives it to an app.

    Returns:
        Index and number, 0 <= index < number. They are for making the client's data and name; nothing proves that a
        node holds the partition it says.

    Raises:
        ParameterError: the node has none.
    """
    index, number = context.node_config.get("partition-id"), context.node_config.get("num-partitions")
    if not isinstance(index, int) or not isinstance(number, int) or not 0 <= index < number:
        raise ParameterError(
            f"The node's configuration has partition-id={index!r} and num-partitions={number!r}. Start the SuperNode "
            "with --node-config 'partition-id=0 num-partitions=2'."
        )
    return index, number


def ledger_path(context: Context) -> Path:
    """Where the node's ledger is, which its owner decides.

    "ledger" in the node's configuration is the file. Without it, "ledger-folder" in the node's or the run's
    configuration is a folder that has one file for each partition: that is for simulations. Whoever submits a run
    decides its configuration, and could name an empty folder.

    Args:
        context: of the node, as Flower gives it to an app.

    Returns:
        An absolute path; neither file nor folder is made.

    Raises:
        ParameterError: neither is given, or the path depends on the folder that a process happens to start in.
    """
    if (file := context.node_config.get("ledger")) is not None:
        return _absolute(str(file))
    folder = context.node_config.get("ledger-folder", context.run_config.get("ledger-folder"))
    if folder is None:
        raise ParameterError(
            "The node has no ledger. Start the SuperNode with --node-config 'ledger=\"/path/of/its/own.ledger\" ...', "
            "or, for a simulation, run with --run-config 'ledger-folder=\"/path/of/a/folder\"'."
        )
    return _absolute(str(folder)) / f"client-{partition(context)[0]}.ledger"


def _absolute(path: str) -> Path:
    given = Path(path).expanduser()
    if not given.is_absolute():
        raise ParameterError(
            f"The ledger's path {path!r} is not absolute: Flower runs each message in a process and folder of its own "
            "choosing, and a ledger elsewhere would start from nothing. Give the whole path."
        )
    return given


# ── one round ───────────────────────────────────────────────────────────────────────────────────────


def _answer(make_client: Callable[[Context], Client], message: Message, context: Context) -> RecordDict | Refusal:
    round, name = 0, ""
    try:
        request = request_from_record(message.content)
        round = request.round
        client = make_client(context)
        name = client.name
        _refuse_forgetful(client, context, request.federation)
        answer = client.answer(request)
        _note_ledgers(client, context, request.federation)
        return answer if isinstance(answer, Refusal) else record_from_reply(answer)
    except LedgerError as error:
        _LOG.exception("round %d of %s is refused", round, name or "a client")
        return Refusal(client=name, round=round, reason="request", message=f"its ledger: {_of(error)}")
    except Exception as error:  # a boundary: whatever has gone wrong, its text is the node's alone
        _LOG.exception("round %d of %s broke off", round, name or "a client")
        return Refusal(client=name, round=round, reason="failed", message=_of(error))


def _of(error: Exception) -> str:
    return f"{type(error).__name__}, see the node's own log"


def _ledgers(client: object) -> Iterator[LedgerFile | Ledger]:
    """Of a client and of those it wraps."""
    inner: object | None = client
    while inner is not None:
        ledger = getattr(inner, "ledger", None)
        if ledger is not None:
            yield ledger
        inner = getattr(inner, "client", None)


def _refuse_forgetful(client: Client, context: Context, federation: str) -> None:
    """Raise if what was spent in earlier rounds would be, or has been, forgotten."""
    note = context.state.config_records.get(_NOTE, ConfigRecord())
    known = set()
    for ledger in _ledgers(client):
        if not isinstance(ledger, LedgerFile):
            raise LedgerError(
                f"The client '{client.name}' has a ledger in memory. Flower makes it anew for each round, so that it "
                "would forget what it spent. Give it a LedgerFile, or a path."
            )
        known.add(ledger.id)
        before, now = note.get(ledger.id, 0), _releases(ledger, federation)
        if isinstance(before, int) and now < before:
            raise LedgerError(
                f"The ledger {ledger.path} has {now} releases to '{federation}', and had {before}: it is an older "
                "copy. Put the newest one back."
            )
    if gone := set(note) - known:
        raise LedgerError(
            f"The ledger {sorted(gone)[0]} of the client '{client.name}' has given way to another one in mid-run. Put "
            "it back, or submit a new run if the data is another."
        )


def _note_ledgers(client: Client, context: Context, federation: str) -> None:
    """Keep in `context.state` how many releases each ledger has."""
    context.state[_NOTE] = ConfigRecord(
        {ledger.id: _releases(ledger, federation) for ledger in _ledgers(client) if isinstance(ledger, LedgerFile)}
    )


def _releases(ledger: LedgerFile, federation: str) -> int:
    """Of this federation's rounds alone: another process may hold some for others, and give them back."""
    return sum(entry.count for entry in ledger.entries if entry.run.startswith(f"{federation}/"))
