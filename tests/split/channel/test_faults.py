"""Over a line that fails at random: nothing is carried out twice, every reply is the first one, the run ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpdl.errors import ChannelError
from dpdl.split.channel import Packet
from dpdl.split.replay import ReplayGuard
from dpdl.split.retrying import RetryingChannel
from tests.split.channel.faults import FAULTS, FaultyLine

STEPS = 25


class Drawing:
    """Counts its calls by address, and answers each with fresh noise."""

    def __init__(self) -> None:
        self.calls: dict[tuple[object, ...], int] = {}
        self.came: dict[tuple[object, ...], Tensor] = {}
        self.drawn: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, packet: Packet) -> Packet:
        address = (packet.header["session"], packet.kind, packet.header["step"])
        self.calls[address] = self.calls.get(address, 0) + 1
        self.came[address] = packet.tensors["z"]
        self.drawn[address] = torch.randn(3)
        return Packet(kind=packet.kind, tensors={"noise": self.drawn[address]})


def run(folder: Path, *, faults: tuple[str, ...], seed: int, restart_client: bool) -> tuple[Drawing, FaultyLine]:
    """A run of STEPS steps; everything that must hold is checked on the way."""
    handler = Drawing()
    line = FaultyLine(lambda: ReplayGuard(handler, folder / "replies.db"), faults=faults, seed=seed, rate=0.6)
    channel = RetryingChannel(line, outbox=folder / "request.frame")
    spent: list[Tensor] = []
    for step in range(1, STEPS + 1):
        spent.append(torch.randn(4))  # drawn once, recorded before it is sent
        address = ("a", "step", step)
        reply = channel.request("step", {"session": "a", "step": step}, {"z": spent[-1]}, timeout=60.0)
        if restart_client and step % 3 == 0:
            channel = RetryingChannel(line, outbox=folder / "request.frame")
            again = channel.resume(timeout=60.0)
            assert again is not None
            assert torch.equal(again.tensors["noise"], reply.tensors["noise"])
        assert torch.equal(reply.tensors["noise"], handler.drawn[address])
        assert torch.equal(handler.came[address], spent[-1])
    assert handler.calls == {("a", "step", step): 1 for step in range(1, STEPS + 1)}
    line.close()
    return handler, line


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdl.split.retrying._FIRST_WAIT", 0.001)
    monkeypatch.setattr("dpdl.split.retrying._LONGEST_WAIT", 0.002)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone_leaves_the_run_as_it_should_be(tmp_path: Path, fault: str) -> None:
    _, line = run(tmp_path, faults=(fault,), seed=FAULTS.index(fault), restart_client=False)
    assert line.happened[fault] >= 5


@pytest.mark.parametrize("seed", range(3))
def test_all_faults_together(tmp_path: Path, seed: int) -> None:
    _, line = run(tmp_path, faults=FAULTS, seed=seed, restart_client=True)
    assert sum(line.happened.values()) > STEPS


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 150))
def test_all_faults_together_fifty_times(tmp_path: Path, seed: int) -> None:
    run(tmp_path, faults=FAULTS, seed=seed, restart_client=True)


def test_without_a_guard_the_same_line_makes_the_handler_draw_twice(tmp_path: Path) -> None:
    """What the harness is for: it notices."""
    handler = Drawing()

    class Unguarded:
        def frame(self, packet: Packet, asked: bytes, *, peer: str = "") -> bytes:
            from dpdl.split.answering import answered
            from dpdl.split.frames import DEFAULT_LIMITS

            return answered(handler, packet, asked, limits=DEFAULT_LIMITS)

        def __call__(self, packet: Packet) -> Packet:
            return handler(packet)

        def close(self) -> None:
            pass

    line = FaultyLine(Unguarded, faults=("lose the reply",), seed=1)  # type: ignore[arg-type]
    channel = RetryingChannel(line)
    for step in range(1, 6):
        channel.request("step", {"session": "a", "step": step}, {"z": torch.zeros(1)}, timeout=60.0)
    assert max(handler.calls.values()) > 1


def test_a_line_that_never_works_is_one_clear_error(tmp_path: Path) -> None:
    handler = Drawing()
    line = FaultyLine(lambda: ReplayGuard(handler), faults=("lose the reply",), rate=1.0)
    with pytest.raises(ChannelError, match="may have been carried out"):
        RetryingChannel(line).request("step", {"session": "a", "step": 1}, {"z": torch.zeros(1)}, timeout=0.05)
    assert handler.calls == {("a", "step", 1): 1}
