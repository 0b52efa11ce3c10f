"""What a report is told of a run follows from its graph and doors, whatever the topology."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accountants import Composed, Gaussian, NeighboringRelation
from dpdl.errors import ParameterError
from dpdl.ledger import Ledger
from dpdl.secure_random import RandomStream
from dpdl.split.clip import JointClip, PartClip
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import ReleaseDoor
from dpdl.split.facts_of_run import facts_of_run
from dpdl.split.gradient_release import GradientRelease
from dpdl.split.graph import Head, Part, SplitGraph
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.outlet import Leaving
from dpdl.split.part_training import PartTraining
from dpdl.split.report import SplitFacts, split_report
from dpdl.split.topologies import extended, multi_task, u_shaped, vanilla, vertical

CLIP = PartClip(max_grad_norm=1.0)
CUT = CutRelease(max_norm=1.0, noise_multiplier=4.0)
BACK = GradientRelease(max_norm=0.1, noise_multiplier=6.0)
FLIPPED = MemoizedRandomizedResponse(epsilon=1.0, classes=2)
PRIVATE = PartTraining.private(noise_multiplier=3.0)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def linear() -> nn.Module:
    return nn.Linear(3, 3)


def door(**mechanisms: object) -> ReleaseDoor:
    ledger = Ledger(relation=NeighboringRelation.REPLACE_ONE)
    return ReleaseDoor(training=PRIVATE, ledger=ledger, stream=RandomStream.from_os(), **mechanisms)  # type: ignore[arg-type]


def used(of: ReleaseDoor, content: str, receiver: str) -> ReleaseDoor:
    """A door through which one batch has gone."""
    rows = torch.zeros(2, dtype=torch.int64) if content == "labels" else torch.ones(2, 3)
    of(
        Leaving(
            content=content,  # type: ignore[arg-type]
            name="it",
            sender="client",
            receivers=(receiver,),
            rows=rows,
            row_numbers=torch.arange(2),
            purpose="train",
            step=0,
            session="s",
        )
    )
    return of


def guarantees(facts: SplitFacts) -> dict[str, set[str]]:
    """Adversary to the units for which it has a bound on what it learns."""
    report = split_report(facts, delta=1e-5)
    return {name: {c.unit for c in report.against(name) if c.guaranteed} for name in report.adversaries}


def test_a_run_without_doors_has_a_claim_for_consumers_alone() -> None:
    facts = facts_of_run(vanilla(linear(), linear(), loss), "client", door=None, clip=CLIP, dp_sgd=Gaussian(1.0))
    assert (facts.labels, facts.returned, facts.vertical) == ("clear", None, False)
    assert guarantees(facts) == {"model consumers": {"record"}, "server": set(), "other clients": {"record"}}


def test_a_vanilla_run_through_a_door_covers_all_that_it_protects() -> None:
    party = used(used(door(activations=CUT, labels=FLIPPED), "activations", "server"), "labels", "server")
    facts = facts_of_run(vanilla(linear(), linear(), loss), "client", door=party, clip=CLIP, dp_sgd=None)
    assert facts.rows.spent == party.event("server")
    assert guarantees(facts)["server"] == {"record", "features", "label"}
    assert guarantees(facts)["model consumers"] == {"record"}
    joint = facts_of_run(
        vanilla(linear(), linear(), loss), "client", door=party, clip=JointClip(max_grad_norm=1.0), dp_sgd=None
    )
    assert guarantees(joint)["server"] == {"label"}


def test_labels_stay_in_a_u_shape_and_its_gradients_are_the_second_release() -> None:
    graph = u_shaped(linear(), linear(), linear(), loss)
    both = used(used(door(activations=CUT, gradients=BACK), "activations", "server"), "gradients", "server")
    facts = facts_of_run(graph, "client", door=both, clip=CLIP, dp_sgd=None)
    assert (facts.labels, facts.rows.gradients) == ("stay", BACK)
    assert guarantees(facts)["server"] == {"record"}
    first = facts_of_run(
        graph, "client", door=used(door(activations=CUT), "activations", "server"), clip=CLIP, dp_sgd=None
    )
    assert guarantees(first)["server"] == set()


def test_feature_holders_of_the_same_records_are_adversaries_of_each_other_and_of_the_label_holder() -> None:
    graph = vertical({"a": linear(), "b": linear()}, nn.Linear(6, 2), loss)
    raw = facts_of_run(graph, "a", door=None, clip=CLIP, dp_sgd=Gaussian(1.0))
    assert (raw.labels, raw.vertical) == ("there", True)
    assert guarantees(raw) == {
        "model consumers": {"record"},
        "server": set(),
        "other clients": set(),
        "label holder": set(),
        "feature holder": set(),
    }
    label_door = used(door(gradients=BACK), "gradients", "a")
    noised = facts_of_run(
        graph,
        "a",
        door=used(door(activations=CUT), "activations", "server"),
        label_door=label_door,
        clip=CLIP,
        dp_sgd=Gaussian(1.0),
    )
    assert noised.returned is not None
    assert noised.returned.spent == label_door.event("a") != Composed(())
    assert guarantees(noised) == {
        "model consumers": {"record"},
        "server": {"features"},
        "other clients": {"features"},
        "label holder": {"features"},
        "feature holder": {"label"},
    }


def test_a_third_party_with_the_labels_is_asked_how_it_sends_them() -> None:
    graph = vanilla(linear(), linear(), loss, labels_of="registry")
    clear = facts_of_run(graph, "client", door=None, clip=CLIP, dp_sgd=None)
    assert clear.labels == "clear"
    assert guarantees(clear)["feature holder"] == set()
    flipped = facts_of_run(graph, "client", door=None, label_door=door(labels=FLIPPED), clip=CLIP, dp_sgd=None)
    assert flipped.labels == FLIPPED
    assert guarantees(flipped)["feature holder"] == {"label"}
    # The client's own door says nothing about labels that it does not have.
    assert facts_of_run(graph, "client", door=door(labels=FLIPPED), clip=CLIP, dp_sgd=None).labels == "clear"


def test_every_topology_has_a_report() -> None:
    tasks = multi_task(linear(), {"s": linear(), "t": linear()}, {"s": loss, "t": loss})
    hops = extended({"a": linear(), "b": linear()}, nn.Linear(6, 3), linear(), loss)
    for graph, party in ((tasks, "client"), (hops, "a"), (hops, "between")):
        facts = facts_of_run(graph, party, door=None, clip=CLIP, dp_sgd=Gaussian(1.0))
        assert guarantees(facts)["model consumers"] == {"record"}
        assert guarantees(facts)["server"] == set()


def test_predictions_that_leave_as_they_are_are_named() -> None:
    party = used(door(activations=CUT), "predictions", "elsewhere")
    facts = facts_of_run(vanilla(linear(), linear(), loss), "client", door=party, clip=CLIP, dp_sgd=None)
    assert "predictions, to elsewhere" in split_report(facts, delta=1e-5).not_covered


def test_a_doors_insecure_seed_is_said() -> None:
    ledger = Ledger(relation=NeighboringRelation.REPLACE_ONE)
    seeded = ReleaseDoor(training=PRIVATE, ledger=ledger, stream=RandomStream.from_insecure_seed(0))
    facts = facts_of_run(vanilla(linear(), linear(), loss), "client", door=seeded, clip=CLIP, dp_sgd=None)
    assert not facts.secure


def test_a_party_that_sends_no_rows_has_no_such_report() -> None:
    with pytest.raises(ParameterError, match=r"\['client'\]"):
        facts_of_run(vanilla(linear(), linear(), loss), "server", door=None, clip=CLIP, dp_sgd=None)


def test_a_door_that_calls_parts_frozen_which_train_has_no_facts() -> None:
    ledger = Ledger(relation=NeighboringRelation.REPLACE_ONE)
    cut = CutRelease(max_norm=1.0, noise_multiplier=4.0)
    lying = ReleaseDoor(activations=cut, training=PartTraining.frozen(), ledger=ledger, stream=RandomStream.from_os())
    with pytest.raises(ParameterError, match=r"\['bottom'\] train"):
        facts_of_run(vanilla(linear(), linear(), loss), "client", door=lying, clip=CLIP, dp_sgd=None)


def test_an_own_loss_beside_another_partys_is_in_no_report() -> None:
    parts = (
        Part(name="bottom", party="client", inputs=("x",), module=linear()),
        Part(name="middle", party="server", inputs=("bottom",), module=linear()),
        Part(name="top", party="client", inputs=("middle",), module=linear()),
    )
    heads = (
        Head(name="own", party="client", part="top", labels="y1", loss_fn=loss),
        Head(name="theirs", party="server", part="middle", labels="y2", loss_fn=loss),
    )
    with pytest.raises(ParameterError, match="a loss of its own beside"):
        facts_of_run(SplitGraph(parts=parts, heads=heads), "client", door=None, clip=CLIP, dp_sgd=None)
