"""What a report needs to know of a run, read from its graph and from the door of the party whose records it is about.

facts = facts_of_run(run.graph, "clinic", door=door, clip=clip, dp_sgd=run.ledger.event)
print(split_report(facts, delta=1e-5))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from accountants import Composed, Event, NeighboringRelation
from dpdl.errors import ParameterError
from dpdl.split.clip import Clip, JointClip
from dpdl.split.door import ReleaseDoor
from dpdl.split.graph import SplitGraph
from dpdl.split.kept_parts import parts_before
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.report import GradientsReturned, RowsSent, SplitFacts

__all__ = ["facts_of_run"]

_NOTHING = Composed(())


def facts_of_run(
    graph: SplitGraph,
    party: str,
    *,
    door: ReleaseDoor | None,
    clip: Clip,
    dp_sgd: Event | None,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE,
    label_door: ReleaseDoor | None = None,
    probes: int = 0,
    weights_relayed: bool = False,
    unprotected: Sequence[str] = (),
    secure: bool = True,
) -> SplitFacts:
    """The facts about one party's records.

    Args:
        graph: the network.
        party: an owner of features.
        door: through which its rows leave; None if they leave as they are.
        clip: of the run.
        dp_sgd: the steps so far; None, or noise of multiplier 0, if they had no noise.
        relation: under which those are accounted.
        label_door: of the labels' owner, or of who has the loss, where that is another party; None if it has none, or
            it is not known here.
        probes: row-independence probes that were answered well.
        weights_relayed: whether other clients get this party's weights during the run.
        unprotected: what else left as it was, in words.
        secure: whether nobody knows the seed of the run's own noise; the door's is looked at.

    Raises:
        ParameterError: the party sends no activations; it has losses of its own beside another party's, which no claim
            is worked out for; or parts train that the door was told are frozen.
    """
    if party in (judges := {head.party for head in graph.heads}) and len(judges) > 1:
        raise ParameterError(
            f"'{party}' has a loss of its own beside those of {sorted(judges - {party})}: what the gradients of its "
            "head tell of its own labels is in no claim. Report the two tasks as two runs."
        )
    if door is not None and door.activations is not None and door.activations.mode == "per_step":
        trained = [part.name for part in graph.trained if part.name in parts_before(graph, party)]
        if trained and not door.training.trained:
            raise ParameterError(
                f"The door of '{party}' was told that the parts before it are frozen, and {sorted(trained)} train. "
                "Give it training=PartTraining.of(...)."
            )
    receivers = {cut.receiver for cut in graph.cuts if cut.sender == party and cut.kind == "activations"}
    if not receivers:
        senders = sorted({cut.sender for cut in graph.cuts if cut.kind == "activations"})
        raise ParameterError(f"party must be one that sends activations, {senders}, got {party!r}.")
    holders = {graph.columns[head.labels] for head in graph.heads}
    losses = {head.party for head in graph.heads}
    labels = _labels(party, holders, losses, door if party in holders else label_door)
    rows = RowsSent(
        spent=_NOTHING if door is None else door.event(),
        training=PartTraining.unprotected() if door is None else door.training,
        release=None if door is None else door.activations,
        gradients=door.gradients if door is not None and labels == "stay" else None,
    )
    back = any(cut.returns for cut in graph.cuts if cut.sender == party)
    returned = None
    if back and party not in holders:
        returned = GradientsReturned(training=PartTraining.unprotected())
        if label_door is not None:
            returned = GradientsReturned(
                training=label_door.training, release=label_door.gradients, spent=label_door.event(party)
            )
    passed = () if door is None else tuple(_also_passed(door))
    return SplitFacts(
        rows=rows,
        labels=labels,
        dp_sgd=dp_sgd,
        relation=relation,
        clip="joint" if isinstance(clip, JointClip) else "part",
        returned=returned,
        weights_relayed=weights_relayed,
        vertical=len({owner for name, owner in graph.columns.items() if _feeds_a_part(graph, name)}) > 1,
        probes=probes,
        unprotected=(*passed, *unprotected),
        secure=secure and (door is None or door.secure),
    )


def _labels(
    party: str, holders: set[str], losses: set[str], door: ReleaseDoor | None
) -> Literal["clear", "stay", "there"] | MemoizedRandomizedResponse:
    if losses == {party}:
        return "stay"
    if holders == losses:
        return "there"
    if door is not None and door.labels is not None:
        return door.labels
    return "clear"


def _feeds_a_part(graph: SplitGraph, column: str) -> bool:
    return any(column in part.inputs for part in graph.parts)


def _also_passed(door: ReleaseDoor) -> list[str]:
    """What left as it was and is in no claim about rows and labels."""
    return [f"predictions, to {', '.join(to)}" for to, kinds in door.unprotected.items() if "predictions" in kinds]
