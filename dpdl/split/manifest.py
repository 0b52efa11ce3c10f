"""What the parties of a split run agree on before anything private is sent: all that a claim depends on.

    mine = manifest_of(graph, plan, topology="vanilla", rows=rows, deltas=deltas)  # `dpdl.split.manifest_of_run`
    signed = mine.sign(read_private_key("certificates/client.signing.key"), party="client")
    theirs = SignedManifest.from_json(text).verified(read_public_key("certificates/server.signing.pub"))
    agree(mine, theirs)

A clip or a noise multiplier that is another one at the other party makes the joint claim wrong without either noticing:
the noise of each part is scaled to the clips of all of them. So both compare the whole manifest, field by field, and
its digest names the run from then on.

Public: everything in it.

References:
    [1] RFC 8032, Edwards-Curve Digital Signature Algorithm (EdDSA), section 5.1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dpdl.errors import ManifestError
from dpdl.plan import Sampling
from dpdl.split.cut_release import CutMode
from dpdl.split.manifest_fields import make_float, numbers, refuse_other_than, refuse_other_than_texts
from dpdl.split.signing_keys import read_private_key, read_public_key

__all__ = [
    "CutTerms",
    "LabelTerms",
    "Manifest",
    "ReleaseTerms",
    "SignedManifest",
    "agree",
    "differences",
    "read_private_key",
    "read_public_key",
]

_SCHEMA = "dpdl.split.manifest/1"
_MECHANISMS = ("memoized_randomized_response",)
_LONGEST = 2**20  # characters of a manifest that somebody sends


@dataclass(frozen=True, kw_only=True)
class CutTerms:
    """One tensor that goes from one party to another at each step.

    Attributes:
        name: of the edge in the graph.
        sender: party.
        receiver: party.
        shape: of one row.
        dtype: "float32", ...
    """

    name: str
    sender: str
    receiver: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        refuse_other_than_texts(self, "name", "sender", "receiver", "dtype")
        if not all(type(length) is int and length >= 0 for length in self.shape):
            raise ManifestError(f"The shape of the cut '{self.name}' must be whole numbers >= 0, got {self.shape}.")


@dataclass(frozen=True, kw_only=True)
class ReleaseTerms:
    """How rows are privatised at a cut.

    Attributes:
        mode: "per_step" or "release_once".
        max_norm: C_z, of a row.
        noise_multiplier: s, of max_norm.
    """

    mode: str
    max_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        make_float(self, "max_norm", "noise_multiplier")
        refuse_other_than(self, "mode", get_args(CutMode))
        for name in ("max_norm", "noise_multiplier"):
            if not getattr(self, name) > 0:
                raise ManifestError(f"{name} of a release in the manifest must be > 0, got {getattr(self, name)!r}.")


@dataclass(frozen=True, kw_only=True)
class LabelTerms:
    """How labels are privatised.

    Attributes:
        mechanism: "memoized_randomized_response".
        epsilon: of one label.
        classes: how many.
    """

    mechanism: str
    epsilon: float
    classes: int

    def __post_init__(self) -> None:
        make_float(self, "epsilon")
        refuse_other_than(self, "mechanism", _MECHANISMS)
        if not self.epsilon > 0 or type(self.classes) is not int or self.classes < 2:
            raise ManifestError(
                f"labels of the manifest need epsilon > 0 and whole classes >= 2, got {self.epsilon!r} and "
                f"{self.classes!r}."
            )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The terms of a run.

    Attributes:
        topology: "vanilla", "u_shaped", ...
        parties: all of them, in the graph's order.
        cuts: what goes between them.
        sampling: "poisson".
        sample_rate: with which a record is in a batch.
        expected_batch_size: what sums are divided by.
        clipping: "part" or "joint".
        clips: part to max_grad_norm; each part's noise is scaled to the root of the sum of their squares.
        noise_multiplier: sigma.
        max_steps: no more than these, ever.
        deltas: adversary to delta.
        cut_release: how rows at the cut are privatised; None: not at all.
        labels: how labels are privatised; None: not at all.
        gradient_release: how returned gradients are; None: not at all.
        weight_sync: "none", "peer_to_peer" or "server".
        reduction: of the loss over rows; only sums keep a row's gradient its own.
        row_wise: that every part treats each row by itself, which the probe checks: always True.

    Raises:
        ManifestError: a field is of another kind, or out of range.
    """

    topology: str
    parties: tuple[str, ...]
    cuts: tuple[CutTerms, ...]
    sampling: str
    sample_rate: float
    expected_batch_size: int
    clipping: str
    clips: Mapping[str, float]
    noise_multiplier: float
    max_steps: int
    deltas: Mapping[str, float]
    cut_release: ReleaseTerms | None = None
    labels: LabelTerms | None = None
    gradient_release: ReleaseTerms | None = None
    weight_sync: str = "none"
    reduction: str = "sum"
    row_wise: bool = True

    def __post_init__(self) -> None:
        make_float(self, "sample_rate", "noise_multiplier")
        for name in ("clips", "deltas"):
            object.__setattr__(self, name, numbers(name, getattr(self, name)))
        for name in ("parties", "cuts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._refuse_nonsense()

    def _refuse_nonsense(self) -> None:
        refuse_other_than_texts(self, "topology")
        refuse_other_than(self, "sampling", get_args(Sampling))
        refuse_other_than(self, "clipping", ("part", "joint"))
        refuse_other_than(self, "weight_sync", ("none", "peer_to_peer", "server"))
        refuse_other_than(self, "reduction", ("sum",))
        if self.row_wise is not True:
            raise ManifestError(
                f"row_wise of the manifest must be True, got {self.row_wise!r}: nothing else is proved."
            )
        if not all(isinstance(party, str) and party for party in self.parties) or len(set(self.parties)) < 2:
            raise ManifestError(f"parties of the manifest must be two texts or more, got {self.parties}.")
        if not all(isinstance(cut, CutTerms) and {cut.sender, cut.receiver} <= set(self.parties) for cut in self.cuts):
            raise ManifestError(f"cuts of the manifest must be CutTerms between its parties, got {self.cuts}.")
        if not self.clips:
            raise ManifestError("clips of the manifest is empty: name each part that trains, with its norm.")
        for name, kind in (("cut_release", ReleaseTerms), ("gradient_release", ReleaseTerms), ("labels", LabelTerms)):
            if not isinstance(getattr(self, name), kind | None):
                raise ManifestError(f"{name} of the manifest must be {kind.__name__} or None.")
        if not 0 < self.sample_rate <= 1:
            raise ManifestError(f"sample_rate of the manifest must be in (0, 1], got {self.sample_rate!r}.")
        for name in ("expected_batch_size", "max_steps"):
            if type(getattr(self, name)) is not int or getattr(self, name) <= 0:
                raise ManifestError(f"{name} of the manifest must be a whole number > 0, got {getattr(self, name)!r}.")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ManifestError(f"noise_multiplier of the manifest must be >= 0, got {self.noise_multiplier!r}.")
        for part, clip in self.clips.items():
            if not 0 < clip < math.inf:
                raise ManifestError(f"clips of the manifest must be > 0, got {clip!r} for '{part}'.")
        for adversary, delta in self.deltas.items():
            if not 0 < delta < 1:
                raise ManifestError(f"deltas of the manifest must be in (0, 1), got {delta!r} for '{adversary}'.")

    def to_json(self) -> str:
        """Canonical: the same manifest is the same text, at every party."""
        return _canonical({"schema": _SCHEMA, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            ManifestError: it is not one, or has other fields.
        """
        told = _object(text)
        schema = told.pop("schema", None)
        if schema != _SCHEMA:
            raise ManifestError(f"A manifest must be of {_SCHEMA}, got {schema!r}. Use the same dpdl at both parties.")
        known = {one.name for one in fields(cls)}
        if set(told) != known:
            odd = sorted(set(told) ^ known)
            raise ManifestError(f"A manifest must have the fields {sorted(known)}; {odd} are missing or unknown.")
        try:
            told["cuts"] = tuple(CutTerms(**cut) for cut in told["cuts"])
            for name, kind in (
                ("cut_release", ReleaseTerms),
                ("gradient_release", ReleaseTerms),
                ("labels", LabelTerms),
            ):
                told[name] = None if told[name] is None else kind(**told[name])
            return cls(**told)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ManifestError(f"A manifest has a field of the wrong kind ({error}).") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, 64 hexadecimal digits: what to call the run by."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def sign(self, key: Ed25519PrivateKey, *, party: str, session: str = "") -> SignedManifest:
        """This manifest, as a party stands for it; what is returned keeps the key, to sign for each session anew.

        Args:
            key: the private key of the party.
            party: who signs.
            session: of which it is said; "" before there is one.
        """
        signature = key.sign(_signed_bytes(self, party, session)).hex()
        return SignedManifest(manifest=self, party=party, session=session, signature=signature, key=key)


@dataclass(frozen=True, kw_only=True)
class SignedManifest:
    """A manifest with the name and the signature of one party, for one session.

    Attributes:
        manifest: the terms.
        party: who signed.
        session: the one it was signed for; shown in another one, it counts for nothing.
        signature: Ed25519 of the terms, the party and the session, hexadecimal.
        key: that it was made with; None at everybody but the party. **Private**, and not in `to_json`.
    """

    manifest: Manifest
    party: str
    signature: str
    session: str = ""
    key: Ed25519PrivateKey | None = field(default=None, repr=False, compare=False)

    def in_session(self, session: str) -> SignedManifest:
        """Signed anew, for one session.

        Raises:
            ManifestError: it is another party's, who alone has the key.
        """
        if self.key is None:
            raise ManifestError(f"The manifest of '{self.party}' came without its key. Make yours with Manifest.sign.")
        return self.manifest.sign(self.key, party=self.party, session=session)

    def to_json(self) -> str:
        """To be sent to the other party."""
        told = {name: getattr(self, name) for name in ("party", "session", "signature")}
        return _canonical({"manifest": self.manifest.to_json(), **told})

    @classmethod
    def from_json(cls, text: str) -> SignedManifest:
        """What the other party's `to_json` wrote; the signature is unchecked until `verified`.

        Raises:
            ManifestError: it is not one.
        """
        told = _object(text)
        known = {"manifest", "party", "session", "signature"}
        if set(told) != known or not all(isinstance(value, str) for value in told.values()):
            raise ManifestError(
                "A signed manifest must have manifest, party, session and signature, all of them texts."
            )
        return cls(**{**told, "manifest": Manifest.from_json(told["manifest"])})

    def verified(self, key: Ed25519PublicKey, *, session: str = "") -> Manifest:
        """The manifest, if the owner of `key` has signed it under that name, for `session`.

        Raises:
            ManifestError: the signature is of another key, party, session or manifest.
        """
        if self.session != session:
            raise ManifestError(
                f"The manifest that came from '{self.party}' was signed for the session {self.session!r}, and this is "
                f"{session!r}: somebody shows an old one. The party signs for each session anew."
            )
        try:
            key.verify(bytes.fromhex(self.signature), _signed_bytes(self.manifest, self.party, session))
        except (InvalidSignature, ValueError) as error:
            raise ManifestError(
                f"The manifest that came from '{self.party}' is not signed by the key that we have of it. Compare the "
                ".signing.pub files of both parties."
            ) from error
        return self.manifest


def agree(mine: Manifest, theirs: Manifest) -> None:
    """Compare two manifests, all fields of them, and digits to the last bit.

    Args:
        mine: this party's, made from its own run (`manifest_of`).
        theirs: the other party's, whose signature was checked (`SignedManifest.verified`).

    Guarantee:
        Both name the same terms. That a party does as it says is not looked at here: each holds its own run against
        what it has signed when parties greet each other (`dpdl.split.agreed_terms`).

    Raises:
        ManifestError: they differ; every field that does is named, with both values.
    """
    if differing := differences(mine, theirs, "here", "there"):
        raise ManifestError(
            f"The two parties do not agree on the run. {'; '.join(differing)}. Nothing was sent; give both the same."
        )


def differences(one: Manifest, other: Manifest, here: str, there: str) -> list[str]:
    """Every field that is not the same in two manifests, with both values and where each of them is."""
    ours, others = dict(_leaves(asdict(one))), dict(_leaves(asdict(other)))
    nothing = "nothing"
    return [
        f"{name}: {ours.get(name, nothing)!r} {here}, {others.get(name, nothing)!r} {there}"
        for name in sorted(set(ours) | set(others))
        if name not in ours or name not in others or ours[name] != others[name]
    ]


def _signed_bytes(manifest: Manifest, party: str, session: str) -> bytes:
    """With the schema in front, so that no signature of anything else can pass for this."""
    return f"{_SCHEMA} of {len(party)} {party} in {len(session)} {session}\n{manifest.to_json()}".encode()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _object(text: str) -> dict[str, Any]:
    if len(text) > _LONGEST:
        raise ManifestError(f"A manifest has at most {_LONGEST} characters, got {len(text)}.")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"A manifest is JSON, and this is not ({type(error).__name__}).") from error
    if not isinstance(told, dict):
        raise ManifestError(f"A manifest is a JSON object, got {type(told).__name__}.")
    return told


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value in a tree, by its path; rows of parts and adversaries by their names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple | list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{number}]")
    else:
        yield name, value
