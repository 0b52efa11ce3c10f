"""A party that answers: it is asked by packets, and asks those further from the driver.

    server = SplitServer(graph, "server", plan=plan, optimizer=optimizer)
    serve("10.0.0.5:50051", ReplayGuard(server.handle), tls=tls)

It trains with one client after another; a walk of one that is begun while another one's is open ends that one.
What it refuses, it raises; whoever carries packets says so in a packet of kind "error".
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from dpdl.claims import AdversaryReport
from dpdl.errors import ChannelError, ManifestError, StepError
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.plan import PrivacyPlan
from dpdl.split.agreed_terms import hold_to
from dpdl.split.begin import PROBE_ROWS, begin_walk
from dpdl.split.channel import Channel, Packet, Value
from dpdl.split.claims_of_run import report_of_run
from dpdl.split.client_run import Client
from dpdl.split.clip import Clip
from dpdl.split.columns import Columns
from dpdl.split.drivers import default_driver
from dpdl.split.flow import Address, WalkKind
from dpdl.split.graph import SplitGraph
from dpdl.split.handshake import TERMS, AgreedChannel
from dpdl.split.manifest import Manifest
from dpdl.split.outlet import Outlet
from dpdl.split.party import Party
from dpdl.split.probe_evidence import Seen, compared_probe
from dpdl.split.walk import KINDS, ROWS, WEIGHTS, Peers, Walk, refuse_wrong_reply

__all__ = ["DEFAULT_TIMEOUT", "SplitServer"]

DEFAULT_TIMEOUT = 60.0
_WALKS: dict[str, WalkKind] = {"step": "train", "probe": "probe", "infer": "infer"}


@dataclass(kw_only=True)
class _Session:
    """One driver's process, as this party knows it."""

    client: Client
    last: dict[WalkKind, int] = field(default_factory=dict)
    before: Seen | None = None  # the probe with nothing exchanged


