"""Whether the parts that rows leave through are what a door was told: compared with the run's own graph, clip and plan.

A door cannot see what computes its rows. So a party binds it to each run: what the run does is worked out from the
graph, and parts that do not train are watched, since "frozen" is a promise about weights and not about optimizers.

Public: the graph, the clip, the plan. Private: nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from dpdl.errors import ModelError
from dpdl.split.graph import SplitGraph
from dpdl.split.row_cache import encoder_digest

__all__ = ["FrozenPart", "parts_before"]


def parts_before(graph: SplitGraph, party: str) -> Collection[str]:
    """The parts between the records and the activations that a party sends, less those of who receives them.

    What a receiver computes itself is made from what it was sent.
    """
    cuts = [cut for cut in graph.cuts if cut.sender == party and cut.kind == "activations"]
    receivers = {cut.receiver for cut in cuts}
    names = {part.name for part in graph.parts}
    found: set[str] = set()
    left = [cut.name for cut in cuts]
    while left:
        name = left.pop()
        if name in names and name not in found:
            found.add(name)
            left.extend(graph.part(name).inputs)
    return [name for name in found if graph.part(name).party not in receivers]


class FrozenPart:
    """A part that does not train, as it was when its first row left.

    Args:
        name: the part's.
        module: its weights and buffers are what must stay.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self._name = name
        self._module = module
        self._digest: str | None = None
        self._stamp: list[tuple[int, int, int]] = []

    def refuse_change(self, *, thorough: bool = False) -> None:
        """Raise if a weight or a buffer is another one than when rows first left.

        Args:
            thorough: compare every number; otherwise only if a tensor was written to or replaced, as torch counts it.

        Raises:
            ModelError: it is.
        """
        stamp = [(id(t), t.data_ptr(), t._version) for t in self._module.state_dict(keep_vars=True).values() if _is(t)]
        if self._digest is not None and stamp == self._stamp and not thorough:
            return
        digest = encoder_digest(self._module)
        if self._digest not in (None, digest):
            raise ModelError(
                f"Part '{self._name}' does not train in this run, and its weights or buffers have changed since its "
                "first rows left: something else trains it, or a layer keeps statistics. What later rows tell of "
                "earlier ones is not accounted for. Make the graph with trains=True, or leave the part alone."
            )
        self._digest, self._stamp = digest, stamp

    def refuse_claim(self) -> None:
        """As `refuse_change`, of every number, once rows have left."""
        if self._digest is not None:
            self.refuse_change(thorough=True)


def _is(value: object) -> bool:
    return isinstance(value, Tensor)
