"""Whether a manifest says what this party's own run does: what was signed is held against what will be done.

Parties that have signed the same text agree on words. Each compares them with its own graph, plan, clip and door
before anybody is greeted, and with the shapes of rows when made-up ones have gone through. A party can check its own
deeds alone; that others keep to theirs stays an assumption of every claim.

Not compared, since no party knows it from its run: what the topology is called, how clients pass on weights, and the
deltas of reports.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dpdl.errors import ManifestError
from dpdl.split.client_run import Client
from dpdl.split.door import ReleaseDoor
from dpdl.split.graph import SplitGraph
from dpdl.split.manifest import Manifest, differences
from dpdl.split.manifest_of_run import manifest_of
from dpdl.split.party import Party

__all__ = ["hold_to", "refuse_another_run", "refuse_other_rows"]


def hold_to(party: Party, client: Client, terms: Manifest) -> None:
    """Compare what a party has signed with its run, and remember it for when shapes of rows are known.

    Raises:
        ManifestError: as `refuse_another_run`.
    """
    refuse_another_run(terms, party, client)
    party.terms[client.name] = terms


def refuse_another_run(terms: Manifest, party: Party, client: Client) -> None:
    """Raise unless the manifest says what this party's run with a client does.

    Args:
        terms: what the party has signed.
        party: with its graph and door.
        client: with its plan and clip.

    Raises:
        ManifestError: another noise, clip, rate, number of steps, graph or release; every difference is named.
    """
    graph = party.graph
    door = party.kit.outlet if isinstance(party.kit.outlet, ReleaseDoor) else None
    shapes = {cut.name: (cut.shape, _dtype(cut.name, cut.dtype)) for cut in terms.cuts}
    rows = {
        cut.name: torch.empty((0, *shape), dtype=dtype, device="meta")
        for cut in graph.cuts
        for shape, dtype in [shapes.get(cut.name, ((), torch.float32))]
    }
    mine = manifest_of(
        graph,
        client.plan,
        topology=terms.topology,
        rows=rows,
        deltas=terms.deltas,
        clip=client.clip,
        door=door,
        weight_sync=terms.weight_sync,
    )
    for name, releasing in _releasing(graph).items():
        if getattr(mine, name) is None and releasing and party.name not in releasing:
            mine = replace(mine, **{name: getattr(terms, name)})  # another party's to do, and to check
    if differing := differences(mine, terms, "in the run", "in the manifest"):
        raise ManifestError(
            f"The manifest of '{party.name}' does not say what its run with client '{client.name}' does. "
            f"{'; '.join(differing)}. Nothing was sent; make the manifest from the run (manifest_of)."
        )


def refuse_other_rows(terms: Manifest, party: str, rows: Mapping[str, Tensor]) -> None:
    """Raise unless rows that crossed this party's cuts are shaped as the manifest says.

    Raises:
        ManifestError: they are not.
    """
    for cut in terms.cuts:
        if party in (cut.sender, cut.receiver) and cut.name in rows:
            shape, dtype = tuple(rows[cut.name].shape[1:]), str(rows[cut.name].dtype).removeprefix("torch.")
            if (shape, dtype) != (cut.shape, cut.dtype):
                raise ManifestError(
                    f"Rows of '{cut.name}' at '{party}' are of shape {shape} and {dtype}, and the manifest says "
                    f"{cut.shape} and {cut.dtype}. No private row was sent; make the manifest from the run "
                    "(manifest_of)."
                )


def _releasing(graph: SplitGraph) -> dict[str, Collection[str]]:
    """For each kind of release in a manifest, the parties that have to make it if it is there."""
    activations = [cut for cut in graph.cuts if cut.kind == "activations"]
    fed = {graph.columns[name] for part in graph.parts for name in part.inputs if name in graph.columns}
    judges = {head.party for head in graph.heads if graph.columns[head.labels] == head.party}
    return {
        "cut_release": fed & {cut.sender for cut in activations},
        "labels": {cut.sender for cut in graph.cuts if cut.kind == "labels"},
        "gradient_release": judges & {cut.receiver for cut in activations if cut.returns},
    }


def _dtype(cut: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ManifestError(f"dtype of the cut '{cut}' in the manifest must be one of torch's, got {name!r}.")
    return dtype
