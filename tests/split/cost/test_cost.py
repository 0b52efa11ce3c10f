"""What the calculator says, against bytes on a channel, arithmetic by hand, and the formulas of the literature."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dpdl
from dpdl.errors import ModelError, ParameterError
from dpdl.split.channel import Handler, Packet
from dpdl.split.cost import Labels, Workload, break_even, compare, frame_bytes
from dpdl.split.graph import SplitGraph
from dpdl.split.local_channel import LocalChannel
from dpdl.split.network_cost import NetworkCost, PieceCost, Side, measure_network
from dpdl.split.session import SplitRun
from dpdl.split.topologies import u_shaped, vanilla
from dpdl.split.weight_sync import WeightShelf, fetch_weights, leave_weights

RECORDS, BATCH, STEPS = 40, 10, 12
FRAME_SLACK = 32  # bytes a frame: digits of shapes, offsets and step numbers, rounded up to a multiple of 8


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def stretches() -> list[nn.Sequential]:
    torch.manual_seed(0)
    bottom = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten())
    return [bottom, nn.Sequential(nn.Linear(108, 20), nn.Tanh()), nn.Sequential(nn.Linear(20, 4))]


def network_of(labels: Labels, *, frozen: bool = False) -> tuple[SplitGraph, NetworkCost]:
    bottom, middle, top = stretches()
    bottom.requires_grad_(not frozen)
    example = torch.zeros(1, 1, 8, 8)
    if labels == "stay":
        sides: list[Side] = ["client", "server", "client"]
        cost = measure_network([bottom, middle, top], parties=sides, example=example)
        return u_shaped(bottom, middle, top, loss), cost
    rest = nn.Sequential(*middle, *top)
    cost = measure_network([bottom, rest], parties=["client", "server"], example=example)
    return vanilla(bottom, rest, loss, labels_of="server" if labels == "server" else "client"), cost


class Counted:
    """Rows that a handler is asked about in training steps, and bytes of all that it is told and says."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.rows = self.asked = self.answered = self.frames = 0

    def __call__(self, packet: Packet) -> Packet:
        reply = self._handler(packet)
        if packet.kind.startswith("step"):
            self.rows += len(next(iter(packet.tensors.values()))) if packet.kind == "step" else 0
            self.asked += sum(t.numel() * t.element_size() for t in packet.tensors.values())
            self.answered += sum(t.numel() * t.element_size() for t in reply.tensors.values())
            self.frames += 1
        return reply


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("labels", "frozen"), [("shared", False), ("server", False), ("stay", False), ("shared", True), ("stay", True)]
)
def test_bytes_on_a_channel_are_those_of_the_formula(labels: Labels, frozen: bool, dtype: str) -> None:
    graph, cost = network_of(labels, frozen=frozen)
    wide = getattr(torch, dtype)
    optimizers = {}
    for party in graph.parties:
        modules = [p.module for p in graph.parts if p.party == party]
        held = [w for m in modules if m is not None for w in m.to(wide).parameters() if w.requires_grad]
        if held:
            optimizers[party] = torch.optim.SGD(held, lr=0.1)
    x, y = torch.randn(RECORDS, 1, 8, 8, dtype=wide), torch.arange(RECORDS) % 4
    plan = dpdl.PrivacyPlan(
        sample_rate=BATCH / RECORDS,
        expected_batch_size=BATCH,
        steps=STEPS,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        dataset_size=RECORDS,
    )
    counters: list[Counted] = []

    def connect(handler: Handler) -> LocalChannel:
        counters.append(Counted(handler))
        return LocalChannel(counters[-1])

    run = SplitRun(graph, optimizers, {"x": x, "y": y}, plan, connect=connect)
    run.client.get_ready()
    (channel,), (counter,) = run.channels.values(), counters
    before = channel.bytes_sent, channel.bytes_received
    run.run()

    workload = Workload(
        clients=1,
        records=RECORDS,
        epochs=counter.rows / RECORDS,
        labels=labels,
        sync="none",
        dtype=dtype,
        batch_size=BATCH,
    )
    split = compare(cost, workload).scheme("split")
    asked, answered = frame_bytes(cost, workload)
    steps = workload.steps  # as the formula has it: of full batches; the run's were Poisson batches
    assert split.client_sent - asked * steps == pytest.approx(counter.asked, abs=1e-6)
    assert split.client_received - answered * steps == pytest.approx(counter.answered, abs=1e-6)
    trips = math.ceil(len(cost.crossings()) / 2)
    assert counter.frames == STEPS * trips
    for count, tensors, beyond, was in (
        (channel.bytes_sent, counter.asked, asked, before[0]),
        (channel.bytes_received, counter.answered, answered, before[1]),
    ):
        framed = count - was - tensors
        assert abs(framed - beyond * STEPS) <= FRAME_SLACK * STEPS * trips
        assert framed > 0


