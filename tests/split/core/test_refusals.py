"""What cannot be trained is refused by name, before a private row has left and before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdl
from dpdl.errors import (
    ChannelError,
    ExampleMixingError,
    LossError,
    ManifestError,
    ModelError,
    ParameterError,
    PrivacyError,
    StepError,
    WrapError,
)
from dpdl.split.channel import Packet
from dpdl.split.client import SplitClient
from dpdl.split.clip import JointClip, PartClip
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.graph import Head, Part, SplitGraph
from dpdl.split.server import SplitServer
from dpdl.split.session import SplitRun
from dpdl.split.topologies import u_shaped, vanilla
from tests.split.core.networks import ROWS, cases, sum_of_cross_entropies
from tests.split.core.runs import plan_of, run_of
from tests.split.core.whole_network import parameters

TOPOLOGIES = {case.name: case for case in cases()}


def small(top: nn.Module | None = None, loss_fn: Any = sum_of_cross_entropies) -> tuple[SplitGraph, dict[str, Any]]:
    torch.manual_seed(0)
    graph = vanilla(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), top or nn.Linear(5, 3), loss_fn)
    optimizers = {
        part.party: torch.optim.SGD(part.module.parameters(), lr=0.1) for part in graph.trained if part.module
    }
    return graph, optimizers


def data() -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, 4), "y": torch.randint(3, (ROWS,))}


class Centred(nn.Module):
    """Subtracts the batch's mean: rows meet, and no class name says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layer(z - z.mean(0, keepdim=True))
        return out


def contrastive(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="sum")


@pytest.mark.parametrize(
    ("top", "loss_fn", "error", "words"),
    [
        (None, F.cross_entropy, LossError, "mean over rows"),
        (None, lambda o, y: F.cross_entropy(o, y, reduction="sum") / 7 / len(o), LossError, "mean over rows"),
        (None, contrastive, LossError, "compares"),
        (None, lambda o, y: o, LossError, "one number"),
        (Centred(), sum_of_cross_entropies, ExampleMixingError, "Centred"),
    ],
    ids=["mean", "mean by hand", "contrastive", "no number", "rows meet in a part"],
)
def test_rows_that_meet_are_refused_before_any_private_row_leaves(
    top: nn.Module | None, loss_fn: Callable[[Tensor, Tensor], Tensor], error: type[PrivacyError], words: str
) -> None:
    graph, optimizers = small(top, loss_fn)
    left: list[Any] = []
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0), release=left.append)  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        run.step()
    assert left == []
    assert run.steps_taken == 0


def test_batch_normalisation_is_refused_when_the_parties_are_made() -> None:
    graph, optimizers = small(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)))
    with pytest.raises(ExampleMixingError, match="BatchNorm"):
        SplitRun(graph, optimizers, data(), plan_of())


def test_a_frozen_part_that_mixes_rows_is_refused() -> None:
    torch.manual_seed(0)
    graph = SplitGraph(
        parts=(
            Part(name="bottom", module=nn.Linear(4, 5), party="client", inputs=("x",)),
            Part(name="mix", module=Centred(), party="server", inputs=("bottom",), trains=False),
        ),
        heads=(Head(name="loss", party="server", part="mix", labels="y", loss_fn=sum_of_cross_entropies),),
        columns={"y": "client"},
    )
    assert graph.parts[0].module is not None
    optimizers = {"client": torch.optim.SGD(graph.parts[0].module.parameters(), lr=0.1)}
    run = SplitRun(graph, optimizers, data(), plan_of())
    with pytest.raises(ExampleMixingError):
        run.step()
    assert run.steps_taken == 0


def test_another_partys_mixing_is_found_from_this_side_of_the_cut() -> None:
    """The other party is not ours: it answers probes with gradients of rows that meet."""
    graph, optimizers = small()
    weight = torch.randn(5, 3)

    def dishonest(packet: Packet) -> Packet:
        if "z/bottom" not in packet.tensors:
            return Packet(kind=packet.kind)
        z = packet.tensors["z/bottom"]
        d = (z - z.mean(0)) @ weight @ weight.T
        return Packet(kind=packet.kind, header={"done": True}, tensors={"d/bottom": d})

    client = SplitClient(
        graph,
        plan=plan_of(noise_multiplier=1.0),
        optimizer=optimizers["client"],
        data=data(),
        channels={"server": DirectChannel(dishonest)},
    )
    with pytest.raises(ExampleMixingError, match="behind the cut"):
        client.step()
    assert client.steps_taken == 0


