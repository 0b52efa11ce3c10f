"""A manifest that does not say what a party's own run does is refused by that party, at the greeting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

import dpdl
from dpdl.errors import ManifestError
from dpdl.secure_random import RandomStream
from dpdl.split.agreed_terms import refuse_another_run
from dpdl.split.channel import Packet
from dpdl.split.client import SplitClient
from dpdl.split.clip import Clip, JointClip, PartClip
from dpdl.split.cut_release import CutRelease
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.door import ReleaseDoor
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.graph import SplitGraph
from dpdl.split.handshake import AgreedChannel, ManifestGate
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.manifest import CutTerms, LabelTerms, Manifest, ReleaseTerms
from dpdl.split.manifest_of_run import manifest_of
from dpdl.split.part_training import PartTraining
from dpdl.split.server import SplitServer
from dpdl.split.topologies import vanilla, vertical
from tests.split.core.networks import ROWS, cases, sum_of_cross_entropies
from tests.split.core.runs import plan_of, run_of

TOPOLOGIES = {case.name: case for case in cases()}
KEYS = {name: Ed25519PrivateKey.generate() for name in ("client", "server")}
PUBLIC = {name: key.public_key() for name, key in KEYS.items()}
PLAN = plan_of(noise_multiplier=1.0, steps=3)
MADE_UP = {"bottom": torch.empty(0, 5), "y": torch.empty(0, dtype=torch.int64)}


def graph_of(bottom: nn.Module | None = None) -> SplitGraph:
    torch.manual_seed(0)
    return vanilla(bottom or nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3), sum_of_cross_entropies)


def door_of(graph: SplitGraph, **mechanisms: Any) -> ReleaseDoor:
    clip = PartClip.equal(PLAN.max_grad_norm, graph)
    return ReleaseDoor(
        **mechanisms,
        training=PartTraining.of(graph, "client", clip=clip, noise_multiplier=PLAN.noise_multiplier),
        ledger=dpdl.Ledger(relation="replace_one"),
        stream=RandomStream.from_os(),
    )


def terms_of(graph: SplitGraph, **settings: Any) -> Manifest:
    given: dict[str, Any] = {"topology": "vanilla", "rows": MADE_UP, "deltas": {"model consumers": 1e-5}}
    return manifest_of(graph, PLAN, **{**given, **settings})


class Site:
    """A client and a server whose manifests are given, and not made from what they do."""

    def __init__(
        self,
        *,
        of_client: Manifest,
        of_server: Manifest | None = None,
        clip: Clip | None = None,
        release: ReleaseDoor | None = None,
        gate_only: bool = False,
    ) -> None:
        graph = graph_of()
        weights = {part.party: list(part.module.parameters()) for part in graph.parts if part.module}
        optimizers = {party: torch.optim.SGD(held, lr=0.1) for party, held in weights.items()}
        server = SplitServer(graph, plan=PLAN, optimizer=optimizers["server"], clip=clip)
        self.asked: list[str] = []

        def handler(packet: Packet) -> Packet:
            self.asked.append(packet.kind)
            return server.handle(packet)

        gate = ManifestGate(
            handler,
            (of_server or of_client).sign(KEYS["server"], party="server"),
            keys={"client": PUBLIC["client"]},
        )
        line: Any = DirectChannel(gate)
        signed = of_client.sign(KEYS["client"], party="client")
        agreed = AgreedChannel(line, signed, keys={"server": PUBLIC["server"]})
        self.client = SplitClient(
            graph,
            plan=PLAN,
            clip=clip,
            optimizer=optimizers["client"],
            data={"x": torch.randn(ROWS, 4), "y": torch.randint(3, (ROWS,))},
            channels={"server": _Unseen(agreed) if gate_only else agreed},
            release=release,
        )


class _Unseen:
    """An agreed channel that the client cannot look into, so that only the other party compares."""

    def __init__(self, channel: AgreedChannel) -> None:
        self.request, self.close = channel.request, channel.close
        self.bytes_sent = self.bytes_received = 0


CHANGES: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "clip": (lambda m: replace(m, clips={**m.clips, "bottom": 9.0}), "clips.bottom: 0.49.* in the run, 9.0 in the man"),
    "a part left out": (lambda m: replace(m, clips={"top": m.clips["top"]}), "clips.bottom"),
    "clipping": (lambda m: replace(m, clipping="joint"), "clipping: 'part' in the run, 'joint' in the manifest"),
    "noise": (lambda m: replace(m, noise_multiplier=2.0), "noise_multiplier: 1.0 in the run, 2.0 in the manifest"),
    "sampling rate": (lambda m: replace(m, sample_rate=0.01), "sample_rate: 0.1 in the run, 0.01 in the manifest"),
    "batch size": (lambda m: replace(m, expected_batch_size=7), "expected_batch_size: 6 in the run, 7"),
    "steps": (lambda m: replace(m, max_steps=2), "max_steps: 3 in the run, 2 in the manifest"),
    "parties": (lambda m: replace(m, parties=(*m.parties, "hub")), "parties: "),
    "a cut": (lambda m: replace(m, cuts=m.cuts[:1]), r"cuts\[1\].name: 'y' in the run, 'nothing' in the manifest"),
    "receiver": (
        lambda m: replace(m, cuts=(replace(m.cuts[0], sender="server", receiver="client"), m.cuts[1])),
        r"cuts\[0\].receiver: 'server' in the run, 'client' in the manifest",
    ),
    "dtype": (lambda m: replace(m, cuts=(replace(m.cuts[0], dtype="tensor"), m.cuts[1])), "one of torch's"),
    "a release": (
        lambda m: replace(m, cut_release=ReleaseTerms(mode="per_step", max_norm=1, noise_multiplier=9)),
        "cut_release: None in the run, 'nothing' in the manifest",
    ),
    "answers": (
        lambda m: replace(m, labels=LabelTerms(mechanism="memoized_randomized_response", epsilon=1, classes=3)),
        "labels: None in the run",
    ),
    "gradients": (
        lambda m: replace(m, gradient_release=ReleaseTerms(mode="per_step", max_norm=1, noise_multiplier=9)),
        "gradient_release: None in the run",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_client_refuses_a_manifest_that_says_something_else_than_its_run(name: str) -> None:
    change, says = CHANGES[name]
    site = Site(of_client=change(terms_of(graph_of())))
    with pytest.raises(ManifestError, match=says):
        site.client.step()
    assert site.asked == []
    assert site.client.steps_taken == 0


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("a release", "answers")])
def test_a_server_refuses_it_too_whatever_the_client_does(name: str) -> None:
    """All but the releases of the client's rows and labels, which the server cannot know of."""
    change, says = CHANGES[name]
    site = Site(of_client=change(terms_of(graph_of())), gate_only=True)
    with pytest.raises(ManifestError, match=says):
        site.client.step()
    assert site.asked == ["hello"]
    assert site.client.steps_taken == 0


