"""One mechanism as accountants see it: two laws to tell apart in each direction, and the moments of their loss.

    LossPair    (P, Q) with privacy loss log dP/dQ, as masses between levels of the loss
    Component   a mechanism under one neighbouring relation: its dominating pair in each direction, the moments of
                its loss, and the pair (if any is known) that some neighbours really attain

"remove" means that P is the law with the protected unit and Q the law without, "add" the reverse. A mechanism that
treats neighbours alike (replacement) gives both directions the same pair.
"""

from __future__ import annotations

import abc
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Direction = Literal["remove", "add"]
DIRECTIONS: tuple[Direction, Direction] = ("remove", "add")
Array = NDArray[np.float64]
LEAST_MASS = 1e-290  # below this a mass has lost digits


class LossPair(abc.ABC):
    """Two laws, seen through the privacy loss of an outcome."""

    @property
    @abc.abstractmethod
    def support(self) -> tuple[float, float]:
        """Least and greatest finite loss, or infinities where the losses are not bounded."""

    @property
    def has_atoms(self) -> bool:
        """Whether P and Q have point masses at both ends of the support."""
        return False

    @property
    def infinite(self) -> float:
        """P-mass at infinite loss, or less."""
        return 0.0

    @abc.abstractmethod
    def tails(self, mass: float) -> tuple[float, float]:
        """(low, high) such that P puts at most about `mass` below low and above high; high is not infinite."""

    @abc.abstractmethod
    def cells(self, levels: Array) -> tuple[Array, Array]:
        """Masses of P and Q between consecutive loss levels.

        Args:
            levels: increasing losses, shape [B + 1]; the ends may be infinite.

        Returns:
            (P, Q), shape [B] each. An atom at a level belongs to either cell that it touches, but those at the ends
            of the support belong to the cells that touch them from inside. P's mass at infinite loss is in the last
            cell if its upper level is infinite.
        """

    def log_tail(self, loss: float) -> tuple[float, float, float]:
        """(log P, lower and upper bound on log Q) of the mass above a loss, -inf for none."""
        p, q = (float(mass[0]) for mass in self.cells(np.array([loss, np.inf])))
        log_p = math.log(p) if p > 0 else -math.inf
        if q < LEAST_MASS:
            return log_p, -math.inf, math.log(LEAST_MASS)
        return log_p, math.log(q), math.log(q)


class Component(abc.ABC):
    """A mechanism under a neighbouring relation; subclasses are frozen dataclasses, equal when interchangeable."""

    @abc.abstractmethod
    def pair(self, direction: Direction) -> LossPair | None:
        """A pair that dominates every pair of neighbours in this direction; None if only moments are known."""

    def witness(self, direction: Direction) -> LossPair | None:
        """A pair that some neighbours attain, whatever ran before: lower bounds rest on it; None if none is known."""
        return self.pair(direction)

    @abc.abstractmethod
    def log_moments(self, direction: Direction, t: Array) -> Array:
        """log E_P exp(t * privacy loss), from above.

        Args:
            direction: which pair.
            t: moments, shape [M], > 0; the Renyi order is 1 + t, the divergence the result over t.

        Returns:
            Upper bounds, shape [M], >= 0; inf where none is known.
        """
