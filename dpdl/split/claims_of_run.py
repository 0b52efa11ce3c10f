"""What a party may claim of a run about its own records: the facts that it knows, for `dpdl.split.report`.

Where its rows go to one other party, that is the report of that module. Where several parties get them, or it has
the labels of some heads and not of others, each party is listed with what it sees, and nothing is promised against it.
"""

from __future__ import annotations

import math
from typing import Literal

from accountants import Composed, NeighboringRelation
from dpdl.claims import AdversaryReport, Claim
from dpdl.split.client_run import Client
from dpdl.split.clip import JointClip
from dpdl.split.door import ReleaseDoor
from dpdl.split.labels import MemoizedRandomizedResponse
from dpdl.split.part_training import PartTraining
from dpdl.split.party import Party
from dpdl.split.report import SEED_GIVEN, SEED_UNKNOWN, GradientsReturned, RowsSent, SplitFacts, split_report

__all__ = ["part_training", "report_of_run"]

CONSUMERS = "model consumers"


def part_training(party: Party, client: Client, *, of: str | None = None) -> PartTraining:
    """How a party's parts change under a plan, for its door and for claims about rows that they have computed.

    Args:
        party: whose graph.
        client: under whose plan and clip.
        of: which party's parts; by default its own.
    """
    own = [part.name for part in party.graph.trained if part.party == (of or party.name)]
    if not own:
        return PartTraining.frozen()
    clip, plan = client.clip, client.plan
    if plan.noise_multiplier == 0:
        return PartTraining.unprotected()
    norm = plan.max_grad_norm if isinstance(clip, JointClip) else math.sqrt(sum(clip.of(name) ** 2 for name in own))
    return PartTraining.private(noise_multiplier=plan.noise_multiplier * plan.max_grad_norm / norm)


def report_of_run(
    party: Party, client: Client, *, delta: float, probes: int = 0, weights_relayed: bool = False
) -> AdversaryReport:
    """The claims about a party's own records.

    Args:
        party: whose.
        client: in whose run.
        delta: of each claim.
        probes: how many were answered well.
        weights_relayed: whether other clients get this client's weights during the run.
    """
    receivers = {cut.receiver for cut in party.graph.cuts if cut.sender == party.name}
    picked_unseen = party.name != party.driver and party.columns is None
    if len(receivers) != 1 or picked_unseen or _some_labels(party):
        return _listed(party, client, delta=delta)
    (receiver,) = receivers
    door = party.kit.outlet if isinstance(party.kit.outlet, ReleaseDoor) else None
    training = part_training(party, client) if door is None else door.training
    labels = _labels(party, door)
    returns = any(cut.returns for cut in party.graph.cuts if cut.sender == party.name)
    behind = part_training(party, client, of=receiver)
    facts = SplitFacts(
        rows=RowsSent(
            spent=Composed(()) if door is None else door.event(receiver),
            training=training,
            release=None if door is None else door.activations,
            gradients=None if door is None or labels != "stay" else door.gradients,
        ),
        labels=labels,
        dp_sgd=client.spent if client.plan.noise_multiplier else None,
        relation=NeighboringRelation(client.plan.relation),
        clip="joint" if isinstance(client.clip, JointClip) else "part",
        returned=GradientsReturned(training=behind) if labels == "there" and returns else None,
        weights_relayed=weights_relayed,
        vertical=len({owner for column, owner in party.graph.columns.items() if _feeds(party, column)}) > 1,
        probes=probes,
        unprotected=(*_also_left(door), *_taken_over(party), *_seeded(client)),
        secure=client.run.secure and (door is None or door.secure),
    )
    return split_report(facts, delta=delta, title=f"Split run of '{party.name}' with '{receiver}'")


def _some_labels(party: Party) -> bool:
    """Whether it has the labels, or the loss, of some heads and not of all: no one line says what that tells."""
    owned = {party.graph.columns[head.labels] == party.name for head in party.graph.heads}
    judged = {head.party == party.name for head in party.graph.heads}
    return len(owned) > 1 or len(judged) > 1


