"""The same parties over framed channels, with replies kept for repeated requests: the same numbers, fewer surprises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpdl.errors import ChannelError, StepError
from dpdl.split.channel import Packet
from dpdl.split.clip import JointClip
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.local_channel import LocalChannel
from dpdl.split.replay import ReplayGuard
from tests.split.core.networks import Case, cases
from tests.split.core.runs import plan_of, run_of
from tests.split.core.whole_network import parameters

TOPOLOGIES = {case.name: case for case in cases()}


def weights(case: Case) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters(case).items()}


@pytest.mark.parametrize("joint", [False, True], ids=["part", "joint"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_frames_change_no_bit(name: str, joint: bool) -> None:
    found = []
    for connect in (DirectChannel, lambda handler: LocalChannel(ReplayGuard(handler))):
        case = TOPOLOGIES[name].fresh()
        clip = JointClip(max_grad_norm=0.7) if joint else None
        run = run_of(case, plan_of(noise_multiplier=1.0), clip=clip, connect=connect)
        run.run(3)
        found.append((weights(case), run.predict(rows=torch.arange(4))))
        if connect is not DirectChannel:
            assert all(channel.bytes_sent > 1000 for channel in run.channels.values())
    (first, predicted), (second, predicted_again) = found
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(predicted[key], predicted_again[key]) for key in predicted)


def test_a_lost_reply_that_is_asked_for_again_is_the_same_and_the_step_is_taken_once() -> None:
    quiet, lossy = TOPOLOGIES["u-shaped"].fresh(), TOPOLOGIES["u-shaped"].fresh()
    run_of(quiet, plan_of(noise_multiplier=1.0)).run(3)

    def connect(handler: Any) -> DirectChannel:
        guard = ReplayGuard(handler)

        def twice(packet: Packet) -> Packet:
            first, second = guard(packet), guard(packet)  # the first reply is lost
            assert first.header == second.header
            assert all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())
            return second

        return DirectChannel(twice)

    run = run_of(lossy, plan_of(noise_multiplier=1.0), connect=connect)
    run.run(3)
    assert run.servers["server"].party.clients[0].run.steps_taken == 3
    first, second = weights(quiet), weights(lossy)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_other_party_refuses_is_said_here() -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=1.0), connect=LocalChannel)
    run.run(1)
    run.servers["server"]._sessions.clear()  # it was restarted
    with pytest.raises((StepError, ChannelError), match="session"):
        run.step()
    run.client.begin_anew()
    run.step()
    assert run.steps_taken == 3


class Cut:
    """A line that breaks before, or after, the n-th request has arrived."""

    def __init__(self, at: int, *, arrives: bool) -> None:
        self.left, self.arrives = at, arrives

    def connect(self, handler: Any) -> DirectChannel:
        def carried(packet: Packet) -> Packet:
            self.left -= 1
            mine = self.left == 0
            if mine and not self.arrives:
                raise ChannelError("cut")
            reply = handler(packet)
            if mine:
                raise ChannelError("cut")
            return reply

        return DirectChannel(carried)


@pytest.mark.parametrize(
    ("name", "joint"), [("u-shaped", False), ("vertical", True), ("chain", True)], ids=["u", "vertical", "chain"]
)
@pytest.mark.parametrize("arrives", [False, True])
def test_a_line_that_breaks_anywhere_costs_at_most_the_step_under_way(name: str, arrives: bool, joint: bool) -> None:
    for at in (2, 5, 8, 11):
        case, line = TOPOLOGIES[name].fresh(), Cut(at, arrives=arrives)
        clip = JointClip(max_grad_norm=0.7) if joint else None
        run = run_of(case, plan_of(noise_multiplier=1.0), clip=clip, connect=line.connect)
        failures = 0
        for _ in range(4):
            try:
                run.step()
            except ChannelError:
                failures += 1
                if at % 2:
                    run.client.begin_anew()
        assert failures == (line.left <= 0)
        spent = run.steps_taken
        assert spent in (3, 4)
        for server in run.servers.values():
            assert server.party.clients[0].run.steps_taken <= spent
