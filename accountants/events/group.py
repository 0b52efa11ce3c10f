"""Neighbours that differ in several units at once."""

from __future__ import annotations

import dataclasses

from accountants import arguments
from accountants.events.event import Event, require_event


@dataclasses.dataclass(frozen=True)
class Group(Event, kind="group"):
    """The same mechanism as `event`, seen by neighbours that differ in up to `size` units.

    For a family whose members are protected together, or for users: if each user holds at most `size` examples,
    example-level training accounted as Group(event, size) protects users. (Sampling whole users and clipping each
    user's sum is another mechanism: there the user is the unit and no group is needed.)

    Additive noise around 0, A(m) around m, with Poisson rate q: adding, removing or zeroing k units is dominated by
    (sum_j Binomial(j; k, q) A(j), A(0)), replacing them by that sum against its mirror image. Un-sampled, shuffled or
    allocated: shift k (2k for replacing). Fixed-size and truncated batches are refused.

    Args:
        event: what ran.
        size: k >= 1; a group of groups multiplies.
    """

    event: Event
    size: int

    def __post_init__(self) -> None:
        require_event("Group", self.event)
        size = arguments.positive_whole("size", self.size, remedy="Give the most units that one neighbour differs in.")
        inner = self.event
        if isinstance(inner, Group):
            remedy = "Check the sizes of the groups of groups."
            size, inner = arguments.positive_whole("size", size * inner.size, remedy=remedy), inner.event
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "event", inner)
