"""A channel to another machine: gRPC [1] with mutual TLS. Needs `pip install dpdl[split]`.

    server = serve("0.0.0.0:50051", party.handle, tls=MutualTLS.of("certificates", "server"))

    channel = GrpcChannel.connect("hospital.example:50051", tls=MutualTLS.of("certificates", "radiology"))
    reply = channel.request("step", {"session": "a", "step": 7}, {"cut": z}, timeout=30.0)
    channel.close()

One method, bytes in and bytes out, registered without generated code: what the bytes are is `frames`' business. Both
parties show a certificate of the same authority, and the server knows a client by its certificate's common name.
Without TLS there is the loopback, if it is asked for by name.

References:
    [1] gRPC, "gRPC Python API", grpc.method_handlers_generic_handler. grpc.github.io/grpc/python
"""

from __future__ import annotations

import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NoReturn, Self, final

from dpdl.errors import ChannelError, ParameterError, PrivacyWarning
from dpdl.split.answering import Answerer, FrameHandler
from dpdl.split.channel import Handler
from dpdl.split.framed_channel import FramedChannel
from dpdl.split.frames import DEFAULT_LIMITS, FrameLimits
from dpdl.split.replay import ReplayGuard
from dpdl.split.tls import MutualTLS, is_loopback

__all__ = ["GrpcChannel", "GrpcServer", "serve"]

_log = logging.getLogger(__name__)
_SERVICE, _METHOD = "dpdl.split.Channel", "Request"
_LARGEST_PORT = 65535
_THREADS = 8  # a repetition waits in one while the first is worked on
# Requests that may be under way at once: with max_bytes the most memory that strangers' bytes can take.
_CONCURRENT = 8
_RECONNECT = (
    1000  # milliseconds, the longest wait between two attempts to connect: a server that restarts is found soon
)


@final
class GrpcChannel(FramedChannel):
    """A connection to a server made by `serve`. Made by `connect`; for any number of threads.

    Args:
        channel: the gRPC connection.
        address: of the server, for messages.
        limits: how large a frame may be.

    Guarantee:
        With TLS, both ends have shown a certificate of one authority, and nobody between reads or changes a frame. Of
        what the other end does with it: none.

    Raises:
        ChannelError: from `request`: the server cannot be reached, does not answer in time, or what comes is no reply.
    """

    def __init__(self, channel: Any, *, address: str, limits: FrameLimits) -> None:
        super().__init__(limits=limits)
        self._address = address
        self._channel = channel
        self._method = channel.unary_unary(f"/{_SERVICE}/{_METHOD}")
        self._closed = False

    @classmethod
    def connect(
        cls, address: str, *, tls: MutualTLS | None = None, insecure: bool = False, limits: FrameLimits = DEFAULT_LIMITS
    ) -> GrpcChannel:
        """Prepare a connection; it is made with the first request.

        Args:
            address: "host:port".
            tls: this party's certificate.
            insecure: without TLS; on the loopback only.
            limits: that requests and replies must be within.

        Raises:
            ChannelError: a certificate cannot be used.
            ParameterError: grpcio is not installed; or neither tls nor insecure, both, or insecure to another machine.
        """
        grpc = _grpc()
        _refuse_security(address, tls, insecure)
        options: list[tuple[str, int | str]] = [*_sizes(limits), ("grpc.initial_reconnect_backoff_ms", 100)]
        options += [("grpc.min_reconnect_backoff_ms", _RECONNECT), ("grpc.max_reconnect_backoff_ms", _RECONNECT)]
        if tls is None:
            return cls(grpc.insecure_channel(address, options=options), address=address, limits=limits)
        authority, certificate, key = tls.read()
        if tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        credentials = grpc.ssl_channel_credentials(authority, key, certificate)
        return cls(grpc.secure_channel(address, credentials, options=options), address=address, limits=limits)

    def _carry(self, frame: bytes, timeout: float) -> bytes:
        if self._closed:
            raise ChannelError(f"The channel to {self._address} is closed. Connect again.")
        grpc = _grpc()
        try:
            reply: bytes = self._method(frame, timeout=timeout)
            return reply
        except grpc.RpcError as error:
            raise ChannelError(self._said(grpc, error, timeout)) from error

    def _said(self, grpc: Any, error: Any, timeout: float) -> str:
        code, details = error.code(), error.details()
        known = {
            grpc.StatusCode.DEADLINE_EXCEEDED: f"did not answer within {timeout:g} seconds",
            grpc.StatusCode.UNAVAILABLE: "cannot be reached, or the two do not accept each other's certificates",
            grpc.StatusCode.RESOURCE_EXHAUSTED: "is asked too much at once, or a frame is over its max_bytes",
            grpc.StatusCode.CANCELLED: "was given up: the channel was closed meanwhile",
            grpc.StatusCode.INTERNAL: "failed; its log says why",
        }
        what = known.get(code, f"ended the request with {code.name}")
        return f"{self._address} {what} ({details})."

    def close(self) -> None:
        """End it; more than once is harmless."""
        self._closed = True
        self._channel.close()