def test_weights_on_a_channel_are_those_of_the_formula() -> None:
    graph, cost = network_of("shared")
    bottom, top = (part.module for part in graph.parts)
    assert bottom is not None
    assert top is not None
    plan = dpdl.PrivacyPlan(
        sample_rate=0.5, expected_batch_size=20, steps=1, noise_multiplier=1.0, max_grad_norm=1.0, dataset_size=RECORDS
    )
    optimizers = {"client": torch.optim.SGD(bottom.parameters(), 0.1), "server": torch.optim.SGD(top.parameters(), 0.1)}
    data = {"x": torch.randn(RECORDS, 1, 8, 8), "y": torch.zeros(RECORDS, dtype=torch.int64)}
    run = SplitRun(graph, optimizers, data, plan)
    shelf = LocalChannel(WeightShelf().handle)
    leave_weights(run.client, shelf, number=0)
    fetch_weights(run.client, shelf, number=1)
    workload = Workload(clients=3, records=RECORDS, epochs=1, sync="server")
    without = compare(cost, replace(workload, sync="none")).scheme("split")
    passed = compare(cost, workload).scheme("split")
    each = passed.client_bytes - without.client_bytes
    assert passed.total_bytes - without.total_bytes == pytest.approx(3 * each)
    moved = shelf.bytes_sent + shelf.bytes_received
    assert each <= moved <= each + 4 * 400  # four frames
    relayed = compare(cost, replace(workload, sync="peer_to_peer")).scheme("split")
    assert relayed.total_bytes - without.total_bytes == pytest.approx(3 * each / 2)
    assert relayed.client_bytes == pytest.approx(passed.client_bytes)


def test_arithmetic_by_hand_and_of_the_whole_network() -> None:
    linear, rest = nn.Linear(6, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 3))
    cost = measure_network([linear, rest], parties=["client", "server"], example=torch.zeros(1, 6))
    assert cost.flops("client") == 2 * 30 + 2 * 30  # forwards, and the weights' gradient; nobody needs the input's
    assert cost.flops("server") == 2 * 15 + 2 * 15 + 2 * 15  # and the input's
    assert (cost.state, cost.client_state) == (35 + 18, 35)
    modules = stretches()
    counter = FlopCounterMode(display=False)
    with counter:
        nn.Sequential(*modules)(torch.zeros(7, 1, 8, 8)).sum().backward()
    cut = measure_network(modules, parties=["client", "server", "client"], example=torch.zeros(3, 1, 8, 8))
    assert cut.flops() * 7 == counter.get_total_flops()


def test_what_is_frozen_costs_no_backward_pass_and_gets_no_gradient() -> None:
    _, trained = network_of("shared")
    _, frozen = network_of("shared", frozen=True)
    assert frozen.flops("client") == trained.flops("client") / 2
    assert frozen.flops("server") < trained.flops("server")
    assert [name for name, _, _ in frozen.crossings()] == ["z/bottom"]
    assert [name for name, _, _ in trained.crossings()] == ["z/bottom", "d/bottom"]


def test_a_u_shape_crosses_four_times_in_turn() -> None:
    _, cost = network_of("stay")
    assert cost.crossings() == [
        ("z/bottom", "client", (108,)),
        ("z/middle", "server", (20,)),
        ("d/middle", "client", (20,)),
        ("d/bottom", "server", (108,)),
    ]


def test_measuring_leaves_the_network_and_torchs_random_numbers_alone() -> None:
    bottom, top = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Linear(4, 2)
    before = {name: t.clone() for name, t in bottom.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    measure_network([bottom, top], parties=["client", "server"], example=torch.ones(1, 4))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(t, before[name]) for name, t in bottom.state_dict().items())
    assert all(p.grad is None for p in bottom.parameters())


