"""Nothing is asked or answered before both parties have signed the same manifest.

    gate = ManifestGate(server.handle, mine.sign(key, party="server"), keys={"client": client_key})
    serve(address, ReplayGuard(gate), tls=tls)

    channel = AgreedChannel(line, mine.sign(key, party="client"), keys={"server": server_key})

The one who asks sends its signed manifest ahead of its first request; the other one compares it with its own, field by
field, and answers with its own, which is compared in turn. Every later request names the manifest by its digest, in a
session for which this very party has signed it: a digest alone, which anybody can compute, opens nothing. Where the
connection tells who asks (a certificate's common name), that is who must have signed.

Both hold what they have signed against what they do: a `SplitClient` or `SplitServer` whose own plan, clip, graph or
door are others than the manifest's refuses at the greeting.

What is signed is the manifest, the party and the session, whose name is drawn anew: an agreement that somebody has
overheard opens no other session, and a reply to it is none to this one. Within its session only TLS keeps others out.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import Tensor

from dpdl.errors import CheckpointError, ManifestError
from dpdl.split.channel import Channel, Handler, Packet, Value
from dpdl.split.manifest import Manifest, SignedManifest, agree
from dpdl.split.whole_file import replace_file

__all__ = ["PARTY_KINDS", "TERMS", "AgreedChannel", "ManifestGate"]

KIND = "manifest"
TERMS = "terms"  # name of the value by which the gate tells its party, at a hello, what was signed
# What `SplitServer`, the shelf of weights, and `dpdl split serve` answer.
PARTY_KINDS = ("hello", "probe", "step", "infer", "finish", "put weights", "get weights", "bye")
_TEXT = "manifest"  # name of the value that has the signed manifest, or of later requests its digest


@final
class ManifestGate:
    """A handler in front of another one, for those alone who have agreed.

    Attributes:
        kinds: of requests that are let through.

    Args:
        handler: called with every request that names the manifest.
        signed: this party's manifest.
        keys: party to the key that its signature is checked with. A party is called as in its certificate.
        kinds: of requests that the handler answers.
        path: a file in which it stays known who has signed, and for which session, so that a session outlives this
            process. It counts for this manifest alone, and belongs where only this party writes.

    Raises:
        CheckpointError: the file is not one of these.
    """

    def __init__(
        self,
        handler: Handler,
        signed: SignedManifest,
        *,
        keys: Mapping[str, Ed25519PublicKey],
        kinds: Iterable[str] = PARTY_KINDS,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.kinds = frozenset(kinds) | {KIND}
        self._path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._agreed = _kept(self._path, signed.manifest.digest)  # who has signed, and for which session
        self._handler = handler
        self._signed = signed
        self._digest = signed.manifest.digest
        self._keys = dict(keys)

    def __call__(self, packet: Packet) -> Packet:
        """The reply to a packet of who knows whom; as `answer`.

        Raises:
            ManifestError: it comes before the parties have agreed, names another run, or is signed by somebody else.
        """
        return self.answer(packet, peer="")

    def answer(self, packet: Packet, *, peer: str) -> Packet:
        """The reply to a request.

        Args:
            packet: the request.
            peer: who asks, if the connection can tell.

        Raises:
            ManifestError: the other party has not signed the same manifest for this session, or names another one.
            PrivacyError: as the handler.
        """
        told = packet.header.get(_TEXT)
        if packet.kind == KIND:
            session = _session(packet.header)
            party = refuse_other_terms(self._signed, told, self._keys, session=session)
            if peer not in ("", party):
                raise ManifestError(
                    f"'{peer}', as its certificate says, shows a manifest that '{party}' has signed. Each party signs "
                    "with a key of its own, under the name of its certificate."
                )
            self._agree(peer, session)
            return Packet(kind=KIND, header={_TEXT: self._signed.in_session(session).to_json()})
        if told != self._digest:
            raise ManifestError(
                f"A request '{packet.kind}' names the manifest {str(told)[:12]}, and the run of "
                f"'{self._signed.party}' is {self._digest[:12]}. Compare manifests first: AgreedChannel does."
            )
        if (peer, packet.header.get("session")) not in self._agreed:
            raise ManifestError(
                f"A request '{packet.kind}' comes in session {packet.header.get('session')!r}, for which nobody has "
                f"shown a signed manifest to '{self._signed.party}'. Begin another session: "
                "AgreedChannel shows the manifest first."
            )
        header = {name: value for name, value in packet.header.items() if name not in (_TEXT, TERMS)}
        if packet.kind == "hello":
            header[TERMS] = self._signed.manifest.to_json()  # so that the party compares it with what it will do
        return self._handler(Packet(kind=packet.kind, header=header, tensors=packet.tensors))

    def _agree(self, peer: str, session: str) -> None:
        with self._lock:
            self._agreed.add((peer, session))
            if self._path is not None:
                text = json.dumps({"manifest": self._digest, "agreed": sorted(self._agreed, key=repr)})
                replace_file(self._path, text.encode())


def _kept(path: Path | None, digest: str) -> set[tuple[str, Value]]:
    if path is None or not path.exists():
        return set()
    try:
        kept = json.loads(path.read_bytes())
        agreed = {(str(peer), session) for peer, session in kept["agreed"]}
        return agreed if kept["manifest"] == digest else set()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say who has signed the manifest ({error!r}). Move it away: parties then sign again, in "
            "new sessions."
        ) from error


@final
class AgreedChannel:
    """Another channel, to a party that has agreed.

    Args:
        channel: to a party behind a `ManifestGate`.
        signed: this party's manifest.
        keys: party to the key that its signature is checked with.
    """

    def __init__(self, channel: Channel, signed: SignedManifest, *, keys: Mapping[str, Ed25519PublicKey]) -> None:
        self._channel = channel
        self._signed = signed
        self._digest = signed.manifest.digest
        self._keys = dict(keys)
        self._agreed: set[str] = set()

    @property
    def terms(self) -> Manifest:
        """What this party has signed."""
        return self._signed.manifest

    @property
    def bytes_sent(self) -> int:
        """Bytes of all requests so far, as framed."""
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of all replies so far, as framed."""
        return self._channel.bytes_received

    def request(
        self, kind: str, header: Mapping[str, Value], tensors: Mapping[str, Tensor], *, timeout: float
    ) -> Packet:
        """Ask and wait, as `Channel.request`; before the first request of a session, agree.

        Raises:
            ManifestError: the other party has other terms, or signs with another key. The request was not sent.
            ChannelError, PrivacyError: as the channel.
        """
        session = _session(header)
        if session not in self._agreed:
            terms: dict[str, Value] = {"session": session, "step": 0, _TEXT: self._signed.in_session(session).to_json()}
            reply = self._channel.request(KIND, terms, {}, timeout=timeout)
            refuse_other_terms(self._signed, reply.header.get(_TEXT), self._keys, session=session)
            self._agreed.add(session)
        return self._channel.request(kind, {**header, _TEXT: self._digest}, tensors, timeout=timeout)

    def close(self) -> None:
        """End it; more than once is harmless."""
        self._channel.close()


def _session(header: Mapping[str, Value]) -> str:
    session = header.get("session")
    if not isinstance(session, str):
        raise ManifestError(f"A request names its session, a text, so that it can be signed for; got {session!r}.")
    return session


def refuse_other_terms(mine: SignedManifest, told: Value, keys: Mapping[str, Ed25519PublicKey], *, session: str) -> str:
    """Compare what another party sent with our own manifest; who has signed it.

    Raises:
        ManifestError: it is no manifest, signed by nobody that we know, by us, for another session, or of other terms.
    """
    if not isinstance(told, str):
        raise ManifestError(f"A signed manifest was expected, got {type(told).__name__}.")
    theirs = SignedManifest.from_json(told)
    if theirs.party == mine.party or theirs.party not in keys:
        raise ManifestError(
            f"A manifest is signed by '{theirs.party}', and '{mine.party}' has keys of {sorted(keys)}. Copy the "
            "party's .signing.pub file here."
        )
    agree(mine.manifest, theirs.verified(keys[theirs.party], session=session))
    return theirs.party
