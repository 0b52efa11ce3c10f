"""The manifest: one text for one set of terms, a signature over all of it, and every difference named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from accountants import NeighboringRelation
from dpdl.errors import ManifestError
from dpdl.ledger import Ledger
from dpdl.plan import PrivacyPlan
from dpdl.secure_random import RandomStream
from dpdl.split.certificates import make_certificates
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import ReleaseDoor
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.manifest import (
    CutTerms,
    LabelTerms,
    Manifest,
    ReleaseTerms,
    SignedManifest,
    agree,
    read_private_key,
    read_public_key,
)
from dpdl.split.manifest_of_run import manifest_of
from dpdl.split.part_training import PartTraining
from dpdl.split.topologies import vanilla

MINE = Manifest(
    topology="vanilla",
    parties=("client", "server"),
    cuts=(CutTerms(name="bottom", sender="client", receiver="server", shape=(16, 4), dtype="float32"),),
    sampling="poisson",
    sample_rate=0.05,
    expected_batch_size=64,
    clipping="part",
    clips={"top": 0.9, "bottom": 0.3},
    noise_multiplier=1.1,
    max_steps=300,
    deltas={"server": 1e-5, "model consumers": 1e-5},
    cut_release=ReleaseTerms(mode="release_once", max_norm=1, noise_multiplier=2),
    labels=LabelTerms(mechanism="memoized_randomized_response", epsilon=2, classes=10),
)

# One change of each field, and how the error calls it.
CHANGES: dict[str, tuple[Any, str]] = {
    "topology": ("u_shaped", "topology: 'vanilla' here, 'u_shaped' there"),
    "parties": (("client", "server", "mallory"), "parties: .*mallory"),
    "cuts": ((replace(MINE.cuts[0], shape=(16, 5)),), r"cuts\[0\].shape: \(16, 4\) here, \(16, 5\) there"),
    "sample_rate": (0.051, "sample_rate: 0.05 here, 0.051 there"),
    "expected_batch_size": (65, "expected_batch_size: 64 here, 65 there"),
    "clipping": ("joint", "clipping: "),
    "clips": ({"top": 0.9, "bottom": 0.4}, r"clips.bottom: 0.3 here, 0.4 there"),
    "noise_multiplier": (1.0, "noise_multiplier: 1.1 here, 1.0 there"),
    "max_steps": (301, "max_steps: 300 here, 301 there"),
    "deltas": ({"server": 1e-5}, r"deltas.model consumers: 1e-05 here, 'nothing' there"),
    "cut_release": (None, "cut_release: 'nothing' here, None there"),
    "labels": (replace(MINE.labels, epsilon=3.0), "labels.epsilon: 2.0 here, 3.0 there"),  # type: ignore[type-var]
    "gradient_release": (ReleaseTerms(mode="per_step", max_norm=1, noise_multiplier=1), "gradient_release.mode: "),
    "weight_sync": ("server", "weight_sync: "),
}


def test_equal_terms_are_the_same_text_and_digest_however_they_were_written() -> None:
    again = replace(MINE, clips={"bottom": 0.3, "top": 0.9}, parties=["client", "server"])  # type: ignore[arg-type]
    assert again.to_json() == MINE.to_json()
    assert again.digest == MINE.digest == hashlib.sha256(MINE.to_json().encode()).hexdigest()
    agree(MINE, again)
    assert Manifest.from_json(MINE.to_json()) == MINE
    assert Manifest.from_json(json.dumps(json.loads(MINE.to_json()), indent=3)).digest == MINE.digest


@pytest.mark.parametrize("change", [{"reduction": "mean"}, {"row_wise": False}, {"row_wise": 1}, {"sampling": "fixed"}])
def test_the_changes_cover_every_field_but_those_that_have_one_value(change: dict[str, Any]) -> None:
    assert set(CHANGES) | {"reduction", "row_wise", "sampling"} == {field.name for field in fields(Manifest)}
    (name,) = change
    with pytest.raises(ManifestError, match=name):
        replace(MINE, **change)


@pytest.mark.parametrize(
    "terms",
    [
        lambda: ReleaseTerms(mode="nonsense", max_norm=1.0, noise_multiplier=1.0),
        lambda: ReleaseTerms(mode="per_step", max_norm=-1, noise_multiplier=1.0),
        lambda: ReleaseTerms(mode="per_step", max_norm=1.0, noise_multiplier=0),
        lambda: LabelTerms(mechanism="another", epsilon=1.0, classes=2),
        lambda: LabelTerms(mechanism="memoized_randomized_response", epsilon=-3, classes=2),
        lambda: LabelTerms(mechanism="memoized_randomized_response", epsilon=1.0, classes="x"),  # type: ignore[arg-type]
    ],
)
def test_releases_that_nothing_could_make_are_refused(terms: Callable[[], object]) -> None:
    with pytest.raises(ManifestError):
        terms()


def test_a_manifest_is_made_from_what_the_run_is_made_of() -> None:
    graph = vanilla(nn.Linear(5, 4), nn.Linear(4, 2), lambda outputs, labels: outputs.sum())
    plan = PrivacyPlan(
        sample_rate=0.25, expected_batch_size=15, steps=8, noise_multiplier=1.5, max_grad_norm=2.0, dataset_size=60
    )
    mechanisms = {
        "activations": CutRelease(max_norm=1.0, noise_multiplier=4.0),
        "labels": MemoizedRandomizedResponse(epsilon=1.0, classes=3),
    }
    door = ReleaseDoor(
        training=PartTraining.unprotected(),
        ledger=Ledger(relation=NeighboringRelation.REPLACE_ONE),
        stream=RandomStream.from_os(),
        **mechanisms,  # type: ignore[arg-type]
    )
    same = {
        "topology": "vanilla",
        "rows": {"bottom": torch.ones(3, 4), "y": torch.ones(3).long()},
        "deltas": {"a": 0.1},
    }
    mine = manifest_of(graph, plan, door=door, **same)  # type: ignore[arg-type]
    assert mine.digest == manifest_of(graph, plan, **mechanisms, **same).digest  # type: ignore[arg-type]
    assert [(cut.name, cut.shape, cut.dtype) for cut in mine.cuts] == [("bottom", (4,), "float32"), ("y", (), "int64")]
    assert mine.clips == {"bottom": pytest.approx(2**0.5), "top": pytest.approx(2**0.5)}
    assert (mine.noise_multiplier, mine.max_steps, mine.sample_rate, mine.clipping) == (1.5, 8, 0.25, "part")
    assert mine.cut_release == ReleaseTerms(mode="per_step", max_norm=1.0, noise_multiplier=4.0)
    assert mine.labels == LabelTerms(mechanism="memoized_randomized_response", epsilon=1.0, classes=3)
    with pytest.raises(ManifestError, match="cut_release"):
        agree(mine, manifest_of(graph, plan, **same))  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=r"lack \['y'\]"):
        manifest_of(graph, plan, **{**same, "rows": {"bottom": torch.ones(3, 4)}})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_in_any_field_is_named_and_changes_the_digest(name: str) -> None:
    value, says = CHANGES[name]
    theirs = replace(MINE, **{name: value})
    assert theirs.digest != MINE.digest
    with pytest.raises(ManifestError, match=says):
        agree(MINE, theirs)
    with pytest.raises(ManifestError, match=name):
        agree(theirs, MINE)
    assert Manifest.from_json(theirs.to_json()) == theirs


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(ManifestError, match=r"clips.bottom.*max_steps.*noise_multiplier"):
        agree(MINE, replace(MINE, clips={"top": 0.9, "bottom": 0.2}, max_steps=1, noise_multiplier=9.0))
    more = replace(MINE, cuts=(*MINE.cuts, replace(MINE.cuts[0], name="second")))
    with pytest.raises(ManifestError, match=r"cuts\[1\].name: 'nothing' here, 'second' there"):
        agree(MINE, more)


def test_it_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        MINE.max_steps = 10**6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": float("nan")}, "sample_rate"),
        ({"sample_rate": True}, "sample_rate"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"expected_batch_size": 1.0}, "expected_batch_size"),
        ({"max_steps": 0}, "max_steps"),
        ({"noise_multiplier": -1}, "noise_multiplier"),
        ({"clips": {"top": 0.0}}, "clips"),
        ({"deltas": {"server": 1.0}}, "deltas"),
        ({"topology": 3}, "topology"),
        ({"parties": (1, 2)}, "parties"),
        ({"parties": ()}, "parties"),
        ({"clips": {}}, "clips"),
        ({"clips": {"a": "x"}}, "clips"),
        ({"clips": [1]}, "clips"),
        ({"clipping": "none"}, "clipping"),
        ({"weight_sync": "pigeon"}, "weight_sync"),
        ({"cuts": (CutTerms(name="z", sender="client", receiver="eve", shape=(), dtype="float32"),)}, "cuts"),
        ({"cut_release": "some"}, "cut_release"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        replace(MINE, **change)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        MINE.to_json().replace("manifest/1", "manifest/2"),
        MINE.to_json().replace('"max_steps":300,', ""),
        MINE.to_json().replace('"max_steps":300,', '"max_steps":300,"more":1,'),
        MINE.to_json().replace('"max_steps":300', '"max_steps":"300"'),
        MINE.to_json().replace('"mode":"release_once"', '"mode":"release_once","more":1'),
        MINE.to_json().replace('"shape":[16,4]', '"shape":7'),
        MINE.to_json().replace('"shape":[16,4]', '"shape":[-1]'),
        MINE.to_json().replace('"clips":{"bottom":0.3,"top":0.9}', '"clips":[1]'),
        MINE.to_json().replace('"clips":{"bottom":0.3,"top":0.9}', '"clips":{"a":"x"}'),
        MINE.to_json().replace('"cuts":[{', '"cuts":[3,{'),
        " " * 2**21,
    ],
)
def test_a_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_what_one_party_signs_the_other_can_check(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    signed = MINE.sign(read_private_key(tmp_path / "client.signing.key"), party="client")
    came = SignedManifest.from_json(signed.to_json())
    assert came.verified(read_public_key(tmp_path / "client.signing.pub")) == MINE
    with pytest.raises(ManifestError, match="not signed by the key that we have"):
        came.verified(read_public_key(tmp_path / "server.signing.pub"))


def test_a_signature_covers_every_field_and_the_party() -> None:
    key = Ed25519PrivateKey.generate()
    signed = MINE.sign(key, party="client")
    for name, (value, _) in CHANGES.items():
        with pytest.raises(ManifestError, match="not signed"):
            replace(signed, manifest=replace(MINE, **{name: value})).verified(key.public_key())
    with pytest.raises(ManifestError, match="not signed"):
        replace(signed, party="server").verified(key.public_key())
    for signature in ("", "zz", signed.signature[:-2], signed.signature.replace(signed.signature[0], "0")[:-1] + "f"):
        with pytest.raises(ManifestError, match="not signed"):
            replace(signed, signature=signature).verified(key.public_key())
    for text in ("{}", '{"manifest":1,"party":"a","signature":"b"}'):
        with pytest.raises(ManifestError, match="signed manifest"):
            SignedManifest.from_json(text)


def test_keys_that_are_not_there_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    for read in (read_private_key, read_public_key):
        with pytest.raises(ManifestError, match="dpdl split certificates"):
            read(tmp_path / "missing")
        with pytest.raises(ManifestError, match="dpdl split certificates"):
            read(tmp_path / "client.pem")
    with pytest.raises(ManifestError, match="another kind"):
        read_private_key(tmp_path / "client.key")
