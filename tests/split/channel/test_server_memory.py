"""A server in a process of its own, under frames of every kind of damage: it answers on, and its memory stays."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from dpdl.split import frames
from dpdl.split.certificates import make_certificates
from dpdl.split.channel import Packet
from dpdl.split.frames import FrameLimits
from dpdl.split.tls import MutualTLS
from tests.split.channel.test_frames import sealed
from tests.split.channel.test_fuzzed_frames import hostile_frames

grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'dpdl[split]'")

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "dpdl", "tests.split.channel.test_frames"])
LIMITS = FrameLimits(max_bytes=2**22)
# Eight requests at once, each in gRPC's buffer, as bytes and as a copy; and one header at its worst.
MOST = 8 * 3 * LIMITS.max_bytes + 32 * LIMITS.max_header_bytes


def highest_memory() -> int:
    """The most that this process has had in memory so far, bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def serve_and_measure(folder: str, told: Connection) -> None:
    from dpdl.split.grpc_channel import serve

    def echo(packet: Packet) -> Packet:
        return Packet(kind=packet.kind, tensors=packet.tensors)

    with serve("localhost:0", echo, tls=MutualTLS.of(folder, "server"), limits=LIMITS) as server:
        told.send(server.address)
        while told.recv() != "enough":
            told.send(highest_memory())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_a_server_answers_on_and_takes_no_more_than_it_said(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=serve_and_measure, args=(str(tmp_path), there))
    process.start()
    try:
        assert here.poll(60.0)
        authority, certificate, key = MutualTLS.of(tmp_path, "client").read()
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        line = grpc.secure_channel(here.recv(), credentials, options=[("grpc.max_send_message_length", -1)])
        ask = line.unary_unary("/dpdl.split.Channel/Request")
        good = {"session": "a", "step": 1}
        full = frames.encode(Packet(kind="step", header=good, tensors={"x": torch.zeros(2**20 - 256)}))
        assert frames.decode(ask(full, timeout=30.0)).kind == "step"
        here.send("measure")
        before = here.recv()

        chance = random.Random(5)
        for _ in range(300):
            body = bytearray(full[80:600])
            for _ in range(chance.choice([1, 3, 20])):
                body[chance.randrange(len(body))] = chance.randrange(256)
            reply = frames.decode(ask(sealed(bytes(body)), timeout=30.0))
            assert reply.kind == "error"
        for noise in hostile_frames().values():
            assert frames.decode(ask(noise, timeout=30.0)).kind == "error"
        refused: list[object] = []

        def ask_too_much() -> None:
            for frame in (bytes(8 * LIMITS.max_bytes), sealed(bytes(LIMITS.max_bytes - 80))):
                try:
                    refused.append(frames.decode(ask(frame, timeout=60.0)).kind)
                except grpc.RpcError as error:
                    refused.append(error.code())

        threads = [threading.Thread(target=ask_too_much) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(refused) <= {"error", grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert refused.count(grpc.StatusCode.RESOURCE_EXHAUSTED) >= 8

        assert frames.decode(ask(full, timeout=30.0)).kind == "step"
        here.send("measure")
        grown = here.recv() - before
        print(f"{grown / 2**20:.1f} MiB more than before, of at most {MOST / 2**20:.0f}")
        assert grown < MOST
        here.send("enough")
        line.close()
    finally:
        process.kill()
        process.join()
