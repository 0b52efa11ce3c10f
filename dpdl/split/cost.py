"""What split, federated and large-batch training cost: bytes on the network, and arithmetic at the clients.

    network = measure_network([bottom, top], parties=("client", "server"), example=torch.zeros(1, 1, 28, 28))
    print(compare(network, Workload(clients=100, records=60_000, epochs=10)))

Split learning sends rows: what it moves grows with the records, and hardly with the clients. Federated learning sends
weights: what it moves grows with the clients and the rounds, and not with the records. So there is a number of clients
from which on split learning moves less (`break_even`), and which side of it one is on is arithmetic, not an opinion.

Arithmetic is counted by torch's flop counter on the network itself; bytes by the formulas below, which hold to the byte
for tensors and within a few bytes for frames (tests/split/cost compares both with a channel's counters).

Public: everything.

References:
    [1] Singh et al., Detailed comparison of communication efficiency of split learning and federated learning, 2019.
        arXiv:1909.09145. Its formulas count one crossing of the cut for each record; here both directions count.
    [2] Vepakomma et al., Split learning for health, 2018. arXiv:1812.00564 (comparison with large-batch and federated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from dpdl.errors import ParameterError
from dpdl.split import frames
from dpdl.split.channel import Packet, Value
from dpdl.split.cost_report import CostReport, SchemeCost
from dpdl.split.network_cost import NetworkCost
from dpdl.split.weight_sync import Sync

__all__ = ["Labels", "Workload", "break_even", "compare", "frame_bytes"]

Labels = Literal["shared", "server", "stay"]

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
LABEL_BYTES = 8  # of a label, or of a row number that stands for one: int64


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Who trains on what for how long.

    Attributes:
        clients: K, with equally many records each.
        records: p, of all clients together.
        epochs: passes over all records, in all three ways of training.
        rounds: averages of federated learning; by default one for each epoch.
        batch_size: records in a step, of one client in split learning (all of its records, if it has fewer), of all
            clients together in large-batch training.
        sync: how the client's weights get from one client to the next, once an epoch: "peer_to_peer", "server", "none".
        labels: "shared" (sent with the rows), "server" (its own; row numbers are sent), "stay" (a U-shape).
        dtype: of rows, weights and gradients on the way.

    Raises:
        ParameterError: a value is out of range.
    """

    clients: int
    records: int
    epochs: float
    rounds: float | None = None
    batch_size: int = 64
    sync: Sync = "peer_to_peer"
    labels: Labels = "shared"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", self.epochs if self.rounds is None else self.rounds)
        for name in ("clients", "records", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ParameterError(f"{name} must be a whole number >= 1, got {value!r}.")
        for name in ("epochs", "rounds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ParameterError(f"{name} must be a finite number > 0, got {value!r}.")
        for name, choices in (("sync", get_args(Sync)), ("labels", get_args(Labels)), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in choices:
                raise ParameterError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}.")

    @property
    def steps(self) -> float:
        """Updates of large-batch training."""
        return self.epochs * self.records / self.batch_size

    @property
    def split_steps(self) -> float:
        """Updates of split learning, of all clients' turns: each client needs at least one an epoch."""
        return max(self.steps, self.epochs * self.clients)

    @property
    def width(self) -> int:
        """Bytes of one number."""
        return DTYPES[self.dtype]


def compare(network: NetworkCost, workload: Workload) -> CostReport:
    """Split, federated and large-batch training of the same network on the same records.

    Args:
        network: the network as `measure_network` has counted it.
        workload: the records, clients and batches.

    Raises:
        ParameterError: the workload's labels are not where the network's loss is.
    """
    _refuse_labels(network, workload)
    whole, at_client = network.flops(), network.flops("client")
    visits = workload.epochs * workload.records
    share = visits / workload.clients
    schemes = (
        _split(network, workload, share=share, at_client=at_client, visits=visits),
        _weights("federated", network, workload, times=_rounds(workload), flops=whole * share),
        _weights("large batch", network, workload, times=workload.steps, flops=whole * share),
    )
    return CostReport(
        clients=workload.clients,
        schemes=schemes,
        break_even={name: break_even(network, workload, against=name) for name in ("federated", "large batch")},
        assumptions=_assumptions(network, workload),
    )


def break_even(
    network: NetworkCost, workload: Workload, *, against: Literal["federated", "large batch"] = "federated"
) -> int | None:
    """The least number of clients with which split learning moves fewer bytes in all, of the same records.

    K > A / (f - s): A bytes at the cut, whatever the number of clients; f bytes for each client there, s bytes for each
    client here, to pass weights on and, where clients have less than a batch, for frames.

    Returns:
        The number, at least 1, from which on it is so; None if there is none, since a client costs as much here.
    """
    _refuse_labels(network, workload)
    times = _rounds(workload) if against == "federated" else workload.steps
    there = 2 * times * network.state * workload.width
    here = _passed_on(network, workload, counted="on the network")
    few = replace(workload, clients=1)
    at_cut = sum(_at_cut(network, few))
    frames_of_steps = sum(frame_bytes(network, few))
    crowd = workload.records / workload.batch_size  # with more clients, none has a whole batch
    gained = there - here - workload.epochs * frames_of_steps  # by each client beyond
    if gained <= 0:
        return None
    if at_cut < crowd * (there - here):
        return math.floor(at_cut / (there - here)) + 1
    return math.floor((at_cut - workload.epochs * crowd * frames_of_steps) / gained) + 1


def _split(network: NetworkCost, workload: Workload, *, share: float, at_client: float, visits: float) -> SchemeCost:
    sent, received = (both / workload.clients for both in _at_cut(network, workload))
    passed = _passed_on(network, workload, counted="at a client")
    return SchemeCost(
        name="split",
        client_sent=sent + passed / 2,
        client_received=received + passed / 2,
        total_bytes=workload.clients * (sent + received + _passed_on(network, workload, counted="on the network")),
        client_flops=at_client * share,
        server_flops=network.flops("server") * visits,
    )


def _weights(name: str, network: NetworkCost, workload: Workload, *, times: float, flops: float) -> SchemeCost:
    """Each time all weights go to every client, and as many numbers come back."""
    one_way = times * network.state * workload.width
    return SchemeCost(
        name=name,
        client_sent=one_way,
        client_received=one_way,
        total_bytes=workload.clients * 2 * one_way,
        client_flops=flops,
        server_flops=0.0,
    )


def _at_cut(network: NetworkCost, workload: Workload) -> tuple[float, float]:
    """Bytes that all clients together send and receive at the cut, frames included."""
    rows = {"client": 0.0, "server": 0.0}
    for _, sender, shape in network.crossings():
        rows[sender] += math.prod(shape) * workload.width
    if workload.labels != "stay":
        rows["client"] += LABEL_BYTES
    asked, answered = frame_bytes(network, workload)
    visits = workload.epochs * workload.records
    steps = workload.split_steps
    return rows["client"] * visits + asked * steps, rows["server"] * visits + answered * steps


def frame_bytes(network: NetworkCost, workload: Workload) -> tuple[int, int]:
    """Bytes of one step's requests and replies beyond the tensors: prefix, names, shapes, plain values.

    Counted on frames of one row; larger numbers in shapes and offsets add a few bytes.
    """
    dtype = getattr(torch, workload.dtype)
    crossings = network.crossings()
    beyond = {"client": 0, "server": 0}
    for visit in range(math.ceil(len(crossings) / 2)):
        kind = f"step.{visit}" if visit else "step"
        for side in ("client", "server"):
            place = 2 * visit + (side == "server")
            tensors = {}
            if place < len(crossings):
                name, _, shape = crossings[place]
                tensors[name] = torch.zeros(1, *shape, dtype=dtype)
            if place == 0 and workload.labels != "stay":
                tensors["y/y" if workload.labels == "shared" else "rows"] = torch.zeros(1, dtype=torch.int64)
            header: dict[str, Value] = {"done": True}
            if side == "client":
                header = {"session": f"client {16 * '0'}", "step": round(workload.steps), "client": "client"}
                header |= {"sender": "client", "exchanged": -1}
            frame = frames.encode(Packet(kind=kind, header=header, tensors=tensors))
            beyond[side] += len(frame) - sum(t.numel() * t.element_size() for t in tensors.values())
    return beyond["client"], beyond["server"]


def _passed_on(network: NetworkCost, workload: Workload, *, counted: Literal["at a client", "on the network"]) -> float:
    """Bytes for each client to get the client's weights and to pass them on, each epoch."""
    if workload.sync == "none":
        return 0.0
    ways = 1 if workload.sync == "peer_to_peer" and counted == "on the network" else 2
    return ways * workload.epochs * network.client_state * workload.width


def _rounds(workload: Workload) -> float:
    assert workload.rounds is not None  # __post_init__
    return workload.rounds


def _refuse_labels(network: NetworkCost, workload: Workload) -> None:
    if network.labels_stay != (workload.labels == "stay"):
        where = "client" if network.labels_stay else "server"
        raise ParameterError(
            f"labels are '{workload.labels}', but the last stretch is the {where}'s. Labels stay exactly where the "
            "client computes the last stretch: give it one, or choose labels 'shared' or 'server'."
        )


def _assumptions(network: NetworkCost, workload: Workload) -> tuple[str, ...]:
    asked, answered = frame_bytes(network, workload)
    batch = min(workload.batch_size, workload.records / workload.clients)
    clients = f"{workload.clients:,} client{'s' if workload.clients > 1 else ''}"
    cuts = " and ".join(
        f"{math.prod(piece.shape):,} numbers a row {tuple(piece.shape)}" for piece in network.pieces[:-1]
    )
    labels = {
        "shared": f"labels are sent at each visit, {LABEL_BYTES} bytes a record",
        "server": f"the server has the labels; row numbers are sent at each visit, {LABEL_BYTES} bytes a record",
        "stay": "labels stay: the last stretch is the client's, and the cut is crossed twice",
    }
    sync = {
        "peer_to_peer": "once an epoch each client gets the client's weights from another one, counted once on the way",
        "server": "once an epoch each client fetches the client's weights from a server and leaves them there",
        "none": "each client keeps weights of its own, which nobody averages",
    }
    back = "activations and their gradients are both counted"
    if not any(name.startswith("d/") for name, _, _ in network.crossings()):
        back = "no gradient comes back, since nothing before the cut trains"
    return (
        f"{workload.records:,} records in equal shares at {clients}, {workload.epochs:g} epochs",
        f"the cut is {cuts}; {back}",
        f"weights and buffers: {network.state:,} numbers, {network.client_state:,} of them the client's",
        f"{workload.dtype} on the way, uncompressed",
        f"split: {workload.split_steps:,.0f} steps of {batch:g} records of one client, {asked + answered} bytes of "
        "frames a step",
        f"split: {labels[workload.labels]}",
        f"split: {sync[workload.sync]}",
        f"federated: {_rounds(workload):g} rounds; all clients take part in each, get all weights and send as many",
        f"large batch: {workload.steps:,.0f} steps of {workload.batch_size} records of all clients; in each step every "
        "client gets all weights and sends a gradient",
        "arithmetic: torch's flop counter, a multiplication and an addition are two; convolutions, matrix products and "
        "attention, forwards and backwards; not activations, norms, losses, optimizers, averaging",
        "arithmetic: plain steps; per-sample gradients, clipping and noise come on top",
        "all three need the same number of epochs, which accuracy decides and nobody has measured here",
        "not counted: greeting, probes, certificates, TLS, repeated requests, evaluation, inference",
    )
