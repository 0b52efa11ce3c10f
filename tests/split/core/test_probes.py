"""What a probe counts as: where nothing could be seen to change, nothing was shown, and no private row leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dpdl.errors import ExampleMixingError, ModelError
from dpdl.split.channel import Packet
from dpdl.split.client import SplitClient
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.session import SplitRun
from dpdl.split.topologies import u_shaped, vanilla
from tests.split.core.networks import sum_of_cross_entropies
from tests.split.core.runs import plan_of
from tests.split.core.test_refusals import data, small


def answers(change: Callable[[Tensor], Tensor]) -> Callable[[Packet], Packet]:
    """A party that is not ours, and what it makes of activations."""

    def handler(packet: Packet) -> Packet:
        if "z/bottom" not in packet.tensors:
            return Packet(kind=packet.kind)
        return Packet(kind=packet.kind, header={"done": True}, tensors={"d/bottom": change(packet.tensors["z/bottom"])})

    return handler


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (torch.zeros_like, "all gradients are zero"),
        (lambda z: z * torch.nan, "not finite"),
        (lambda z: (z - z.mean(0)) * torch.inf, "not finite"),
    ],
    ids=["zero", "NaN", "rows meet, unseen"],
)
def test_gradients_that_show_nothing_are_no_evidence(change: Callable[[Tensor], Tensor], says: str) -> None:
    graph, optimizers = small()
    client = SplitClient(
        graph,
        plan=plan_of(noise_multiplier=1.0),
        optimizer=optimizers["client"],
        data=data(),
        channels={"server": DirectChannel(answers(change))},
    )
    with pytest.raises(ModelError, match=rf"have not shown 'client'.*'bottom': .*{says}"):
        client.step()
    assert client.steps_taken == 0
    assert not any("probes)" in word for claim in client.report(1e-5).claims for word in claim.assumes)


def test_a_probe_that_shows_nothing_is_followed_by_one_with_other_rows() -> None:
    graph, optimizers = small()
    came: list[Tensor] = []

    def first_nothing(z: Tensor) -> Tensor:
        came.append(z)
        return torch.zeros_like(z) if len(came) <= 2 else z

    client = SplitClient(
        graph,
        plan=plan_of(noise_multiplier=1.0),
        optimizer=optimizers["client"],
        data=data(),
        channels={"server": DirectChannel(answers(first_nothing))},
    )
    client.probe()
    assert len(came) == 4
    assert not torch.equal(came[0], came[2])


def test_a_head_that_starts_at_zero_and_a_bottom_that_says_the_same_of_all_rows_are_refused() -> None:
    top = nn.Linear(5, 3)
    nn.init.zeros_(top.weight)
    graph, optimizers = small(top)
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0))
    with pytest.raises(ModelError, match="all gradients are zero"):
        run.step()
    graph, optimizers = small()
    for parameter in optimizers["client"].param_groups[0]["params"]:
        nn.init.zeros_(parameter)
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0))
    with pytest.raises(ModelError, match="the same for all rows"):
        run.step()
    assert run.steps_taken == 0


def test_where_nothing_comes_back_no_probe_counts() -> None:
    """The first part is frozen, so that no gradient returns to it: training goes on, and the report says so."""
    torch.manual_seed(0)
    graph = vanilla(nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 3), sum_of_cross_entropies)
    assert graph.parts[1].module is not None
    optimizers = {"server": torch.optim.SGD(graph.parts[1].module.parameters(), lr=0.1)}
    run = SplitRun(graph, optimizers, data(), plan_of(noise_multiplier=1.0))
    run.step()
    (consumers,) = run.report(1e-5).against("model consumers")
    assert any("(not probed)" in word for word in consumers.assumes)


def test_activations_that_come_from_another_party_are_looked_at_too() -> None:
    """A U-shape's middle is not ours, and its forward lets rows meet while its gradients do not."""
    torch.manual_seed(0)
    graph = u_shaped(nn.Linear(4, 5), None, nn.Linear(5, 3), sum_of_cross_entropies)

    def middle(packet: Packet) -> Packet:
        there = packet.tensors
        if "z/bottom" in there:
            return Packet(kind=packet.kind, tensors={"z/middle": there["z/bottom"] - there["z/bottom"].mean(0)})
        if "d/middle" in there:
            d = torch.ones_like(there["d/middle"])
            return Packet(kind=packet.kind, header={"done": True}, tensors={"d/bottom": d})
        return Packet(kind=packet.kind)

    held = [p for part in graph.parts if part.module for p in part.module.parameters()]
    client = SplitClient(
        graph,
        plan=plan_of(noise_multiplier=1.0),
        optimizer=torch.optim.SGD(held, lr=0.1),
        data=data(),
        channels={"server": DirectChannel(middle)},
    )
    with pytest.raises(ExampleMixingError, match="activations of part 'middle'"):
        client.step()
    assert client.steps_taken == 0
