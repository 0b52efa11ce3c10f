"""The handshake: no request passes before both have signed the same terms, and the difference is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dpdl.errors import CheckpointError, ManifestError
from dpdl.split.channel import Channel, Packet
from dpdl.split.handshake import AgreedChannel, ManifestGate
from dpdl.split.local_channel import LocalChannel
from dpdl.split.manifest import Manifest, SignedManifest
from dpdl.split.replay import ReplayGuard
from tests.split.channel.test_manifest import MINE

CLIENT, SERVER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


class Site:
    def __init__(self) -> None:
        self.got: list[Packet] = []

    def __call__(self, packet: Packet) -> Packet:
        self.got.append(packet)
        return Packet(kind=packet.kind, tensors=packet.tensors)


def pair(theirs: Manifest = MINE, *, signer: Ed25519PrivateKey = SERVER, name: str = "server") -> tuple[Site, Channel]:
    site = Site()
    gate = ManifestGate(site, theirs.sign(signer, party=name), keys={"client": CLIENT.public_key()})
    line = LocalChannel(ReplayGuard(gate))
    return site, AgreedChannel(line, MINE.sign(CLIENT, party="client"), keys={"server": SERVER.public_key()})


def at(step: int, session: str = "a") -> dict[str, str | int]:
    return {"session": session, "step": step}


def test_parties_that_agree_talk_and_the_handler_sees_what_was_asked() -> None:
    site, channel = pair()
    for session in "ab":
        for step in (1, 2):
            reply = channel.request("step", at(step, session), {"z": torch.ones(2)}, timeout=1.0)
            assert torch.equal(reply.tensors["z"], torch.ones(2))
    assert [dict(packet.header) for packet in site.got] == [at(s, session) for session in "ab" for s in (1, 2)]
    assert channel.bytes_sent > channel.bytes_received > 0
    channel.close()


def test_other_terms_are_refused_before_anything_is_sent_and_named() -> None:
    site, channel = pair(replace(MINE, noise_multiplier=0.1, clips={"top": 9.0, "bottom": 0.3}))
    with pytest.raises(ManifestError, match=r"clips.top: 9.0 here, 0.9 there; noise_multiplier: 0.1 here, 1.1 there"):
        channel.request("step", at(1), {"z": torch.ones(2)}, timeout=1.0)
    assert not site.got


def test_a_server_that_agrees_to_anything_is_still_compared() -> None:
    """The one who asks compares as well: here the other one has said yes, and shows other terms."""
    theirs = replace(MINE, max_steps=10**6)
    shown = theirs.sign(SERVER, party="server", session="a").to_json()
    line = LocalChannel(lambda packet: Packet(kind=packet.kind, header={"manifest": shown}))
    channel = AgreedChannel(line, MINE.sign(CLIENT, party="client"), keys={"server": SERVER.public_key()})
    with pytest.raises(ManifestError, match="max_steps: 300 here, 1000000 there"):
        channel.request("step", at(1), {}, timeout=1.0)


def test_a_signature_of_somebody_else_is_refused_on_both_sides() -> None:
    site, channel = pair(signer=Ed25519PrivateKey.generate())
    with pytest.raises(ManifestError, match="not signed by the key"):
        channel.request("step", at(1), {}, timeout=1.0)
    _, channel = pair(name="mallory")
    with pytest.raises(ManifestError, match="signed by 'mallory'"):
        channel.request("step", at(1), {}, timeout=1.0)
    gate = ManifestGate(site, MINE.sign(SERVER, party="server"), keys={"client": SERVER.public_key()})
    channel = AgreedChannel(LocalChannel(gate), MINE.sign(CLIENT, party="client"), keys={"server": SERVER.public_key()})
    with pytest.raises(ManifestError, match="not signed by the key"):
        channel.request("step", at(1), {}, timeout=1.0)
    assert not site.got


def test_our_own_manifest_sent_back_is_no_agreement() -> None:
    line = LocalChannel(lambda packet: Packet(kind=packet.kind, header={"manifest": packet.header["manifest"]}))
    signed = MINE.sign(CLIENT, party="client")
    channel = AgreedChannel(line, signed, keys={"server": SERVER.public_key(), "client": CLIENT.public_key()})
    with pytest.raises(ManifestError, match="signed by 'client'"):
        channel.request("step", at(1), {}, timeout=1.0)


def test_who_does_not_name_the_manifest_gets_nowhere() -> None:
    site = Site()
    gate = ManifestGate(site, MINE.sign(SERVER, party="server"), keys={"client": CLIENT.public_key()})
    line = LocalChannel(gate)
    for header in ({}, {"manifest": "0" * 64}, {"manifest": None}):
        with pytest.raises(ManifestError, match="names the manifest"):
            line.request("step", {**at(1), **header}, {}, timeout=1.0)
    for told in (None, 3, "{}"):
        with pytest.raises(ManifestError):
            line.request("manifest", {**at(0), "manifest": told}, {}, timeout=1.0)
    assert not site.got


def signed_by(key: Ed25519PrivateKey, party: str, session: str = "a") -> str:
    return MINE.sign(key, party=party, session=session).to_json()


def test_an_agreement_of_an_old_session_opens_no_other() -> None:
    site = Site()
    gate = ManifestGate(site, MINE.sign(SERVER, party="server"), keys={"client": CLIENT.public_key()})
    overheard = signed_by(CLIENT, "client", "old")
    gate(Packet(kind="manifest", header={**at(0, "old"), "manifest": overheard}))
    with pytest.raises(ManifestError, match="signed for the session 'old', and this is 'new'"):
        gate(Packet(kind="manifest", header={**at(0, "new"), "manifest": overheard}))
    forged = json.dumps({**json.loads(overheard), "session": "new"})
    with pytest.raises(ManifestError, match="not signed by the key"):
        gate(Packet(kind="manifest", header={**at(0, "new"), "manifest": forged}))
    with pytest.raises(ManifestError, match="nobody has shown"):
        gate(Packet(kind="step", header={**at(1, "new"), "manifest": MINE.digest}))
    with pytest.raises(ManifestError, match="names its session"):
        gate(Packet(kind="manifest", header={"step": 0, "manifest": overheard}))
    assert not site.got


def test_a_servers_reply_to_an_old_session_is_none_to_this_one() -> None:
    overheard = signed_by(SERVER, "server", "old")
    line = LocalChannel(lambda packet: Packet(kind=packet.kind, header={"manifest": overheard}))
    channel = AgreedChannel(line, MINE.sign(CLIENT, party="client"), keys={"server": SERVER.public_key()})
    with pytest.raises(ManifestError, match="signed for the session 'old'"):
        channel.request("step", at(1, "new"), {}, timeout=1.0)


def test_only_the_party_itself_signs_again_and_its_key_stays_with_it() -> None:
    mine = MINE.sign(CLIENT, party="client")
    assert mine.in_session("a").verified(CLIENT.public_key(), session="a") == MINE
    assert "key" not in json.loads(mine.to_json())
    assert "Ed25519PrivateKey" not in repr(mine)
    with pytest.raises(ManifestError, match="without its key"):
        SignedManifest.from_json(mine.to_json()).in_session("a")


def test_a_digest_that_anybody_can_compute_opens_nothing() -> None:
    site = Site()
    gate = ManifestGate(site, MINE.sign(SERVER, party="server"), keys={"client": CLIENT.public_key()})
    asking = Packet(kind="step", header={**at(1), "manifest": MINE.digest})
    for peer in ("", "south", "client"):
        with pytest.raises(ManifestError, match="nobody has shown"):
            gate.answer(asking, peer=peer)
    gate.answer(Packet(kind="manifest", header={**at(0), "manifest": signed_by(CLIENT, "client")}), peer="client")
    gate.answer(asking, peer="client")
    others = [(asking, "south"), (replace(asking, header={**at(1, "b"), "manifest": MINE.digest}), "client")]
    for packet, peer in others:  # another party in that session, or another session
        with pytest.raises(ManifestError, match="nobody has shown"):
            gate.answer(packet, peer=peer)
    assert len(site.got) == 1


def test_who_signed_is_who_the_certificate_names() -> None:
    south = Ed25519PrivateKey.generate()
    keys = {"client": CLIENT.public_key(), "south": south.public_key()}
    gate = ManifestGate(Site(), MINE.sign(SERVER, party="server"), keys=keys)
    overheard = Packet(kind="manifest", header={**at(0), "manifest": signed_by(CLIENT, "client")})
    with pytest.raises(ManifestError, match="'south', as its certificate says"):
        gate.answer(overheard, peer="south")
    gate.answer(Packet(kind="manifest", header={**at(0), "manifest": signed_by(south, "south")}), peer="south")


def test_kinds_that_no_party_answers_take_no_room() -> None:
    gate = ManifestGate(Site(), MINE.sign(SERVER, party="server"), keys={"client": CLIENT.public_key()})
    guard = ReplayGuard(gate, max_streams=2)
    for kind in ("junk", "step.x", "step.01", "step.1000", "step.\u0661", "step.", "junk.1"):
        reply = guard(Packet(kind=kind, header=at(0)))
        assert reply.header["error"] == "ChannelError", kind
        assert "not answered here" in str(reply.header["message"])
    reply = guard(Packet(kind="manifest", header={**at(0), "manifest": signed_by(CLIENT, "client")}))
    assert reply.kind == "manifest"
    assert guard(Packet(kind="step.2", header={**at(1), "manifest": MINE.digest})).kind == "step.2"


def test_a_session_outlives_the_party_that_agreed_to_it_under_the_same_manifest_alone(tmp_path: Path) -> None:
    kept = tmp_path / "agreed.json"

    def restarted(manifest: Manifest = MINE) -> ManifestGate:
        keys = {"client": CLIENT.public_key()}
        return ManifestGate(Site(), manifest.sign(SERVER, party="server"), keys=keys, path=kept)

    restarted()(Packet(kind="manifest", header={**at(0), "manifest": signed_by(CLIENT, "client")}))
    asking = Packet(kind="step", header={**at(1), "manifest": MINE.digest})
    assert restarted()(asking).kind == "step"
    with pytest.raises(ManifestError, match="nobody has shown"):
        restarted()(Packet(kind="step", header={**at(1, "b"), "manifest": MINE.digest}))
    other = replace(MINE, max_steps=299)
    with pytest.raises(ManifestError, match="nobody has shown"):
        restarted(other)(Packet(kind="step", header={**at(1), "manifest": other.digest}))
    kept.write_text("{}")
    with pytest.raises(CheckpointError, match=r"agreed\.json"):
        restarted()