def test_parties_that_have_not_agreed_do_not_begin() -> None:
    graph, optimizers = small()
    server = SplitServer(graph, plan=plan_of(noise_multiplier=1.0), optimizer=optimizers["server"])
    for plan, name in ((plan_of(noise_multiplier=2.0), None), (plan_of(noise_multiplier=1.0), "a stranger")):
        other, opts = small()
        client = SplitClient(
            other,
            plan=plan,
            optimizer=opts["client"],
            data=data(),
            channels={"server": DirectChannel(server.handle)},
            name=name,
        )
        with pytest.raises(ManifestError):
            client.step()
        assert client.steps_taken == 0
    assert server.party.clients[0].run.steps_taken == 0


def test_graphs_that_are_no_networks() -> None:
    a = Part(name="a", module=nn.Linear(4, 4), party="client", inputs=("x",))
    b = Part(name="b", module=nn.Linear(4, 3), party="server", inputs=("a",))
    head = Head(name="loss", party="server", part="b", labels="y", loss_fn=sum_of_cross_entropies)
    SplitGraph(parts=(a, b), heads=(head,))
    wrong: list[tuple[tuple[Part, ...], tuple[Head, ...], dict[str, str], str]] = [
        ((a, b), (), {}, "no head"),
        ((a, replace(b, name="a")), (head,), {}, "names two"),
        ((replace(a, inputs=("b",)), b), (head,), {}, "circle"),
        ((a, b), (replace(head, part="c"),), {}, "not in the graph"),
        ((a, b, replace(b, name="c", module=nn.Linear(4, 2))), (head,), {}, "lead to no head"),
        ((replace(a, party="server"), b), (head,), {"x": "client"}, "raw data"),
        ((replace(a, inputs=()), b), (head,), {}, "no inputs"),
        ((a, b), (head,), {"z": "client"}, "feed no part"),
        ((replace(a, name="a/b"), b), (head,), {}, "without '/'"),
    ]
    for parts, heads, columns, words in wrong:
        with pytest.raises(ParameterError, match=words):
            SplitGraph(parts=parts, heads=heads, columns=columns)
    with pytest.raises(ModelError, match="share a tensor"):
        SplitGraph(parts=(a, replace(b, module=a.module)), heads=(head,))
    with pytest.raises(ModelError, match="No part of the graph trains"):
        SplitGraph(parts=(replace(a, trains=False), replace(b, trains=False)), heads=(head,))
    with pytest.raises(ModelError, match="no parameter"):
        replace(a, module=nn.Tanh(), trains=True)


def test_settings_that_do_not_fit() -> None:
    graph, optimizers = small()
    plan = plan_of(noise_multiplier=1.0)
    run = lambda **more: SplitRun(  # noqa: E731
        **{"graph": graph, "optimizers": optimizers, "data": data(), "plan": plan, **more}
    )
    foreign = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for more, error, words in [
        ({"clip": PartClip(max_grad_norm=0.7)}, ParameterError, "make C = 0.98"),
        ({"clip": PartClip(max_grad_norm={"bottom": 0.7})}, ParameterError, "Give one for each"),
        ({"clip": JointClip(max_grad_norm=-1.0)}, ParameterError, "> 0"),
        ({"optimizers": {"client": optimizers["client"]}}, WrapError, "give an optimizer"),
        ({"optimizers": {**optimizers, "server": foreign}}, WrapError, "in none of its parts"),
        ({"optimizers": {**optimizers, "nobody": foreign}}, ParameterError, "none of the graph's parties"),
        ({"data": {"x": data()["x"]}}, ParameterError, "no column"),
        ({"data": {"x": data()["x"], "y": data()["y"][:5]}}, ParameterError, "lengths"),
        ({"driver": "nobody"}, ParameterError, "driver must be one of"),
        ({"plan": plan_of(dataset_size=59, sample_rate=6 / 59)}, ParameterError, "59 records"),
        ({"execution": dpdl.Execution(max_physical_batch_size=2)}, ParameterError, "crosses the cut whole"),
    ]:
        graph, optimizers = (graph, optimizers) if "optimizers" in more else small()
        more = {**more, **({"graph": graph} if "optimizers" not in more else {})}
        with pytest.raises(error, match=words):
            run(**more)
    run(graph=graph, optimizers=optimizers)
    with pytest.raises(WrapError, match="another split run"):
        run(graph=graph, optimizers=optimizers)


