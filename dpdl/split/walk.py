"""One walk at one party: what arrives, what is computed, whom it asks, and what it answers.

A party is asked by those nearer to the driver and asks those further away (`SplitGraph.calls`). On each visit it takes
what it is brought, computes what it can, asks whoever it has something for, again until nothing moves, and answers
with what it has for the one who asked. So one visit goes as deep into the network as the rows can, and a chain of any
length, with vanilla as the shortest, is one round trip from hop to hop; a U-shape is two.

With joint clipping the answers carry norms towards the driver, and the next walk's requests carry the weights back,
before anything else is done with them: no further round trip, and the same steps as if there had been one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from dpdl.errors import ChannelError
from dpdl.per_sample.randomness import isolated_randomness
from dpdl.split.channel import Channel, Packet, Value
from dpdl.split.client_run import Client
from dpdl.split.clip import JointClip
from dpdl.split.clipped_parts import ClippedParts, joined_norms
from dpdl.split.flow import Address, Flow
from dpdl.split.party import Party

__all__ = ["KINDS", "Peers", "Walk", "refuse_wrong_reply"]

KINDS = {"train": "step", "probe": "probe", "infer": "infer"}  # walks to the kinds of their packets
NORMS, WEIGHTS, ROWS = "norms", "weights", "rows"
_PREDICTIONS = "p/"
_PROBE_SEED = 20181203  # of everybody's dropout while a probe runs: twice the same


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Whom a party asks.

    Attributes:
        channels: party to the channel to it.
        timeout: seconds to wait for an answer.
    """

    channels: Mapping[str, Channel]
    timeout: float