def test_the_run_that_the_manifest_says_goes_on() -> None:
    site = Site(of_client=terms_of(graph_of()))
    site.client.run()
    assert site.client.steps_taken == 3


def test_clips_of_another_split_and_joint_clipping_go_on_under_their_own_manifest_alone() -> None:
    uneven = PartClip(max_grad_norm={"bottom": 0.7 * 0.6, "top": 0.7 * 0.8})
    for clip in (uneven, JointClip(max_grad_norm=0.7)):
        graph = graph_of()
        Site(of_client=terms_of(graph, clip=clip), clip=clip).client.run(1)
        with pytest.raises(ManifestError, match="clip"):
            Site(of_client=terms_of(graph), clip=clip).client.run(1)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((6,), "float32"), ((5, 1), "float32"), ((5,), "float64")], ids=["width", "rank", "dtype"]
)
def test_rows_of_another_shape_than_agreed_are_refused_before_a_private_one_leaves(
    shape: tuple[int, ...], dtype: str
) -> None:
    said = terms_of(graph_of())
    said = replace(said, cuts=(replace(said.cuts[0], shape=shape, dtype=dtype), said.cuts[1]))
    site = Site(of_client=said)
    with pytest.raises(ManifestError, match=r"Rows of 'bottom' at '(client|server)' are of shape \(5,\) and float32,"):
        site.client.step()
    assert site.client.steps_taken == 0
    assert not any(kind.startswith("step") for kind in site.asked)


