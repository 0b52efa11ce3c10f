"""A server and a client as processes of their own, to be killed. Whoever starts them is told when they are ready."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

import torch

from accountants import Gaussian
from dpdl.ledger_file import LedgerFile
from dpdl.split.channel import Packet
from dpdl.split.replay import ReplayGuard
from dpdl.split.retrying import RetryingChannel
from dpdl.split.tls import MutualTLS


def serve_until_killed(address: str, folder: str, told: Connection) -> None:
    """Each call of the handler is a line of the log, written before it takes its time."""
    from dpdl.split.grpc_channel import serve

    log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def handler(packet: Packet) -> Packet:
        noise = secret_noise(3)
        os.write(log, f"{packet.header['session']} {packet.header['step']} {noise.tolist()}\n".encode())
        time.sleep(0.002)
        return Packet(kind=packet.kind, tensors={"noise": noise})

    guard = ReplayGuard(handler, f"{folder}/replies.db")
    server = serve(address, guard, tls=MutualTLS.of(folder, "server"))
    told.send(server.address)
    server.wait()


def ask_until_killed(address: str, folder: str, steps: int, told: Connection) -> None:
    """What is drawn is recorded in the ledger before, and in the outbox before it is sent."""
    from dpdl.split.grpc_channel import GrpcChannel

    ledger = LedgerFile(f"{folder}/client.ledger")
    line = GrpcChannel.connect(address, tls=MutualTLS.of(folder, "client"))
    channel = RetryingChannel(line, outbox=f"{folder}/request.frame")
    step = 0
    if channel.pending is not None:
        step = int(channel.pending.header["step"] or 0)
        channel.resume(timeout=60.0)
    told.send("ready")
    while step < steps:
        step += 1
        ledger.record(Gaussian(10.0), label="activations", run="client")
        header = {"session": "a", "step": step}
        channel.request("step", header, {"z": secret_noise(4)}, timeout=60.0)
    told.send("done")


def secret_noise(size: int) -> torch.Tensor:
    """From the operating system: never the same in two processes."""
    return torch.tensor([int.from_bytes(os.urandom(6), "little") for _ in range(size)]).double()
