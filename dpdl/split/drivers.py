"""Who begins the steps, if nobody says: the owner of the data; of several, who computes the first loss."""

from __future__ import annotations

from dpdl.split.graph import SplitGraph

__all__ = ["default_driver"]


def default_driver(graph: SplitGraph) -> str:
    """The only party whose columns feed parts, or else the first head's."""
    fed = {graph.columns[name] for part in graph.parts for name in part.inputs if name in graph.columns}
    return next(iter(fed)) if len(fed) == 1 else graph.heads[0].party
