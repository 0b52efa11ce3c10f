"""A door is held to what the run really does, and what it released outlives its process."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accountants import Event, NeighboringRelation, PRVAccountant
from dpdl.errors import CheckpointError, ModelError, ParameterError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.secure_random import RandomStream
from dpdl.split.clip import PartClip
from dpdl.split.cut_release import CutRelease
from dpdl.split.door import Once, ReleaseDoor
from dpdl.split.graph import SplitGraph
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.report import RowsSent, SplitFacts, split_report
from dpdl.split.row_cache import RowCache
from dpdl.split.topologies import chain, vanilla
from tests.split.releases.test_door import CUT, ONCE, door, epsilon_of, leaving
from tests.split.releases.test_row_account import gdp_epsilon

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
FLIPPED = MemoizedRandomizedResponse(epsilon=1.0, classes=2)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def network(*, frozen: bool = False) -> SplitGraph:
    return vanilla(nn.Sequential(nn.Linear(2, 3)).requires_grad_(not frozen), nn.Linear(3, 2), loss)


def bind(of: ReleaseDoor, graph: SplitGraph, party: str = "client", sigma: float = 1.0) -> None:
    of.bind(graph, party, clip=PartClip.equal(1.0, graph), noise_multiplier=sigma)


def label_claim(of: ReleaseDoor) -> float:
    labels = of.labels
    assert labels is not None
    facts = SplitFacts(rows=RowsSent(spent=of.event("server"), training=of.training, release=CUT), labels=labels)
    (claim,) = [c for c in split_report(facts, delta=1e-12).against("server") if c.unit == "label"]
    assert claim.epsilon is not None
    return claim.epsilon


# ── what the run really does ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_part_that_trains_is_not_called_frozen(sigma: float) -> None:
    with pytest.raises(ParameterError, match="frozen and public; in this run they are trained with"):
        bind(door(activations=CUT, training=PartTraining.frozen()), network(), sigma=sigma)


def test_steps_with_less_noise_than_was_said_are_refused() -> None:
    party = door(activations=CUT, training=PartTraining.private(noise_multiplier=1e9))
    with pytest.raises(ParameterError, match=r"in this run they are trained with noise of 0\.01"):
        bind(party, network(), sigma=0.01)
    assert not party.training.checked
    exact = door(activations=CUT, training=PartTraining.private(noise_multiplier=math.sqrt(2)))
    bind(exact, network())
    assert exact.training.checked
    bind(door(activations=CUT, training=PartTraining.unprotected()), network())  # worse than it is: no harm


def test_parts_of_earlier_parties_count_and_those_of_the_receiver_do_not() -> None:
    graph = chain([nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)], loss, parties=("a", "b", "c"))
    clip = PartClip.equal(1.0, graph)
    alone = PartTraining.of(graph, "b", clip=clip, noise_multiplier=1.0)
    both = PartTraining.of(graph, "a", "b", clip=clip, noise_multiplier=1.0)
    with pytest.raises(ParameterError, match="door of 'b'"):
        bind(door(activations=CUT, training=alone), graph, "b")
    bind(door(activations=CUT, training=both), graph, "b")


@pytest.mark.parametrize("how", ["in place", "through .data"])
def test_a_frozen_part_that_changes_ends_releases_and_claims(how: str) -> None:
    graph = network(frozen=True)
    part = graph.part("bottom").module
    assert isinstance(part, nn.Sequential)
    layer = part[0]
    assert isinstance(layer, nn.Linear)
    party = door(activations=CUT, training=PartTraining.frozen())
    bind(party, graph)
    with torch.no_grad():
        layer.weight.add_(1)  # before the first row leaves: weights are still being loaded
    party(leaving("activations", torch.ones(2, 3), [0, 1], 0))
    before = party.ledger.releases
    if how == "in place":
        with torch.no_grad():
            layer.weight.add_(1)
        with pytest.raises(ModelError, match="'bottom' does not train in this run"):
            party(leaving("activations", torch.ones(2, 3), [0, 1], 1))
        assert party.ledger.releases == before
    else:
        layer.weight.data[0, 0] += 1
    with pytest.raises(ModelError, match="'bottom' does not train in this run"):
        party.event("server")


def test_what_no_run_has_compared_is_an_assumption_of_the_claim() -> None:
    def assumed(of: ReleaseDoor) -> bool:
        facts = SplitFacts(rows=RowsSent(spent=of.event(), training=of.training, release=CUT), labels="there")
        (claim,) = split_report(facts, delta=1e-5).against("server")
        return any("no run has compared it" in word for word in claim.assumes)

    party = door(activations=CUT, training=PartTraining.frozen())
    party(leaving("activations", torch.ones(2, 3), [0, 1]))
    assert assumed(party)
    bind(party, network(frozen=True))
    assert not assumed(party)


# ── released once ───────────────────────────────────────────────────────────────────────────────────


def once_door(encoder: nn.Module, data: Tensor) -> ReleaseDoor:
    once = Once(encoder=encoder, inputs=lambda numbers: data[numbers], cache=RowCache())
    return door(activations=ONCE, training=PartTraining.frozen(), once=once)


def test_the_encoder_is_the_part_whose_rows_leave_and_does_not_train() -> None:
    data = torch.randn(4, 2)
    frozen = network(frozen=True)
    module = frozen.part("bottom").module
    assert module is not None
    bind(once_door(module, data), frozen)
    with pytest.raises(ParameterError, match="none of the parts"):
        bind(once_door(copy.deepcopy(module), data), frozen)
    training = network()
    module = training.part("bottom").module
    assert module is not None
    with pytest.raises(ParameterError, match=r"\['bottom'\] train in this run"):
        bind(once_door(module, data), training)


def test_what_leaves_once_is_the_encoders_own_whatever_the_network_computed() -> None:
    """Rows of another module, or of an encoder that mixes the batch, have no way into the cache."""
    data = torch.zeros(4, 2)
    plain = nn.Linear(2, 3, bias=False)
    generous = CutRelease(max_norm=1e6, noise_multiplier=1e-9, mode="release_once")
    once = Once(encoder=plain, inputs=lambda numbers: data[numbers], cache=RowCache())
    exact = door(activations=generous, training=PartTraining.frozen(), once=once)
    rows = exact(leaving("activations", torch.full((4, 3), 1e3), [0, 1, 2, 3])).rows
    assert rows.abs().max() < 1


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────


def test_labels_drawn_in_several_processes_count_every_time(tmp_path: Path) -> None:
    claims = []
    for _ in range(3):
        with LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE) as ledger:
            party = door(activations=CUT, labels=FLIPPED, ledger=ledger, training=PartTraining.frozen())
            party(leaving("labels", torch.tensor([0, 1]), [0, 1], name="y"))
            claims.append(label_claim(party))
    assert claims == [pytest.approx(n * 1.0, rel=0.02) for n in (1, 2, 3)]


def test_two_columns_of_one_records_labels_compose() -> None:
    party = door(activations=CUT, labels=FLIPPED, training=PartTraining.frozen())
    assert party.labels == FLIPPED
    for name in ("y1", "y2"):
        party(leaving("labels", torch.tensor([0, 1]), [0, 1], name=name))
    assert label_claim(party) == pytest.approx(2.0, rel=0.02)


# ── rows without names ──────────────────────────────────────────────────────────────────────────────


def test_one_record_many_times_in_a_prediction_is_as_many_releases() -> None:
    party = door(activations=CUT, training=PartTraining.frozen())
    party(leaving("activations", torch.ones(400, 2), None, purpose="infer"))
    assert epsilon_of(party) == pytest.approx(gdp_epsilon(2 / 4 * math.sqrt(400)), rel=1e-3)
    named = door(activations=CUT, training=PartTraining.frozen())
    named(leaving("activations", torch.ones(3, 2), [5, 5, 6], purpose="infer"))
    assert epsilon_of(named) == pytest.approx(gdp_epsilon(2 / 4 * math.sqrt(2)), rel=1e-4)


def test_a_training_step_with_a_row_twice_is_refused() -> None:
    party = door(activations=CUT)
    with pytest.raises(ParameterError, match="a row more than once"):
        party(leaving("activations", torch.ones(3, 2), [5, 5, 6]))
    assert party.ledger.releases == 0


# ── over restarts ───────────────────────────────────────────────────────────────────────────────────


def spent(of: ReleaseDoor) -> float:
    events: list[Event] = [of.event()]
    return PRVAccountant(relation=REPLACE_ONE).compose(events[0]).epsilon(1e-5)


def used(steps: int, **arguments: object) -> ReleaseDoor:
    party = door(activations=CUT, labels=FLIPPED, **arguments)
    for step in range(steps):
        party(leaving("activations", torch.ones(2, 3), [0, 1], step))
        party(leaving("labels", torch.tensor([0, 1]), [0, 1], step, name="y"))
    return party


def test_a_door_goes_on_from_its_state() -> None:
    first = used(8)
    first(leaving("gradients", torch.ones(2, 3), [0, 1]))
    second = door(activations=CUT, labels=FLIPPED)
    second.load_state_dict(first.state_dict())
    assert spent(second) == spent(first)
    assert second.unprotected == first.unprotected == {("server",): {"gradients"}}
    for step in range(2):
        second(leaving("activations", torch.ones(2, 3), [0, 1], step, session="another"))
        second(leaving("labels", torch.tensor([0, 1]), [0, 1], step, name="y", session="another"))
    assert epsilon_of(second) == pytest.approx(gdp_epsilon(math.sqrt(10 * ((2 / 4) ** 2 + (2 / 5) ** 2))), rel=1e-4)
    assert label_claim(second) == pytest.approx(2.0, rel=0.02)  # drawn in memory, and so drawn again


def test_no_state_lowers_a_claim_and_none_counts_twice(tmp_path: Path) -> None:
    party = used(3)
    older = party.state_dict()
    party(leaving("activations", torch.ones(2, 3), [0, 1], 3))
    known = spent(party)
    for state in (older, door().state_dict(), party.state_dict()):
        party.load_state_dict(state)
        assert spent(party) == known
    party.load_state_dict(used(1).state_dict())  # another door's adds up
    assert spent(party) > known
    kept = used(3, ledger=LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE))
    again = door(activations=CUT, ledger=LedgerFile(tmp_path / "ledger", relation=REPLACE_ONE))
    again.load_state_dict(kept.state_dict())
    assert spent(again) == spent(kept)


def test_a_damaged_state_is_refused_and_changes_nothing() -> None:
    good = used(2).state_dict()
    party = door(activations=CUT)
    for bad in (
        {},
        None,
        {**good, "schema": "x"},
        {**good, "ledger": "{"},
        {**good, "ledger": None},
        {**good, "unprotected": [1]},
        {name: value for name, value in good.items() if name != "unprotected"},
        {**good, "ledger": Ledger(relation=NeighboringRelation.ADD_OR_REMOVE).to_json()},
    ):
        with pytest.raises(CheckpointError):
            party.load_state_dict(bad)  # type: ignore[arg-type]
    assert party.ledger.releases == 0
    assert party.unprotected == {}


@pytest.mark.parametrize("wrong", [{"training": None}, {"stream": None}, {"activations": "x"}, {"labels": 3}])
def test_arguments_of_another_kind_are_refused_by_name(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(ParameterError, match=f"{name} of the door must be"):
        door(**wrong)


def test_a_seeded_door_is_known_to_be() -> None:
    assert not door(stream=RandomStream.from_insecure_seed(1)).secure
