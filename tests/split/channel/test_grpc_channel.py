"""The channel between machines, on the loopback: who gets in, what is said when it fails, and what is never said."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dpdl.errors import BudgetExceededError, ChannelError, ParameterError, PrivacyWarning
from dpdl.split import frames
from dpdl.split.certificates import make_certificates
from dpdl.split.channel import Channel, Packet
from dpdl.split.frames import FrameLimits
from dpdl.split.replay import ReplayGuard
from dpdl.split.retrying import RetryingChannel
from dpdl.split.tls import MutualTLS

grpc = pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'dpdl[split]'")
from dpdl.split.grpc_channel import GrpcChannel, GrpcServer, serve  # noqa: E402

SECRET = "patient 17 has"


class Party:
    def __init__(self) -> None:
        self.calls = 0
        self.wait = threading.Event()

    def __call__(self, packet: Packet) -> Packet:
        self.calls += 1
        if packet.kind == "slow":
            self.wait.wait(5.0)
        if packet.kind == "bug":
            raise ZeroDivisionError(SECRET)
        if packet.kind == "spent":
            raise BudgetExceededError("no more")
        if packet.kind == "large":
            return Packet(kind="large", tensors={"x": torch.zeros(2**17)})
        return Packet(kind=packet.kind, header=packet.header, tensors=packet.tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("certificates")
    make_certificates(made, clients=("radiology", "pathology"))
    return made


@pytest.fixture
def party() -> Party:
    return Party()


@pytest.fixture
def server(folder: Path, party: Party) -> Iterator[GrpcServer]:
    with serve("localhost:0", party, tls=MutualTLS.of(folder, "server")) as running:
        yield running


def at(step: int, session: str = "a") -> dict[str, str | int]:
    return {"session": session, "step": step}


def connect(server: GrpcServer, folder: Path, name: str = "radiology") -> GrpcChannel:
    return GrpcChannel.connect(server.address, tls=MutualTLS.of(folder, name))


def test_a_request_goes_over_and_back_exactly(server: GrpcServer, folder: Path) -> None:
    channel: Channel = connect(server, folder)
    z = {"cut": torch.randn(64, 1568), "labels": torch.arange(64), "none": torch.zeros(0, 3).to(torch.bfloat16)}
    reply = channel.request("step", at(1), z, timeout=20.0)
    assert all(torch.equal(reply.tensors[name], tensor) for name, tensor in z.items())
    frame = frames.encode(Packet(kind="step", header=at(1), tensors=z))
    assert channel.bytes_sent == channel.bytes_received == len(frame)
    channel.close()
    channel.close()
    with pytest.raises(ChannelError, match="is closed"):
        channel.request("step", at(2), {}, timeout=1.0)


def test_a_handler_gets_a_guard_and_a_session_has_an_owner(server: GrpcServer, folder: Path, party: Party) -> None:
    mine, other = connect(server, folder), connect(server, folder, "pathology")
    for _ in range(3):
        mine.request("step", at(1), {}, timeout=20.0)
    assert party.calls == 1
    with pytest.raises(ChannelError, match="another party's"):
        other.request("step", at(2), {}, timeout=20.0)
    other.request("step", at(1, "b"), {}, timeout=20.0)
    assert party.calls == 2


def test_what_the_handler_refuses_comes_out_as_what_it_is(server: GrpcServer, folder: Path) -> None:
    with pytest.raises(BudgetExceededError, match="no more"):
        connect(server, folder).request("spent", at(1), {}, timeout=20.0)


def test_a_bug_of_the_handler_is_an_error_without_its_words(
    server: GrpcServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ChannelError, match="its log says why") as error:
        connect(server, folder).request("bug", at(1), {}, timeout=20.0)
    seen = str(error.value) + str(error.value.__cause__)
    assert SECRET not in seen
    assert "ZeroDivision" not in seen
    assert SECRET in caplog.text  # of the server, in this process


def test_a_deadline_holds_and_the_retry_gets_the_reply_of_the_first(
    server: GrpcServer, folder: Path, party: Party
) -> None:
    channel = connect(server, folder)
    channel.request("step", at(1), {}, timeout=20.0)  # connected
    begun = time.monotonic()
    with pytest.raises(ChannelError, match=r"did not answer within 0\.3 seconds"):
        channel.request("slow", at(1), {}, timeout=0.3)
    assert time.monotonic() - begun < 3.0
    threading.Timer(0.5, party.wait.set).start()
    RetryingChannel(channel, attempt_timeout=0.2).request("slow", at(1), {}, timeout=20.0)
    assert party.calls == 2  # "step" once, "slow" once


def test_frames_over_the_limit_are_refused_on_either_side(folder: Path, party: Party) -> None:
    small = FrameLimits(max_bytes=2**16)
    with serve("localhost:0", party, tls=MutualTLS.of(folder, "server"), limits=small) as server:
        channel = connect(server, folder)
        with pytest.raises(ChannelError, match="max_bytes"):
            channel.request("step", at(1), {"x": torch.zeros(2**15)}, timeout=20.0)
        assert party.calls == 0
        with pytest.raises(ChannelError, match="max_bytes"):
            channel.request("large", at(1), {}, timeout=20.0)
    with serve("localhost:0", party, tls=MutualTLS.of(folder, "server")) as server:
        channel = GrpcChannel.connect(server.address, tls=MutualTLS.of(folder, "radiology"), limits=small)
        with pytest.raises(ChannelError, match="max_bytes"):
            channel.request("large", at(1), {}, timeout=20.0)


def refused(channel: GrpcChannel) -> None:
    with pytest.raises(ChannelError, match="cannot be reached, or the two do not accept"):
        channel.request("step", at(1), {}, timeout=5.0)
    channel.close()


def test_strangers_do_not_get_in(server: GrpcServer, folder: Path, tmp_path: Path, party: Party) -> None:
    make_certificates(tmp_path, clients=("radiology",))
    mixed = MutualTLS(
        authority=folder / "authority.pem", certificate=tmp_path / "radiology.pem", key=tmp_path / "radiology.key"
    )
    refused(GrpcChannel.connect(server.address, tls=mixed))  # of another authority
    refused(GrpcChannel.connect(server.address, tls=MutualTLS.of(tmp_path, "radiology")))  # which knows not the server
    refused(GrpcChannel.connect(server.address, tls=MutualTLS.of(folder, "server")))  # a server is no client
    with pytest.warns(PrivacyWarning, match="neither encrypted"):
        plain = GrpcChannel.connect(server.address, insecure=True)
    refused(plain)
    authority = (folder / "authority.pem").read_bytes()
    nameless = grpc.secure_channel(server.address, grpc.ssl_channel_credentials(authority))  # no certificate of its own
    with pytest.raises(grpc.RpcError):
        nameless.unary_unary("/dpdl.split.Channel/Request")(frames.encode(Packet(kind="step", header=at(1))), timeout=5)
    nameless.close()
    assert party.calls == 0


def test_a_client_does_not_take_another_client_for_the_server(folder: Path, party: Party) -> None:
    with serve("localhost:0", party, tls=MutualTLS.of(folder, "pathology")) as pretender:
        refused(connect(pretender, folder))
    assert party.calls == 0


def test_a_server_under_another_name_is_refused_unless_that_name_is_given(tmp_path: Path, party: Party) -> None:
    make_certificates(tmp_path, hosts=("hospital.example",))
    with serve("localhost:0", party, tls=MutualTLS.of(tmp_path, "server")) as server:
        refused(GrpcChannel.connect(server.address, tls=MutualTLS.of(tmp_path, "client")))
        named = MutualTLS.of(tmp_path, "client", server_name="hospital.example")
        GrpcChannel.connect(server.address, tls=named).request("step", at(1), {}, timeout=20.0)
    assert party.calls == 1


def test_without_tls_there_is_the_loopback_and_it_is_said(party: Party, folder: Path) -> None:
    tls = MutualTLS.of(folder, "server")
    for refusing in (
        lambda: serve("localhost:0", party),
        lambda: serve("0.0.0.0:0", party, insecure=True),
        lambda: serve("localhost:0", party, tls=tls, insecure=True),
        lambda: GrpcChannel.connect("localhost:1"),
        lambda: GrpcChannel.connect("10.0.0.5:1", insecure=True),
        lambda: GrpcChannel.connect("localhost", tls=tls),
        lambda: serve("localhost:99999", party, tls=tls),
        lambda: serve("localhost:http", party, tls=tls),
        lambda: GrpcChannel.connect(":50051", tls=tls),
    ):
        with pytest.raises(ParameterError):
            refusing()
    with pytest.warns(PrivacyWarning, match="neither encrypted nor authenticated"):
        server = serve("127.0.0.1:0", party, insecure=True)
    with pytest.warns(PrivacyWarning, match="neither encrypted nor authenticated"):
        channel = GrpcChannel.connect(server.address, insecure=True)
    channel.request("step", at(1), {}, timeout=20.0)
    channel.close()
    server.close()


def test_nobody_there_and_an_address_that_is_taken(server: GrpcServer, folder: Path, party: Party) -> None:
    with pytest.raises(ChannelError, match="Is another server there"):
        serve(server.address, party, tls=MutualTLS.of(folder, "server"))
    channel = connect(server, folder)
    server.close(grace=0.0)
    server.close()
    with pytest.raises(ChannelError, match="cannot be reached"):
        channel.request("step", at(1), {}, timeout=5.0)


def test_bytes_that_are_no_frame_do_not_harm_the_server(server: GrpcServer, folder: Path, party: Party) -> None:
    authority, certificate, key = MutualTLS.of(folder, "radiology").read()
    raw = grpc.secure_channel(server.address, grpc.ssl_channel_credentials(authority, key, certificate))
    ask = raw.unary_unary("/dpdl.split.Channel/Request")
    for noise in (b"", b"dpdl", b"\x80\x04\x95", bytes(1000), frames.encode(Packet(kind="x"))[:-1]):
        assert frames.decode(ask(noise, timeout=20.0)).header["error"] == "ChannelError"
    raw.close()
    assert party.calls == 0
    connect(server, folder).request("step", at(1), {}, timeout=20.0)


def test_replies_outlive_the_server(folder: Path, party: Party, tmp_path: Path) -> None:
    tls, path = MutualTLS.of(folder, "server"), tmp_path / "replies.db"

    def drawing(packet: Packet) -> Packet:
        party.calls += 1
        return Packet(kind=packet.kind, tensors={"noise": torch.randn(3)})

    guard = ReplayGuard(drawing, path)
    with serve("localhost:0", guard, tls=tls) as server:
        first = connect(server, folder).request("step", at(1), {}, timeout=20.0)
    guard.close()
    with serve(server.address, ReplayGuard(drawing, path), tls=tls) as server:
        channel = RetryingChannel(connect(server, folder))
        again = channel.request("step", at(1), {}, timeout=20.0)
    assert torch.equal(first.tensors["noise"], again.tensors["noise"])
    assert party.calls == 1


def test_without_grpcio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "grpc", None)
    with pytest.raises(ParameterError, match=r"dpdl\[split\]"):
        GrpcChannel.connect("localhost:1", insecure=True)