def _labels(party: Party, door: ReleaseDoor | None) -> Literal["clear", "stay", "there"] | MemoizedRandomizedResponse:
    if any(party.graph.columns[head.labels] != party.name for head in party.graph.heads):
        return "there"
    if all(head.party == party.name for head in party.graph.heads):
        return "stay"
    return "clear" if door is None or door.labels is None else door.labels


def _feeds(party: Party, column: str) -> bool:
    return any(column in part.inputs for part in party.graph.parts)


def _listed(party: Party, client: Client, *, delta: float) -> AdversaryReport:
    """Of a run with several receivers: what each sees, and a bound for who gets the trained network alone."""
    plan, graph = client.plan, party.graph
    others = [name for name in graph.parties if name != party.name]
    joint = isinstance(client.clip, JointClip)
    trains = [name for name in others if any(part.party == name for part in graph.trained)]
    consumers = Claim(
        against=CONSUMERS,
        unit="record",
        because=f"DP-SGD on all parts, {client.run.steps_taken} steps, noise multiplier {plan.noise_multiplier:g}",
        epsilon=client.epsilon(delta) if plan.noise_multiplier else None,
        delta=delta,
        relation=client.run.ledger.relation.phrase,
        assumes=(
            *(f"'{name}' clips, adds its noise, and keeps rows apart" for name in trains),
            "no party gives away what it has seen of single records",
            *_sampled_by_another(party, client),
            *(() if client.run.secure else (SEED_UNKNOWN,)),
        ),
    )
    return AdversaryReport(
        title=f"Split run of '{party.name}' with {', '.join(others)}",
        adversaries=(CONSUMERS, *others),
        claims=(
            consumers,
            *(Claim(against=name, unit="record", because=_seen(party, name, joint=joint)) for name in others),
        ),
        not_covered=(
            "how many rows are sent, and when",
            "which records take part",
            "sizes of messages",
            *_also_left(party.kit.outlet if isinstance(party.kit.outlet, ReleaseDoor) else None),
            *_taken_over(party),
        ),
        notes=() if client.run.secure else (SEED_GIVEN,),
    )


def _sampled_by_another(party: Party, client: Client) -> tuple[str, ...]:
    """A party without records has only the driver's word for how they are drawn."""
    if party.name == party.driver or party.columns is not None:
        return ()
    return (f"'{party.driver}' draws each batch by Poisson sampling of rate {client.plan.sample_rate:g}, unseen",)


def _taken_over(party: Party) -> tuple[str, ...]:
    if not party.took_weights:
        return ()
    return ("weights that were loaded, if they know of these records what the ledger does not",)


def _seeded(client: Client) -> tuple[str, ...]:
    return () if client.run.secure else ("noise, for whoever knows the insecure seed",)


def _also_left(door: ReleaseDoor | None) -> tuple[str, ...]:
    """What left through the door as it was."""
    if door is None:
        return ()
    return tuple(f"{', '.join(sorted(kinds))}, to {', '.join(to)}" for to, kinds in sorted(door.unprotected.items()))


def _seen(party: Party, other: str, *, joint: bool) -> str:
    """What another party gets; of the gradients, those that this one sends, which tell of its records and labels."""
    cuts = party.graph.cuts
    names = [f"{cut.kind} '{cut.name}'" for cut in cuts if cut.receiver == other]
    names += [
        f"gradients of '{cut.name}'"
        for cut in cuts
        if cut.returns and (cut.sender, cut.receiver) == (other, party.name)
    ]
    what = f"it receives {', '.join(names) or 'gradients'}; no claim is worked out {_why_listed(party)}"
    return f"{what}; norms of single rows' gradients are exchanged" if joint else what


def _why_listed(party: Party) -> str:
    if _some_labels(party):
        return "where labels of one record are in several hands"
    return "where several parties get rows"
