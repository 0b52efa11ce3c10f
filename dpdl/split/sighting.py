"""What one adversary gets to see of one unit, and what protects it; claims are what these add up to.

    Sighting(by="server", unit="record", what="noised activations", event=account.event, because="...")

Neither more nor less than the report says: a sighting without an event is one that nothing protects, and whoever has
one of them has no bound on that unit, whatever protects the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from accountants import Composed, Event, NeighboringRelation, PRVAccountant
from dpdl.claims import Claim
from dpdl.errors import ParameterError

__all__ = ["Sighting", "claim_of"]

REPLACE_ONE = NeighboringRelation.REPLACE_ONE


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """Something that an adversary sees.

    Attributes:
        by: the adversary.
        unit: of what it tells something: "record", "features", "label".
        what: what is seen, in words; of something unprotected, as the report is to say it.
        event: all releases of it together; None if nothing protects it. `Composed(())` tells nothing of the unit.
        relation: under which the event is accounted.
        assumes: what must hold for that.
    """

    by: str
    unit: str
    what: str
    event: Event | None
    relation: NeighboringRelation = REPLACE_ONE
    assumes: tuple[str, ...] = ()


def claim_of(sightings: Sequence[Sighting], *, delta: float) -> Claim:
    """What one adversary can learn of one unit from all of these together.

    Args:
        sightings: at least one, all by the same adversary, of the same unit.
        delta: of the claim.

    Raises:
        ParameterError: they are of several adversaries or units, or protected ones of several relations, whose figures
            cannot be added up.
    """
    if len({(seen.by, seen.unit) for seen in sightings}) != 1:
        raise ParameterError("A claim is against one adversary and about one unit; these sightings are of several.")
    by, unit = sightings[0].by, sightings[0].unit
    naked = [seen.what for seen in sightings if seen.event is None]
    if naked:
        return Claim(against=by, unit=unit, because="; ".join(dict.fromkeys(naked)))
    relations = {seen.relation for seen in sightings if seen.event != Composed(())}
    if len(relations) > 1:
        names = ", ".join(sorted(relation.value for relation in relations))
        raise ParameterError(
            f"What {by} sees of one {unit} is accounted under {names}: the figures cannot be added up. Account for all "
            "of it under one relation."
        )
    relation = relations.pop() if relations else REPLACE_ONE
    events = tuple(seen.event for seen in sightings if seen.event is not None)
    epsilon = PRVAccountant(relation=relation).compose(Composed(events)).epsilon(delta)
    what = "; ".join(dict.fromkeys(seen.what for seen in sightings))
    return Claim(
        against=by,
        unit=unit,
        because=f"{what}; with no noise in it" if math.isinf(epsilon) else what,
        epsilon=epsilon,
        delta=delta,
        relation=relation.phrase.replace("example", unit if unit == "record" else f"record's {unit}"),
        assumes=tuple(dict.fromkeys(word for seen in sightings for word in seen.assumes)),
    )