@final
class SplitServer:
    """One party of a split network that answers packets.

    Args:
        graph: all of it, with this party's modules and losses.
        party: which party this is.
        plan: what it is held to with its client; or client to plan, if there are several.
        optimizer: of its parts' parameters; None if none trains.
        data: its own columns, by name, or None.
        channels: to the parties that it asks, if any: those further from the driver.
        driver: the party that begins the steps; by default the owner of the data.
        clip: as all parties agree; by default the plan's norm in equal parts.
        release: the door through which rows leave; by default as they are.
        ledger: where what is spent on its clients' records adds up.
        execution: speed and memory.
        timeout: seconds to wait for those it asks.

    Guarantee:
        It trains as its plan says, or refuses. What it claims of its own records is in `report`.

    Raises:
        ParameterError, ModelError, WrapError: something does not fit; nothing was changed.
        ChannelError: channels are not those to the parties that it asks.
    """

    def __init__(
        self,
        graph: SplitGraph,
        party: str = "server",
        *,
        plan: PrivacyPlan | Mapping[str, PrivacyPlan],
        optimizer: torch.optim.Optimizer | None = None,
        data: Columns | Mapping[str, Tensor] | None = None,
        channels: Mapping[str, Channel] | None = None,
        driver: str | None = None,
        clip: Clip | None = None,
        release: Outlet | None = None,
        ledger: Ledger | LedgerFile | None = None,
        execution: Execution | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        driver = driver or default_driver(graph)
        columns = data if isinstance(data, Columns) or data is None else Columns(data)
        self.party = Party(
            graph,
            party,
            driver=driver,
            optimizer=optimizer,
            columns=columns,
            outlet=release,
            ledger=ledger,
            execution=execution,
        )
        self._peers = peers_of(self.party, channels or {}, timeout)
        for client, one in (plan if isinstance(plan, Mapping) else {driver: plan}).items():
            self.party.admit(client, one, clip)
        self._lock = threading.RLock()
        self._sessions: dict[str, _Session] = {}
        self._walk: Walk | None = None  # the last one: who asks again after its end is told so
        self._waiting: Walk | None = None  # done, until its rows' weights come

    def handle(self, packet: Packet) -> Packet:
        """Answer one request, a packet.

        Raises:
            PrivacyError: it is refused; what it would have spent was not spent.
            ChannelError: a packet of an unknown kind, or one that lacks something.
            ManifestError: the client has agreed to another run.
            StepError: it is of no open session, or of a step that was begun before.
        """
        with self._lock:
            kind, _, again = packet.kind.partition(".")
            if kind == "hello":
                return self._hello(packet)
            session = self._session(packet)
            if kind in _WALKS:
                return self._visited(packet, session, _WALKS[kind], again=bool(again))
            if kind == "finish":
                self._take_weights(packet, session)
                return Packet(kind=packet.kind)
            raise ChannelError(f"'{self.party.name}' does not know requests of kind {packet.kind!r}.")

    def report(self, delta: float, *, client: str | None = None) -> AdversaryReport:
        """What may be claimed about this party's own records, adversary by adversary.

        Args:
            delta: of each claim.
            client: in whose run; by default the driver's.
        """
        return report_of_run(self.party, self.party.client(client or self.party.driver), delta=delta)

    def state_dict(self) -> dict[str, Any]:
        """This party's weights, optimizer and spending, as `Party.state_dict`. Take it between a client's runs."""
        with self._lock:
            return self.party.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; clients begin new sessions. As `Party.load_state_dict`."""
        with self._lock:
            self.party.load_state_dict(state)
            self._sessions, self._walk, self._waiting = {}, None, None

    # ── sessions ────────────────────────────────────────────────────────────────────────────────────

    def _hello(self, packet: Packet) -> Packet:
        session, client = _text(packet, "session"), self.party.client(_text(packet, "client"))
        if packet.header.get("agreement") != client.agreement:
            raise ManifestError(
                f"'{packet.header.get('sender')}' and '{self.party.name}' have not agreed on the same run for client "
                f"'{client.name}': graph, driver, plan and clip must be the same at all parties. Compare them."
            )
        if isinstance(terms := packet.header.get(TERMS), str):  # from the gate in front
            hold_to(self.party, client, Manifest.from_json(terms))
        say_hello(self.party, self._peers, client, session)
        self._sessions.setdefault(session, _Session(client=client))
        return Packet(kind=packet.kind)

    def _session(self, packet: Packet) -> _Session:
        session = _text(packet, "session")
        if session not in self._sessions:
            raise StepError(
                f"'{self.party.name}' does not know session {session!r}: it was restarted, or never greeted. Begin "
                "anew with a hello."
            )
        return self._sessions[session]

    # ── walks ───────────────────────────────────────────────────────────────────────────────────────

    def _visited(self, packet: Packet, session: _Session, kind: WalkKind, *, again: bool) -> Packet:
        tensors = dict(packet.tensors)
        rows, weights = tensors.pop(ROWS, None), tensors.pop(WEIGHTS, None)
        number = packet.header.get("step")
        if type(number) is not int or number < 0:
            raise ChannelError(f"The step of a request must be a whole number >= 0, got {number!r}.")
        address = Address(kind=kind, session=_text(packet, "session"), number=number)
        sender = _text(packet, "sender")
        if self._walk is None or self._walk.address != address:
            refuse_over(self.party, session, address, again=again)
            if weights is not None:
                self._take_weights(packet, session)
            self._walk = self._begun(address, session, packet, rows, weights, tensors)
        walk = self._walk
        walk.flow.refuse(tensors, sender=sender)
        try:
            answer = walk.visit(tensors, sender=sender)
            self._look_at_probe(walk, session)
        except BaseException:
            self._walk = None  # it is over; the next step is another one
            raise
        if walk.done and walk.joint and kind == "train":
            self._waiting = walk
        return Packet(kind=packet.kind, header=walk.header(), tensors=answer)

    def _begun(
        self,
        address: Address,
        session: _Session,
        packet: Packet,
        rows: Tensor | None,
        weights: Tensor | None,
        brought: Mapping[str, Tensor],
    ) -> Walk:
        exchanged = packet.header.get("exchanged", -1)
        if type(exchanged) is not int or not -1 <= exchanged < PROBE_ROWS:
            raise ChannelError(f"The exchanged row is a number from 0 to {PROBE_ROWS - 1}, or -1; got {exchanged!r}.")
        walk = begin_walk(
            self.party,
            session.client,
            address,
            self._peers,
            row_numbers=rows,
            weights=weights,
            exchanged=exchanged,
            brought=brought,
            sender=_text(packet, "sender"),
        )
        if address.kind == "train":
            self._waiting = None  # a step whose weights never came is over
        session.last[address.kind] = address.number
        return walk

    def _take_weights(self, packet: Packet, session: _Session) -> None:
        waiting, self._waiting = self._waiting, None
        weights = packet.tensors.get(WEIGHTS)
        if weights is None:
            raise ChannelError("The rows' weights are missing.")
        if waiting is not None and waiting.client is session.client:
            waiting.take_weights(weights)
        if packet.kind == "finish":
            finish_others(self.party, self._peers, packet.header, weights)

    def _look_at_probe(self, walk: Walk, session: _Session) -> None:
        if walk.address.kind == "probe" and walk.flow.finished:
            session.before, _ = compared_probe(walk, session.before)


def refuse_over(party: Party, session: _Session, address: Address, *, again: bool) -> None:
    """Raise if a walk that is not under way cannot begin any more.

    Raises:
        StepError: it, or a later one, was begun before.
    """
    if again or address.number <= session.last.get(address.kind, -1):
        raise StepError(
            f"{KINDS[address.kind].capitalize()} {address.number} of this session is over at '{party.name}'. A step is "
            "taken once: go on with the next one."
        )


def peers_of(party: Party, channels: Mapping[str, Channel], timeout: float) -> Peers:
    """A party's channels, if there is one to each party that it asks.

    Raises:
        ChannelError: one is missing, or for nobody.
    """
    asked = party.calls[party.name]
    if set(asked) != set(channels):
        raise ChannelError(
            f"'{party.name}' asks {list(asked)} when '{party.driver}' drives, but has channels to {sorted(channels)}. "
            "Give it one to each of those, and to no others."
        )
    return Peers(channels=dict(channels), timeout=timeout)


def say_hello(party: Party, peers: Peers, client: Client, session: str) -> None:
    """Greet those that a party asks, and so everybody further away.

    Raises:
        ManifestError, ChannelError: somebody has agreed on something else, or does not answer; or this party has signed
            another run than this one.
    """
    for channel in peers.channels.values():
        if isinstance(channel, AgreedChannel):
            hold_to(party, client, channel.terms)
    for child, channel in peers.channels.items():
        header: dict[str, Value] = {
            "session": session,
            "step": 0,
            "client": client.name,
            "sender": party.name,
            "agreement": client.agreement,
        }
        refuse_wrong_reply(channel.request("hello", header, {}, timeout=peers.timeout), "hello", child)


def finish_others(party: Party, peers: Peers, header: Mapping[str, Value], weights: Tensor) -> None:
    """Pass the last step's weights on."""
    told: dict[str, Any] = {**header, "sender": party.name}
    for child, channel in peers.channels.items():
        reply = channel.request("finish", told, {WEIGHTS: weights}, timeout=peers.timeout)
        refuse_wrong_reply(reply, "finish", child)


def _text(packet: Packet, name: str) -> str:
    value = packet.header.get(name)
    if not isinstance(value, str) or not value:
        raise ChannelError(f"The header of '{packet.kind}' needs a text '{name}', got {value!r}.")
    return value