@final
class GrpcServer:
    """A server that answers from now on, in threads of its own. Made by `serve`.

    Attributes:
        address: "host:port", with the port that was found if 0 was asked for.
    """

    def __init__(self, server: Any, *, address: str) -> None:
        self._server = server
        self.address = address

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is closed; whether it still runs after so many seconds."""
        running: bool = self._server.wait_for_termination(timeout)
        return running

    def close(self, grace: float = 5.0) -> None:
        """Take no more requests, and wait so many seconds for those under way; more than once is harmless."""
        self._server.stop(grace).wait()

    def __enter__(self) -> Self:
        """The server itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(
    address: str,
    handler: Handler,
    *,
    tls: MutualTLS | None = None,
    insecure: bool = False,
    limits: FrameLimits = DEFAULT_LIMITS,
) -> GrpcServer:
    """Answer requests at an address until the server is closed.

    Args:
        address: "host:port"; port 0 takes a free one.
        handler: called with each request. One that is not a `ReplayGuard` gets one around it, in memory.
        tls: this party's certificate; clients must show one of the same authority.
        insecure: without TLS; on the loopback only.
        limits: that requests and replies must be within. Strangers' bytes take at most 8 x max_bytes at once.

    Raises:
        ChannelError: a certificate cannot be used, or the address is taken.
        ParameterError: grpcio is not installed; or neither tls nor insecure, both, or insecure for other machines.
    """
    grpc = _grpc()
    _refuse_security(address, tls, insecure)
    guarded = handler if isinstance(handler, FrameHandler) else ReplayGuard(handler, limits=limits)
    answer = Answerer(guarded, limits=limits)
    server = grpc.server(
        ThreadPoolExecutor(_THREADS, thread_name_prefix="dpdl-split"),
        options=[*_sizes(limits), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=_CONCURRENT,
    )

    def respond(frame: bytes, context: Any) -> bytes:
        whole = False
        try:
            names = context.auth_context().get("x509_common_name", [b""])
            reply = answer(frame, peer=names[0].decode())
            whole = True
            return reply
        finally:
            if not whole:  # gRPC would send the error's words, and they may be made from data
                _log.exception("The handler failed.")
                _abort(context, grpc)

    method = grpc.unary_unary_rpc_method_handler(respond)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),))
    try:
        if tls is None:
            port = server.add_insecure_port(address)
        else:
            authority, certificate, key = tls.read()
            credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ChannelError(f"{address} cannot be listened at: {error}. Is another server there?") from error
    server.start()
    return GrpcServer(server, address=f"{address.rpartition(':')[0]}:{port}")


def _abort(context: Any, grpc: Any) -> NoReturn:
    context.abort(grpc.StatusCode.INTERNAL, "the handler failed")
    raise AssertionError("abort raises")


def _sizes(limits: FrameLimits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", limits.max_bytes),
        ("grpc.max_receive_message_length", limits.max_bytes),
    ]


def _refuse_security(address: str, tls: MutualTLS | None, insecure: bool) -> None:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > _LARGEST_PORT:  # gRPC takes another one
        raise ParameterError(f"address must be host:port, with a port from 0 to {_LARGEST_PORT}, got {address!r}.")
    if (tls is None) != insecure:
        raise ParameterError(
            f"Give tls=MutualTLS.of(folder, party) for {address}, with certificates from: dpdl split certificates. "
            "Without TLS there is the loopback alone, with insecure=True and no tls."
        )
    if not insecure:
        return
    if not is_loopback(address):
        raise ParameterError(f"insecure=True is for the loopback, and {address} is not. Give tls=MutualTLS.of(...).")
    warnings.warn(
        f"The channel at {address} is neither encrypted nor authenticated: every process of this machine can take "
        "part. Give tls=MutualTLS.of(...).",
        PrivacyWarning,
        stacklevel=3,
    )


def _grpc() -> Any:
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # handshakes that fail are told by our own errors
    try:
        import grpc
    except ImportError as error:
        raise ParameterError(
            "A channel between machines needs the package grpcio: pip install 'dpdl[split]'. Within a process there "
            "is LocalChannel."
        ) from error
    return grpc
