"""Which two data sets count as neighbours: the half of a privacy claim that epsilon does not show."""

from __future__ import annotations

import enum

from accountants.errors import ParameterError


class NeighboringRelation(enum.Enum):
    """What an attacker may not tell apart; the unit is one example (or user, or client: the sampled thing).

    A noise multiplier is always noise std / clip norm, whatever the relation. Replacing moves the clipped
    sum by up to two clip norms, so the accountant, not the caller, applies the factor of two.

    Example:
        >>> NeighboringRelation("add_or_remove").phrase
        'adding or removing one example'
    """

    ADD_OR_REMOVE = "add_or_remove"
    REPLACE_ONE = "replace_one"
    ZERO_OUT = "zero_out"

    @property
    def phrase(self) -> str:
        """The relation as reports say it."""
        return _PHRASES[self]

    @classmethod
    def of(cls, value: NeighboringRelation | str) -> NeighboringRelation:
        """The relation that `value` names.

        Raises:
            ParameterError: no such relation.
        """
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(repr(member.value) for member in cls)
            raise ParameterError(f"relation must be one of {names}; got {value!r}.") from None


_PHRASES = {
    NeighboringRelation.ADD_OR_REMOVE: "adding or removing one example",
    NeighboringRelation.REPLACE_ONE: "replacing one example",
    NeighboringRelation.ZERO_OUT: "zeroing out one example",
}