@pytest.mark.parametrize("sync", ["peer_to_peer", "server", "none"])
@pytest.mark.parametrize("against", ["federated", "large batch"])
@pytest.mark.parametrize("batch_size", [1, 20, 500])  # the last: no client has a whole batch
def test_split_moves_less_from_the_break_even_on_and_not_before(sync: str, against: str, batch_size: int) -> None:
    heavy = PieceCost(side="client", state=900, trains=True, flops=1.0, shape=(30,))
    light = PieceCost(side="server", state=100, trains=True, flops=1.0, shape=(2,))
    cost = NetworkCost(pieces=(heavy, light))
    workload = Workload(clients=1, records=2_000, epochs=3, rounds=5, sync=sync, batch_size=batch_size)  # type: ignore[arg-type]
    found = break_even(cost, workload, against=against)  # type: ignore[arg-type]
    assert found is not None
    for clients, less in ((found - 1, False), (found, True), (found + 1, True), (10 * found, True)):
        if not clients:
            continue
        report = compare(cost, replace(workload, clients=clients))
        assert (report.scheme("split").total_bytes < report.scheme(against).total_bytes) is less


def test_there_is_no_break_even_where_passing_weights_on_costs_as_much_as_averaging() -> None:
    _, cost = network_of("shared")
    workload = Workload(clients=5, records=100, epochs=100, rounds=1, sync="server")
    assert break_even(cost, workload) is None
    report = compare(cost, workload)
    assert "federated: with no number of clients" in str(report)


def test_the_formulas_of_singh_et_al() -> None:
    """arXiv:1909.09145: pq + eta N K numbers for split learning, one crossing counted; 2 N K for federated learning."""
    _, cost = network_of("shared")
    p, k = 1000, 7
    q, n, eta_n = 108, cost.state, cost.client_state
    workload = Workload(clients=k, records=p, epochs=1, batch_size=p)
    report = compare(cost, workload)
    framed = k * sum(frame_bytes(cost, workload))  # no client has a whole batch: each takes a step of its own
    assert report.scheme("split").total_bytes == 4 * (2 * p * q + eta_n * k) + 8 * p + framed
    assert report.scheme("federated").total_bytes == 4 * 2 * n * k
    assert report.scheme("federated").client_bytes == 4 * 2 * n
    assert report.scheme("large batch").client_bytes == 4 * 2 * n  # of one step


def test_every_setting_is_named_among_the_assumptions() -> None:
    _, cost = network_of("stay")
    workload = Workload(
        clients=13, records=7_000, epochs=2.5, rounds=17, batch_size=50, sync="server", labels="stay", dtype="bfloat16"
    )
    text = str(compare(cost, workload))
    for said in (
        "13 clients",
        "7,000 records",
        "2.5 epochs",
        "17 rounds",
        "350 steps of 50 records",
        "bfloat16",
        "labels stay",
    ):
        assert said in text
    assert "108 numbers" in text
    assert "from a server" in text
    values = json.loads(compare(cost, workload).to_json())
    assert set(values["schemes"]) == {"split", "federated", "large batch"}
    assert len(values["assumptions"]) > 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": 0},
        {"clients": True},
        {"records": 2.5},
        {"batch_size": 0},
        {"epochs": 0.0},
        {"epochs": math.inf},
        {"rounds": -1},
        {"sync": "sometimes"},
        {"labels": "gone"},
        {"dtype": "int8"},
    ],
)
def test_a_workload_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        Workload(**{"clients": 2, "records": 10, "epochs": 1.0, **wrong})  # type: ignore[arg-type]


def test_a_network_that_cannot_be_cut_so_is_refused() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    for parties in (["client"], ["server", "client"], ["client", "client"]):
        with pytest.raises(ParameterError, match="take turns"):
            measure_network([a, b], parties=parties, example=torch.zeros(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="at least one row"):
        measure_network([a, b], parties=["client", "server"], example=torch.zeros(0, 2))
    with pytest.raises(ModelError, match="Stretch 1 returned"):
        measure_network([nn.LSTM(2, 2), b], parties=["client", "server"], example=torch.zeros(1, 3, 2))
    _, cost = network_of("shared")
    with pytest.raises(ParameterError, match="labels are 'stay', but the last stretch is the server's"):
        compare(cost, Workload(clients=1, records=1, epochs=1, labels="stay"))
    with pytest.raises(ParameterError, match="labels are 'shared', but the last stretch is the client's"):
        compare(network_of("stay")[1], Workload(clients=1, records=1, epochs=1))
