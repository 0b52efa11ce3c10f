"""Two processes over TLS, one of them killed at a random moment, again and again, with SIGKILL.

A killed server answers what it has answered with the same bytes, and begins nothing again; a killed client sends the
same bytes again, and what it has drawn is in its ledger.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from dpdl.errors import ChannelError
from dpdl.ledger_file import LedgerFile
from dpdl.split.certificates import make_certificates
from dpdl.split.channel import Packet
from dpdl.split.replay import ReplayGuard
from dpdl.split.retrying import RetryingChannel
from dpdl.split.tls import MutualTLS
from tests.split.channel.killed_parties import ask_until_killed, serve_until_killed

pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'dpdl[split]'")
from dpdl.split.grpc_channel import GrpcChannel, serve

# Processes come from one that has the imports already, and has never started gRPC, which does not live through a fork.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "dpdl", "tests.split.channel.killed_parties"])


@contextmanager
def started(program: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """A process, and what it tells; it is killed at the end."""
    told, tell = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=program, args=(*arguments, tell))
    process.start()
    tell.close()
    try:
        yield told
    finally:
        process.kill()
        process.join()


def heard(told: Connection) -> str:
    assert told.poll(120.0), "the process does not start"
    said: str = told.recv()
    return said


class Killer(threading.Thread):
    """Runs a server, kills it at random moments, and starts it again at the same address."""

    def __init__(self, folder: Path, *, times: int, seed: int) -> None:
        super().__init__()
        self._folder, self._times, self._chance = folder, times, random.Random(seed)
        self.address = "localhost:0"
        self.running, self.over, self.enough = threading.Event(), threading.Event(), threading.Event()

    def run(self) -> None:
        for life in range(self._times + 1):
            with started(serve_until_killed, self.address, str(self._folder)) as told:
                self.address = heard(told)
                self.running.set()
                if life < self._times:
                    time.sleep(self._chance.uniform(0.0, 0.5))
                else:
                    self.over.set()
                    self.enough.wait(60.0)


def kill_the_server(folder: Path, *, times: int, seed: int) -> tuple[int, int]:
    """Ask a server that is killed so many times; how many requests were answered, and how many were given up."""
    make_certificates(folder)
    killer = Killer(folder, times=times, seed=seed)
    killer.start()
    assert killer.running.wait(120.0)
    channel = RetryingChannel(GrpcChannel.connect(killer.address, tls=MutualTLS.of(folder, "client")))
    replies: dict[tuple[str, str], list[float]] = {}
    errors: list[str] = []
    session, step, given_up, left = 0, 0, 0, 5
    while left:
        step += 1
        address = {"session": str(session), "step": step}
        z = {"z": torch.randn(4)}
        try:
            reply = channel.request("step", address, z, timeout=120.0)
            again = channel.request("step", address, z, timeout=120.0)
            assert torch.equal(reply.tensors["noise"], again.tensors["noise"])
            replies[str(session), str(step)] = reply.tensors["noise"].tolist()
        except ChannelError as error:
            errors.append(str(error))
            session, step, given_up = session + 1, 0, given_up + 1
        left -= killer.over.is_set()
    killer.enough.set()
    killer.join()
    channel.close()
    assert all("did not come to an end" in error for error in errors), errors
    drawn: dict[tuple[str, str], list[float]] = {}
    for line in (folder / "log").read_text().splitlines():
        of, at, noise = line.split(" ", 2)
        assert (of, at) not in drawn, "the handler was called twice for one address"
        drawn[of, at] = json.loads(noise)
    assert all(drawn[address] == noise for address, noise in replies.items())
    assert len(drawn) <= len(replies) + given_up
    return len(replies), given_up


def kill_the_client(folder: Path, *, times: int, seed: int) -> int:
    """Serve a client that is killed so many times; how many requests came to the handler."""
    make_certificates(folder)
    chance = random.Random(seed)
    came: dict[tuple[object, object], list[float]] = {}

    def handler(packet: Packet) -> Packet:
        address = packet.header["session"], packet.header["step"]
        assert address not in came, "the handler was called twice for one address"
        came[address] = packet.tensors["z"].tolist()
        time.sleep(0.002)
        return Packet(kind=packet.kind)

    with serve(
        "localhost:0", ReplayGuard(handler, folder / "replies.db"), tls=MutualTLS.of(folder, "server")
    ) as server:
        for _ in range(times):
            with started(ask_until_killed, server.address, str(folder), 10**6) as told:
                assert heard(told) == "ready"
                time.sleep(chance.uniform(0.0, 0.5))
        with started(ask_until_killed, server.address, str(folder), len(came) + 5) as told:
            assert [heard(told), heard(told)] == ["ready", "done"]
    assert sorted(step for _, step in came) == list(range(1, len(came) + 1))  # type: ignore[type-var]
    assert len({tuple(z) for z in came.values()}) == len(came)  # no draw was sent twice under two numbers
    with LedgerFile(folder / "client.ledger") as ledger:
        assert len(came) <= ledger.releases <= len(came) + times
    return len(came)


def test_a_server_that_is_killed_carries_out_nothing_twice(tmp_path: Path) -> None:
    answered, given_up = kill_the_server(tmp_path, times=2, seed=1)
    assert answered >= 5
    assert given_up <= 2


def test_a_client_that_is_killed_sends_the_same_again_and_loses_no_spending(tmp_path: Path) -> None:
    assert kill_the_client(tmp_path, times=2, seed=1) >= 5


@pytest.mark.slow
def test_a_server_that_is_killed_fifty_times(tmp_path: Path) -> None:
    answered, given_up = kill_the_server(tmp_path, times=50, seed=2)
    print(f"{answered} answered, {given_up} given up")
    assert answered > 50


@pytest.mark.slow
def test_a_client_that_is_killed_fifty_times(tmp_path: Path) -> None:
    print(f"{kill_the_client(tmp_path, times=50, seed=2)} came")