def test_a_doors_mechanisms_must_be_those_of_the_manifest() -> None:
    graph = graph_of()
    activations = CutRelease(max_norm=1.0, noise_multiplier=4.0)
    labels = MemoizedRandomizedResponse(epsilon=1.0, classes=3)
    said = terms_of(graph, activations=activations, labels=labels)
    Site(of_client=said, release=door_of(graph, activations=activations, labels=labels)).client.run(1)
    for other, says in (
        (None, "cut_release"),
        (door_of(graph, activations=activations), "labels"),
        (door_of(graph, activations=replace(activations, noise_multiplier=1.0), labels=labels), "noise_multiplier"),
        (door_of(graph, activations=replace(activations, max_norm=9.0), labels=labels), "max_norm"),
        (door_of(graph, activations=activations, labels=replace(labels, epsilon=5.0)), "labels.epsilon"),
    ):
        with pytest.raises(ManifestError, match=says):
            Site(of_client=said, release=other).client.run(1)
    with pytest.raises(ManifestError, match="cut_release"):  # a door that the manifest does not name
        Site(of_client=terms_of(graph), release=door_of(graph, activations=activations)).client.run(1)


def test_gradients_are_released_by_who_has_the_labels() -> None:
    run = run_of(TOPOLOGIES["vanilla, labels with the server"].fresh(), plan_of(noise_multiplier=1.0))
    release = GradientRelease(max_norm=1.0, noise_multiplier=4.0)
    said = manifest_of(
        run.graph, run.client.plan, topology="vanilla", rows=MADE_UP, deltas={"server": 1e-5}, gradients=release
    )
    client, server = run.client.party, run.servers["server"].party
    refuse_another_run(said, client, client.client("client"))  # not for the client to do
    with pytest.raises(ManifestError, match="gradient_release"):
        refuse_another_run(said, server, server.client("client"))


def test_each_owner_of_features_must_release_what_the_manifest_says() -> None:
    sides = {"a": nn.Linear(4, 3), "b": nn.Linear(2, 4)}
    graph = vertical(sides, nn.Linear(7, 3), sum_of_cross_entropies)
    case = replace(TOPOLOGIES["vertical"].fresh(), graph=lambda m: graph)
    run = run_of(case, plan_of(noise_multiplier=1.0))
    rows: dict[str, Tensor] = {cut.name: torch.empty(0, 3) for cut in graph.cuts}
    release = CutRelease(max_norm=1.0, noise_multiplier=4.0)
    said = manifest_of(
        graph, run.client.plan, topology="vertical", rows=rows, deltas={"server": 1e-5}, activations=release
    )
    for name, server in run.servers.items():
        with pytest.raises(ManifestError, match=rf"'{name}'.*cut_release"):
            refuse_another_run(said, server.party, server.party.client(run.client.name))
    driver = run.client.party
    refuse_another_run(said, driver, driver.client(run.client.name))  # the label holder sends no rows


def test_cuts_that_the_run_does_not_have_are_named() -> None:
    said = terms_of(graph_of())
    more = CutTerms(name="second", sender="client", receiver="server", shape=(2,), dtype="float32")
    with pytest.raises(ManifestError, match=r"cuts\[2\].name: 'nothing' in the run, 'second' in the manifest"):
        Site(of_client=replace(said, cuts=(*said.cuts, more))).client.step()
