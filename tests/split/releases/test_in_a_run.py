"""Doors in whole split runs, read off the wire: what other parties get was released, and all of it is accounted."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdl
from accountants import NeighboringRelation, PRVAccountant
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, ParameterError
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.channel import Handler, Packet, Value
from dpdl.split.clip import JointClip, PartClip
from dpdl.split.cut_release import CutRelease
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.door import Once, ReleaseDoor
from dpdl.split.facts_of_run import facts_of_run
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.graph import SplitGraph
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.report import RowsSent, SplitFacts, split_report
from dpdl.split.row_cache import RowCache
from dpdl.split.session import SplitRun
from dpdl.split.topologies import chain, u_shaped, vanilla, vertical
from tests.split.releases.test_row_account import gdp_epsilon

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
N, STEPS = 60, 8
X = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
CUT = CutRelease(max_norm=1.0, noise_multiplier=4.0)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


class Wire:
    """A channel that keeps all that crosses it, in both directions."""

    packets: list[Packet]

    def __init__(self, handler: Handler) -> None:
        self._channel = DirectChannel(handler)
        self.bytes_sent = self.bytes_received = 0

    def request(
        self, kind: str, header: Mapping[str, Value], tensors: Mapping[str, Tensor], *, timeout: float
    ) -> Packet:
        Wire.packets.append(Packet(kind=kind, header=header, tensors=dict(tensors)))
        reply = self._channel.request(kind, header, tensors, timeout=timeout)
        Wire.packets.append(reply)
        return reply

    def close(self) -> None:
        self._channel.close()


def crossed(name: str, kind: str = "step") -> list[Tensor]:
    """All tensors of that name that crossed in training steps."""
    return [p.tensors[name] for p in Wire.packets if p.kind.split(".")[0] == kind and name in p.tensors]


def run_of(
    graph: SplitGraph, doors: Mapping[str, ReleaseDoor], data: Mapping[str, Tensor], sigma: float = 1.0
) -> SplitRun:
    Wire.packets = []
    parameters: dict[str, list[nn.Parameter]] = {}
    for part in graph.trained:
        assert part.module is not None
        parameters.setdefault(part.party, []).extend(p for p in part.module.parameters() if p.requires_grad)
    plan = dpdl.PrivacyPlan(
        sample_rate=0.25,
        expected_batch_size=15,
        steps=STEPS,
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        dataset_size=N,
    )
    optimizers = {party: torch.optim.SGD(held, lr=0.1) for party, held in parameters.items()}
    return SplitRun(graph, optimizers, data, plan, release=doors, connect=Wire)


def door(training: PartTraining, **arguments: object) -> ReleaseDoor:
    ledger = Ledger(relation=REPLACE_ONE)
    return ReleaseDoor(training=training, **{"ledger": ledger, "stream": RandomStream.from_os(), **arguments})  # type: ignore[arg-type]


def epsilon_of(of: ReleaseDoor, receiver: str = "server") -> float:
    return PRVAccountant(relation=REPLACE_ONE).compose(of.event(receiver)).epsilon(1e-5)


def network(*, frozen: bool = False) -> SplitGraph:
    torch.manual_seed(0)
    bottom = nn.Sequential(nn.Linear(5, 4), nn.Tanh()).requires_grad_(not frozen)
    return vanilla(bottom, nn.Linear(4, 2), loss)


def test_a_vanilla_run_sends_noised_rows_and_flipped_labels_and_counts_what_it_sent() -> None:
    graph = network()
    training = PartTraining.of(graph, "client", clip=PartClip.equal(1.0, graph), noise_multiplier=3.0)
    assert training.noise_multiplier == pytest.approx(3.0 * math.sqrt(2))
    plan = MemoizedRandomizedResponse(epsilon=0.1, classes=2)
    client = door(training, activations=CUT, labels=plan)
    run = run_of(graph, {"client": client}, {"x": X, "y": Y}, sigma=3.0)
    run.run()
    rows, labels = crossed("z/bottom"), crossed("y/y")
    assert len(rows) == len(labels) == STEPS
    assert torch.cat(rows).norm(dim=1).mean() > 3  # tanh of four numbers has norm 2 at most
    assert client.account("server").kinds == ("activations of bottom", "steps of the part")
    worst = client.account("server").most("activations of bottom")
    assert 0 < worst <= STEPS
    mu = math.sqrt(worst * ((2 / 4.0) ** 2 + (2 / training.noise_multiplier) ** 2))
    assert epsilon_of(client) == pytest.approx(gdp_epsilon(mu), rel=1e-4)
    assert client.unprotected == {}
    facts = facts_of_run(graph, "client", door=client, clip=PartClip.equal(1.0, graph), dp_sgd=run.ledger.event)
    assert facts == SplitFacts(
        rows=RowsSent(spent=client.event("server"), training=training, release=CUT),
        labels=plan,
        dp_sgd=run.ledger.event,
    )
    report = split_report(facts, delta=1e-5)
    assert all(claim.guaranteed for claim in report.claims)


def test_a_party_with_labels_only_really_flips_them() -> None:
    """At epsilon 0.1 nearly half of two classes' labels; a peer library sends such a party's as they are."""
    torch.manual_seed(0)
    graph = vanilla(nn.Linear(5, 4), nn.Linear(4, 2), loss, labels_of="registry")
    registry = door(PartTraining.frozen(), labels=MemoizedRandomizedResponse(epsilon=0.1, classes=2))
    run = run_of(graph, {"registry": registry}, {"x": X, "y": torch.zeros(N, dtype=torch.int64)})
    run.run()
    sent = torch.cat(crossed("y/y"))
    assert len(sent) > N
    assert 0.25 < sent.float().mean() < 0.75
    assert registry.ledger.releases == 1
    assert registry.ledger.epsilon(1e-12) <= 0.1 + 1e-6


def test_a_frozen_encoders_rows_cross_once_and_any_number_of_epochs_costs_one_release(tmp_path: Path) -> None:
    seen: set[bytes] = set()
    events = []
    for _ in range(2):  # processes
        graph = network(frozen=True)
        bottom = graph.part("bottom").module
        assert bottom is not None
        once = Once(encoder=bottom, inputs=lambda numbers: X[numbers], cache=RowCache(tmp_path / "rows"))
        release = CutRelease(max_norm=1.0, noise_multiplier=4.0, mode="release_once")
        client = door(PartTraining.frozen(), activations=release, once=once)
        run_of(graph, {"client": client}, {"x": X, "y": Y}).run()
        seen |= {row.numpy().tobytes() for rows in crossed("z/bottom") for row in rows}
        events.append(epsilon_of(client))
    assert 2 * N // 3 < len(seen) <= N  # of some 240 rows that crossed
    assert events == [pytest.approx(gdp_epsilon(2 / 4.0), rel=1e-4)] * 2


def test_a_u_shapes_second_release_is_made_and_composed() -> None:
    torch.manual_seed(0)
    graph = u_shaped(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2), loss)
    training = PartTraining.of(graph, "client", clip=PartClip.equal(1.0, graph), noise_multiplier=3.0)
    assert training.noise_multiplier == pytest.approx(3.0 * math.sqrt(3 / 2))
    client = door(training, activations=CUT, gradients=GradientRelease(max_norm=0.1, noise_multiplier=6.0))
    run_of(graph, {"client": client}, {"x": X, "y": Y}, sigma=3.0).run()
    backward = crossed("d/middle") or crossed("g/middle")
    assert len(backward) == STEPS
    assert torch.cat(backward).norm(dim=1).mean() > 0.6  # noise of 0.6 in four coordinates; the gradient is 0.1 at most
    account = client.account("server")
    worst = max(account.most(kind) for kind in account.kinds)
    mu = math.sqrt(worst * ((2 / 4.0) ** 2 + (2 / 6.0) ** 2 + (2 / training.noise_multiplier) ** 2))
    assert epsilon_of(client) == pytest.approx(gdp_epsilon(mu), rel=1e-4)


def test_what_a_hop_forwards_has_been_through_the_parts_before_it() -> None:
    graph = chain([nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)], loss, parties=("a", "b", "c"))
    clip = PartClip(max_grad_norm={"part 1": 0.3, "part 2": 0.4, "part 3": 1.2})
    both = PartTraining.of(graph, "a", "b", clip=clip, noise_multiplier=2.0)
    assert both.noise_multiplier == pytest.approx(2.0 * 1.3 / 0.5)
    assert PartTraining.of(graph, "a", clip=JointClip(max_grad_norm=1.0), noise_multiplier=2.0).noise_multiplier == 2.0
    assert PartTraining.of(graph, "b", clip=clip, noise_multiplier=0.0) == PartTraining.unprotected()
    for parties in ((), ("a", "nobody")):
        with pytest.raises(ParameterError, match="parties must be"):
            PartTraining.of(graph, *parties, clip=clip, noise_multiplier=2.0)


def test_a_label_holder_noises_the_gradients_that_go_back_to_each_feature_holder() -> None:
    torch.manual_seed(0)
    graph = vertical({"a": nn.Linear(2, 3), "b": nn.Linear(3, 3)}, nn.Linear(6, 2), loss)
    training = PartTraining.of(graph, "server", clip=PartClip.equal(1.0, graph), noise_multiplier=3.0)
    server = door(training, gradients=GradientRelease(max_norm=0.1, noise_multiplier=6.0))
    run_of(graph, {"server": server}, {"x of a": X[:, :2], "x of b": X[:, 2:], "y": Y}, sigma=3.0).run()
    for party in ("a", "b"):
        account = server.account(party)
        worst = max(account.most(kind) for kind in account.kinds)
        assert worst > 0
        mu = math.sqrt(worst * ((2 / 6.0) ** 2 + (2 / training.noise_multiplier) ** 2))
        assert epsilon_of(server, party) == pytest.approx(gdp_epsilon(mu), rel=1e-4)


def test_a_run_stops_before_the_release_that_would_overspend() -> None:
    graph = network()
    held = Ledger(relation=REPLACE_ONE, budget=Budget(epsilon=6.0, delta=1e-5))
    client = door(PartTraining.private(noise_multiplier=4.0), activations=CUT, ledger=held)
    run = run_of(graph, {"client": client}, {"x": X, "y": Y}, sigma=4.0)
    with pytest.raises(BudgetExceededError):
        run.run()
    assert len(crossed("z/bottom")) < STEPS
    assert 0 < epsilon_of(client) <= 6.0


def test_inference_on_new_rows_is_a_release_too() -> None:
    graph = network()
    client = door(PartTraining.private(noise_multiplier=4.0), activations=CUT)
    run = run_of(graph, {"client": client}, {"x": X, "y": Y}, sigma=4.0)
    run.run(1)
    before = epsilon_of(client)
    run.client.predict(X[:3] + 1)
    sent = crossed("z/bottom", "infer")
    assert len(sent) == 1
    assert sent[0].norm(dim=1).max() > 2.1
    assert epsilon_of(client) > before


def test_probes_pass_the_door_and_cost_nothing() -> None:
    graph = network()
    client = door(PartTraining.private(noise_multiplier=4.0), activations=CUT)
    run = run_of(graph, {"client": client}, {"x": X, "y": Y}, sigma=4.0)
    run.client.get_ready()
    assert len(crossed("z/bottom", "probe")) == 2
    assert client.ledger.releases == 0


@pytest.mark.parametrize("said", [PartTraining.frozen(), PartTraining.private(noise_multiplier=1e9)])
def test_a_run_that_does_worse_than_its_door_was_told_does_not_begin(said: PartTraining) -> None:
    with pytest.raises(ParameterError, match="in this run they are trained with"):
        run_of(network(), {"client": door(said, activations=CUT)}, {"x": X, "y": Y}, sigma=0.01)


def test_a_copy_of_the_part_is_no_encoder_of_what_leaves() -> None:
    graph = network(frozen=True)
    encoder = copy.deepcopy(graph.part("bottom").module)
    assert encoder is not None
    once = Once(encoder=encoder, inputs=lambda numbers: X[numbers], cache=RowCache())
    release = CutRelease(max_norm=1.0, noise_multiplier=4.0, mode="release_once")
    with pytest.raises(ParameterError, match="none of the parts"):
        run_of(graph, {"client": door(PartTraining.frozen(), activations=release, once=once)}, {"x": X, "y": Y})


def test_a_resumed_run_claims_what_its_door_released_before() -> None:
    def begun() -> tuple[SplitRun, ReleaseDoor]:
        client = door(PartTraining.private(noise_multiplier=4.0), activations=CUT)
        return run_of(network(), {"client": client}, {"x": X, "y": Y}, sigma=4.0), client

    run, first = begun()
    run.run(6)
    again, second = begun()
    again.client.load_state_dict(run.client.state_dict())
    assert epsilon_of(second) == epsilon_of(first) > 0
    again.run(1)
    (claim, *_) = again.report(1e-5).against("server")
    assert epsilon_of(second) > epsilon_of(first)
    assert not claim.guaranteed  # labels in clear
    again.client.predict({"x": X[:1].repeat(50, 1)})
    assert epsilon_of(second) > gdp_epsilon(2 / 4.0 * math.sqrt(50))
