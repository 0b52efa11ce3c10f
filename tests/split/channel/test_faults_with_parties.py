"""Real parties over a line that fails at random end with the weights, to the last bit, of parties over a good one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl.execution import Execution
from dpdl.plan import PrivacyPlan
from dpdl.split.channel import Channel, Handler, Packet
from dpdl.split.clip import Clip, JointClip, PartClip
from dpdl.split.local_channel import LocalChannel
from dpdl.split.replay import ReplayGuard
from dpdl.split.retrying import RetryingChannel
from dpdl.split.session import SplitRun
from dpdl.split.topologies import u_shaped, vanilla
from tests.split.channel.faults import FAULTS, FaultyLine

STEPS = 8
PLAN = PrivacyPlan(
    sample_rate=0.2, expected_batch_size=8, steps=STEPS, noise_multiplier=1.0, max_grad_norm=1.0, dataset_size=40
)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdl.split.retrying._FIRST_WAIT", 0.001)
    monkeypatch.setattr("dpdl.split.retrying._LONGEST_WAIT", 0.002)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def trained(topology: str, clip: Clip | None, connect: Callable[[Handler], Channel]) -> tuple[SplitRun, list[Tensor]]:
    """A run under a seed, and its weights at the end."""
    torch.manual_seed(3)
    bottom, middle, top = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 4), nn.Linear(4, 3)
    data = {"x": torch.randn(40, 5), "y": torch.randint(3, (40,))}
    if topology == "vanilla":
        graph, of_client = vanilla(bottom, nn.Sequential(middle, nn.Tanh(), top), loss), [bottom]
    else:
        graph, of_client = u_shaped(bottom, middle, top, loss), [bottom, top]
    own = [p for module in of_client for p in module.parameters()]
    every = [p for module in (bottom, middle, top) for p in module.parameters()]
    theirs = [p for p in every if all(p is not mine for mine in own)]
    optimizers = {"client": torch.optim.SGD(own, lr=0.1), "server": torch.optim.SGD(theirs, lr=0.1)}
    run = SplitRun(graph, optimizers, data, PLAN, clip=clip, execution=Execution(insecure_seed=5), connect=connect)
    run.run()
    return run, [p.detach().clone() for p in every]


class Counting:
    """A handler, and how often each address came to it."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.calls: dict[tuple[object, ...], int] = {}

    def __call__(self, packet: Packet) -> Packet:
        address = packet.header["session"], packet.kind, packet.header["step"]
        self.calls[address] = self.calls.get(address, 0) + 1
        return self.handler(packet)


CASES = [
    ("vanilla", None),
    ("vanilla", PartClip(max_grad_norm={"bottom": 0.6, "top": 0.8})),
    ("vanilla", JointClip(max_grad_norm=1.0)),
    ("u_shaped", None),
    ("u_shaped", JointClip(max_grad_norm=1.0)),
]


@pytest.mark.parametrize(("topology", "clip"), CASES, ids=repr)
def test_a_run_over_a_bad_line_is_the_run_over_a_good_one(tmp_path: Path, topology: str, clip: Clip | None) -> None:
    lines: list[FaultyLine] = []
    handlers: list[Counting] = []

    def bad(handler: Handler) -> Channel:
        handlers.append(Counting(handler))
        counting, path = handlers[-1], tmp_path / f"replies.{len(lines)}.db"
        lines.append(FaultyLine(lambda: ReplayGuard(counting, path), faults=FAULTS, rate=0.6, seed=len(topology)))
        return RetryingChannel(lines[-1], outbox=tmp_path / f"outbox.{len(lines)}")

    good_run, good = trained(topology, clip, lambda handler: LocalChannel(ReplayGuard(handler)))
    bad_run, weights = trained(topology, clip, bad)
    assert all(torch.equal(a, b) for a, b in zip(good, weights, strict=True))
    assert bad_run.steps_taken == good_run.steps_taken == STEPS
    assert bad_run.epsilon(1e-5) == good_run.epsilon(1e-5)
    (line,), (handler,) = lines, handlers
    assert set(handler.calls.values()) == {1}
    assert len(line.happened) > 5


def test_what_a_run_sends_is_counted_the_same_as_its_frames_say() -> None:
    seen: list[int] = []

    def connect(handler: Handler) -> Channel:
        channel = LocalChannel(ReplayGuard(handler))
        seen.append(0)
        return channel

    run, _ = trained("vanilla", None, connect)
    assert run.channels["server"].bytes_sent > run.channels["server"].bytes_received > 0