@final
@dataclass(kw_only=True)
class Walk:
    """One party's side of one walk.

    Args:
        party: whose.
        client: whose records walk.
        address: which walk.
        flow: computes.
        sums: collects what the parts' gradients add up to.
        position: of the party's noise; None outside of training.
        peers: whom to ask.
        row_numbers: to be told to those who have data of the same records; None if there are none to tell.
        weights: of the step before, to be passed on; None if there are none.
    """

    party: Party
    client: Client
    address: Address
    flow: Flow
    sums: ClippedParts
    position: int | None
    peers: Peers
    row_numbers: Tensor | None
    weights: Tensor | None
    exchanged: int = -1
    visits: dict[str, int] = field(default_factory=dict)
    done_there: dict[str, bool] = field(default_factory=dict)
    updated: bool = False

    def __post_init__(self) -> None:
        self._norms: list[Tensor] = []
        self._normed: set[str] = set()  # whose norms are among them
        self._passed_on: tuple[str, ...] = ()  # whose went with the last answer
        self._told_own_norms = False
        self._predicted = False
        self._bubbling: dict[str, Tensor] = {}  # predictions on their way to the driver
        self._children = self.party.calls[self.party.name]

    @property
    def done(self) -> bool:
        """Whether nothing is left to be computed or sent, here and further away."""
        if not self.flow.finished or any(self.flow.outbox.values()):
            return False
        return all(self.done_there.get(child, False) for child in self._children)

    @property
    def joint(self) -> bool:
        """Whether rows wait for their weights."""
        return isinstance(self.client.clip, JointClip)

    def visit(self, tensors: Mapping[str, Tensor], *, sender: str) -> dict[str, Tensor]:
        """Take what is brought, go as far as possible, and answer.

        Args:
            tensors: by their names on the way.
            sender: who brings them and gets the answer; "" if the driver begins.

        Raises:
            ChannelError: they are not what is waited for.
        """
        with _same_chances(self.address):
            self.flow.refuse(tensors, sender=sender)
            self.flow.accept(tensors, sender=sender)
            moved = self._go_on()
            if not (moved or tensors):
                for child in self._children:
                    if not self.done_there.get(child, False):
                        self._ask(child)
                self._go_on()
            self._finish()
        return self._answer(sender)

    def _go_on(self) -> bool:
        """Compute and ask until nothing moves; whether anything did."""
        moved = False
        while True:
            self.flow.advance()
            child = next((c for c in self._children if self._has_something_for(c)), None)
            if child is None:
                return moved
            moved = True
            self._ask(child)

    def _has_something_for(self, child: str) -> bool:
        if self.flow.outbox.get(child):
            return True
        return not self.visits.get(child) and self._waits_to_begin(child)

    def _waits_to_begin(self, child: str) -> bool:
        """Whether a party needs to be told that a walk begins: it, or one it will ask, has data of its own."""
        labels = self.address.kind != "infer"
        owners = {self.party.graph.columns[c] for c in self.party.graph.columns if labels or c in self._fed}
        return bool(owners & self._further(child))

    @property
    def _fed(self) -> set[str]:
        return {name for part in self.party.graph.parts for name in part.inputs}

    def _further(self, child: str) -> set[str]:
        found, left = {child}, [child]
        for party in left:
            new = [p for p in self.party.calls[party] if p not in found]
            found.update(new)
            left += new
        return found

    def _ask(self, child: str) -> None:
        tensors = self.flow.outbox.pop(child, {})
        first = not self.visits.get(child)
        if first and self.row_numbers is not None and self._waits_to_begin(child):
            tensors[ROWS] = self.row_numbers
        if first and self.weights is not None:
            tensors[WEIGHTS] = self.weights
        reply = self._request(child, tensors)
        got = dict(reply.tensors)
        if (norms := got.pop(NORMS, None)) is not None:
            self._take_norms(norms, reply.header.get("normed"), sender=child)
        for key in [key for key in got if key.startswith(_PREDICTIONS)]:
            self._bubbling[key] = got.pop(key)
        self.flow.refuse(got, sender=child)
        self.flow.accept(got, sender=child)
        self.done_there[child] = bool(reply.header.get("done"))

    def _take_norms(self, norms: Tensor, of: Value | None, *, sender: str) -> None:
        if not (self.joint and self.address.kind == "train"):
            raise ChannelError(f"'{sender}' sent norms of rows, which '{self.party.name}' does not wait for.")
        if norms.ndim != 1 or not norms.is_floating_point() or self.flow.size not in (None, len(norms)):
            raise ChannelError(
                f"'{sender}' sent norms of shape {tuple(norms.shape)} and {norms.dtype}; they are floating point "
                f"numbers, one for each of {self.flow.size} rows."
            )
        if bool((norms < 0).any()):
            raise ChannelError(f"'{sender}' sent norms below 0.")
        names = of.split("\n") if isinstance(of, str) else []
        if not names or set(names) - set(self.party.graph.parties) or set(names) & self._normed:
            raise ChannelError(f"'{sender}' sent norms of {of!r}; they are each party's, once in a step.")
        self._norms.append(norms)
        self._normed.update(names)

    def _request(self, child: str, tensors: Mapping[str, Tensor]) -> Packet:
        visit = self.visits.get(child, 0)
        self.visits[child] = visit + 1
        kind = KINDS[self.address.kind] + (f".{visit}" if visit else "")
        header: dict[str, Value] = {
            "session": self.address.session,
            "step": self.address.number,
            "client": self.client.name,
            "sender": self.party.name,
            "exchanged": self.exchanged,
        }
        on_the_way = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        reply = self.peers.channels[child].request(kind, header, on_the_way, timeout=self.peers.timeout)
        refuse_wrong_reply(reply, kind, child)
        return reply

    def _finish(self) -> None:
        """Once all gradients have come back to this party's parts."""
        if self.address.kind != "train" or not self.flow.finished or self.updated:
            return
        if not self.joint:
            self._update()
        elif not self._told_own_norms:
            own = self.sums.norms()
            if own is not None:
                self._norms.append(own)
                self._normed.add(self.party.name)
            self._told_own_norms = True

    def take_weights(self, weights: Tensor) -> None:
        """With joint clipping: the rows' weights have come, and the step can be taken."""
        if not self.updated and self.flow.finished and self.address.kind == "train":
            self.sums.take_weights(weights)
            self._update()

    def _update(self) -> None:
        assert self.position is not None
        self.updated = True  # before: whatever happens in it, this position's noise is used up
        self.party.update(self.client, self.sums, rows=self.flow.size or 0, position=self.position)

    def _answer(self, sender: str) -> dict[str, Tensor]:
        answer = self.flow.outbox.pop(sender, {})
        if sender:
            answer = {name: tensor.detach().cpu().contiguous() for name, tensor in answer.items()}
        if self.address.kind == "infer" and self.flow.finished and not self._predicted:
            self._predicted = True
            predictions = self.flow.predictions(sender or self.party.name)
            self._bubbling.update({f"{_PREDICTIONS}{name}": rows for name, rows in predictions.items()})
        answer.update(self._bubbling)
        self._bubbling = {}
        if sender and (norms := joined_norms(self._norms)) is not None:
            answer[NORMS] = norms
            self._passed_on = tuple(sorted(self._normed))
            self._norms, self._normed = [], set()
        return answer

    def header(self) -> dict[str, Value]:
        """What goes with the answer of the last visit, once."""
        passed_on, self._passed_on = self._passed_on, ()
        return {"done": self.done, **({"normed": "\n".join(passed_on)} if passed_on else {})}

    def all_norms(self) -> Tensor | None:
        """At the driver, of a walk that is done: each row's norm over all parts of all parties.

        Raises:
            ChannelError: some party that trains has not told its share; rows would be left longer than C.
        """
        missing = sorted({part.party for part in self.party.graph.trained} - self._normed)
        if self.flow.size and missing:
            raise ChannelError(
                f"{missing} have sent no norms of rows' gradients. With joint clipping every party that trains tells "
                "them; the step is not taken."
            )
        return joined_norms(self._norms)


def refuse_wrong_reply(reply: Packet, kind: str, peer: str) -> None:
    """Raise unless a reply is one to this request.

    Raises:
        ChannelError: the other party refused, or answers something else.
    """
    if reply.kind == "error":
        raise ChannelError(
            f"'{peer}' refused '{kind}': {reply.header.get('error', 'no reason')}: {reply.header.get('message', '')}"
        )
    if reply.kind != kind:
        raise ChannelError(f"'{peer}' answered '{reply.kind}' to '{kind}'.")


@contextmanager
def _same_chances(address: Address) -> Iterator[None]:
    """While a probe runs, dropout and the like are the same each time."""
    if address.kind != "probe":
        yield
        return
    with isolated_randomness(torch.device("cpu")):
        torch.manual_seed(_PROBE_SEED)
        yield
