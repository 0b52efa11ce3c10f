"""What a party sees of a probe: whether rows meet behind its cuts, and whether anything was to be seen at all.

Made-up rows go through the network twice, one of them changed. What comes from other parties for all other rows must
stay. That shows something only where something comes: a gradient of zero stays zero, and NaN is unlike every number,
whatever rows do to each other. So each cut has to show a gradient, of rows that did change, before a probe counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.errors import ExampleMixingError, ModelError, StepError
from dpdl.per_sample.self_check import tolerance_of
from dpdl.split.agreed_terms import refuse_other_rows
from dpdl.split.graph import SplitGraph
from dpdl.split.walk import Walk

__all__ = ["ATTEMPTS", "Seen", "compared_probe", "cuts_to_show", "refuse_no_evidence", "refuse_rows_that_meet"]

ATTEMPTS = 4  # pairs of made-up batches, each of other rows, before there is nothing to be seen


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One probe, as one party sees it.

    Attributes:
        sent: part to the rows of its output that this party gave away.
        returned: part to the gradients of those rows.
        given: part of another party to the rows of its output.
    """

    sent: Mapping[str, Tensor]
    returned: Mapping[str, Tensor]
    given: Mapping[str, Tensor]

    @classmethod
    def of(cls, walk: Walk) -> Seen:
        """Of a walk that is finished here."""
        party, graph, outputs = walk.party.name, walk.party.graph, walk.flow.outputs
        of_whom = {part.name: part.party for part in graph.parts}  # labels that arrived are nobody's
        return cls(
            sent={name: rows for name, rows in outputs.items() if of_whom.get(name) == party},
            returned=walk.flow.received,
            given={name: rows for name, rows in outputs.items() if of_whom.get(name, party) != party},
        )


def cuts_to_show(graph: SplitGraph, party: str) -> frozenset[str]:
    """The parts of a party whose rows others send gradients of: a probe has to show that rows are apart there."""
    return frozenset(cut.name for cut in graph.cuts if cut.sender == party and cut.returns)


def compared_probe(walk: Walk, before: Seen | None) -> tuple[Seen, frozenset[str]]:
    """A finished probe beside the one before it.

    Returns:
        What the next one is to be compared with, and the parts of which this pair has shown that rows stay apart.

    Raises:
        ExampleMixingError: rows meet behind a cut.
        ManifestError: rows are not shaped as a manifest says that was signed.
    """
    if (terms := walk.party.terms.get(walk.client.name)) is not None:
        refuse_other_rows(terms, walk.party.name, {**walk.flow.columns, **walk.flow.outputs})
    if walk.exchanged < 0:
        return Seen.of(walk), frozenset()
    if before is None:
        raise StepError("A probe with an exchanged row came before the one without. Begin with a hello.")
    return before, refuse_rows_that_meet(walk.party.name, before, Seen.of(walk), exchanged=walk.exchanged)


def refuse_rows_that_meet(party: str, before: Seen, after: Seen, *, exchanged: int) -> frozenset[str]:
    """Raise if anything that came for other rows than the exchanged one is not what it was.

    Args:
        party: who looks.
        before, after: two probes.
        exchanged: the row whose data differed.

    Returns:
        The parts whose rows were seen to stay apart: the exchanged row did change, and others had a gradient, finite
        and not zero.

    Raises:
        ExampleMixingError: rows meet somewhere behind the cut.
    """
    shown = set()
    for what, first, second in (
        ("gradients", before.returned, after.returned),
        ("activations", before.given, after.given),
    ):
        for name, rows in first.items():
            kept = torch.ones(len(rows), dtype=torch.bool)
            kept[exchanged] = False
            there = second.get(name)
            if there is None or there.shape != rows.shape:
                raise ExampleMixingError(f"'{party}' got other {what} of part '{name}' in a probe than in the last.")
            a, b = rows[kept].double(), there[kept].double()
            if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
                continue
            if float((a - b).norm()) > tolerance_of(rows.dtype) * float(a.norm() + b.norm()):
                raise ExampleMixingError(
                    f"'{party}' changed one made-up row, and the {what} of part '{name}' for other rows changed: "
                    "behind the cut rows meet (batch normalisation, attention over the batch, a contrastive or "
                    "normalised loss), or something there keeps state. One record would then move all rows' gradients, "
                    "and no clipping bounds that. No private row was sent. Use GroupNorm, and a loss that is a sum "
                    "over rows."
                )
            changed = what == "activations" or _differ(before.sent[name][exchanged], after.sent[name][exchanged])
            if changed and bool(a.any()):
                shown.add(name)
    return frozenset(shown)


def refuse_no_evidence(party: str, seen: Seen, missing: frozenset[str]) -> None:
    """Raise for the parts of which no probe has shown anything, with what came instead.

    Raises:
        ModelError: always, if there are any.
    """
    if not missing:
        return
    why = "; ".join(f"'{name}': {_nothing(seen, name)}" for name in sorted(missing))
    raise ModelError(
        f"{ATTEMPTS} probes have not shown '{party}' whether rows stay apart behind its cuts ({why}). What is zero or "
        "not finite stays so whatever rows do to each other, and no private row is sent on that. A head whose weights "
        "start at zero sends nothing back: start it from small random ones. A network that cannot compute normal "
        "random rows wants its inputs transformed in the data instead."
    )


def _nothing(seen: Seen, name: str) -> str:
    gradients = seen.returned.get(name)
    if gradients is None:
        return "no gradient came"
    if not bool(torch.isfinite(gradients).all()):
        return "gradients are not finite"
    return "the part's output is the same for all rows" if bool(gradients.any()) else "all gradients are zero"


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a != b).any())