def test_what_returns_no_rows_is_named() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, z: Tensor) -> Tensor:
            out: Tensor = self.layer(z).sum(1).sum(0)
            return out

    graph, optimizers = small(Summed())
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0))
    with pytest.raises(PrivacyError):
        run.step()
    assert run.steps_taken == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tensors": {"z/top": torch.zeros(3, 5)}}, ChannelError),
        ({"tensors": {"z/bottom": torch.zeros(3, 5), "y/y": torch.zeros(4)}}, ChannelError),
        ({"tensors": {"z/bottom": torch.zeros((), dtype=torch.float64)}}, ChannelError),
        ({"tensors": {"z/bottom": torch.zeros(3, 5, dtype=torch.long)}}, ChannelError),
        ({"tensors": {"d/top": torch.zeros(3, 5)}}, ChannelError),
        ({"header": {"session": "unknown"}}, StepError),
        ({"header": {"step": -1}}, ChannelError),
        ({"header": {"step": True}}, ChannelError),
        ({"header": {"step": 0}, "tensors": {"z/bottom": torch.zeros(3, 5, dtype=torch.float64)}}, ChannelError),
        ({"kind": "step.1"}, StepError),
        ({"kind": "run this"}, ChannelError),
    ],
)
def test_a_server_refuses_what_it_does_not_wait_for_and_goes_on(change: dict[str, Any], error: type[Exception]) -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    run = run_of(case, plan_of(noise_multiplier=1.0))
    run.run(1)
    server = run.servers["server"]
    before = {name: p.detach().clone() for name, p in parameters(case).items()}
    spent = server.party.clients[0].run.steps_taken
    header = {"session": run.client.session, "step": 100, "client": "client", "sender": "client", "exchanged": -1}
    packet = Packet(
        kind=change.get("kind", "step"),
        header={**header, **change.get("header", {})},
        tensors=change.get("tensors", {}),
    )
    with pytest.raises(error):
        server.handle(packet)
    assert all(torch.equal(before[name], p) for name, p in parameters(case).items())
    assert server.party.clients[0].run.steps_taken == spent
    run.client.begin_anew()
    run.run(2)
    assert run.steps_taken == 3


def test_the_same_step_is_not_taken_twice() -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    packets: list[Packet] = []
    run = run_of(case, plan_of(noise_multiplier=1.0), connect=lambda handler: DirectChannel(_kept(handler, packets)))
    run.run(2)
    before = {name: p.detach().clone() for name, p in parameters(case).items()}
    steps = [packet for packet in packets if packet.kind == "step"]
    for packet in steps:
        with pytest.raises(PrivacyError):
            run.servers["server"].handle(packet)
    assert all(torch.equal(before[name], p) for name, p in parameters(case).items())


def _kept(handler: Any, packets: list[Packet]) -> Any:
    def kept(packet: Packet) -> Packet:
        packets.append(packet)
        return handler(packet)

    return kept


def test_u_shape_never_sends_labels_and_vertical_parties_without_data_never_get_row_numbers() -> None:
    packets: list[Packet] = []
    torch.manual_seed(1)
    graph = u_shaped(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), sum_of_cross_entropies)
    assert all(part.module is not None for part in graph.parts)
    held: dict[str, list[Tensor]] = {"client": [], "server": []}
    for part in graph.parts:
        assert part.module is not None
        held[part.party] += part.module.parameters()
    optimizers = {party: torch.optim.SGD(parameters, lr=0.1) for party, parameters in held.items()}
    run = SplitRun(
        graph,
        optimizers,
        data(),
        plan_of(noise_multiplier=1.0),
        connect=lambda handler: DirectChannel(_kept(handler, packets)),
    )
    run.run(2)
    run.predict(torch.randn(3, 4))
    assert {name for packet in packets for name in packet.tensors} == {"z/bottom", "d/middle"}
