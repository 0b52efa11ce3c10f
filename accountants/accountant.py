"""What every accountant has in common: events go in, bounds come out."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from accountants import arguments
from accountants.components.component import Array
from accountants.engines.supporting_lines import LEAST_DELTA, SupportingLines, gaussian_trade_off
from accountants.events import Composed, Event, Repeated
from accountants.interval import Interval
from accountants.reduction.normal_form import NormalForm, normal_form
from accountants.relation import NeighboringRelation

GREATEST_EPSILON = 1e250  # beyond it, products with orders overflow; no finite loss comes near


class Accountant(abc.ABC):
    """Events composed so far under one neighbouring relation, and bounds on what they spent together.

    Args:
        relation: the neighbouring relation of every answer.
    """

    def __init__(self, *, relation: NeighboringRelation | str = NeighboringRelation.ADD_OR_REMOVE) -> None:
        self._relation = NeighboringRelation.of(relation)
        self._runs: list[tuple[Event, int]] = []
        self._reduced: NormalForm | None = None
        self._lines: SupportingLines | None = None

    @property
    def relation(self) -> NeighboringRelation:
        """The neighbouring relation of every answer."""
        return self._relation

    @property
    def event(self) -> Composed:
        """Everything composed so far, in order, equal neighbours merged."""
        return Composed(tuple(Repeated(event, count) for event, count in self._runs))

    def compose(self, event: Event, count: int = 1) -> Self:
        """Add `count` runs of `event`; returns the accountant itself.

        Raises:
            ParameterError: not an event, or a count that is not an int >= 0.
            UnsupportedEventError: no proof for this event under this relation; nothing is added.
        """
        addition = Repeated(event, arguments.steps(count, "count"))
        self._check(normal_form(addition, self._relation))
        if self._runs and self._runs[-1][0] == addition.event:
            addition = Repeated(addition.event, self._runs.pop()[1] + addition.count)
        self._runs.append((addition.event, addition.count))
        self._reduced = self._lines = None
        return self

    def epsilon(self, delta: float) -> float:
        """The smallest epsilon that this accountant can prove at `delta`: an upper bound, in [0, inf]."""
        return self.interval(delta).upper

    def interval(self, delta: float) -> Interval:
        """Bounds on the tight epsilon at `delta`.

        Raises:
            ParameterError: delta is not in (0, 1).
        """
        delta = arguments.delta(delta)
        form = self._normal_form()
        if form.unbounded:
            return Interval(0.0, float("inf"))  # finite where sampling makes the release rarer than delta
        return self._epsilon_interval(form, delta) if form.counts else Interval(0.0, 0.0)

    def delta(self, epsilon: float) -> float:
        """The smallest delta that this accountant can prove at `epsilon`: an upper bound, in [0, 1]."""
        return self.delta_interval(epsilon).upper

    def delta_interval(self, epsilon: float) -> Interval:
        """Bounds on the tight delta at `epsilon`.

        Raises:
            ParameterError: epsilon is negative, infinite or NaN.
        """
        epsilon = min(arguments.epsilon(epsilon), GREATEST_EPSILON)
        form = self._normal_form()
        if form.unbounded:
            return Interval(0.0, 1.0)
        return self._delta_interval(form, epsilon) if form.counts else Interval(0.0, 0.0)

    def delta_curve(self, epsilons: ArrayLike) -> Array:
        """Upper bounds on delta at each epsilon, same shape.

        Args:
            epsilons: any shape, each >= 0 and finite.

        Raises:
            ParameterError: an epsilon that is negative, infinite or NaN.
        """
        wanted = arguments.reals("epsilons", epsilons, remedy="Give budgets such as [0.5, 1, 2].")
        bounds = [arguments.epsilon(epsilon) for epsilon in wanted.ravel()]
        return np.array(self._delta_bounds(bounds)).reshape(wanted.shape)

    def _delta_bounds(self, epsilons: Sequence[float]) -> list[float]:
        """Upper bounds on delta at checked epsilons."""
        return [self.delta_interval(epsilon).upper for epsilon in epsilons]

    def trade_off(self, alpha: ArrayLike) -> Array:
        """Lower bound on the type II error of any test between neighbours whose type I error is alpha.

        Within about 1e-3 of the best curve that `delta_curve` proves, and exact for un-sampled Gaussians; true positive
        rates below 1e-10 are bounded by about that. The curve is kept until something is composed.

        Args:
            alpha: type I errors in [0, 1], any shape.

        Returns:
            beta, same shape, in [0, 1 - alpha].

        Raises:
            ParameterError: an alpha outside [0, 1].
        """
        remedy = "Give false positive rates such as [0.01, 0.1]."
        false_positive = arguments.probabilities("alpha", alpha, remedy=remedy)
        form = self._normal_form()
        if form.unbounded:
            return np.zeros(false_positive.shape)
        if form.gaussian_mu is not None:
            return gaussian_trade_off(form.gaussian_mu, false_positive)
        if self._lines is None:
            self._lines = SupportingLines.touching(self.delta_curve, self.interval(LEAST_DELTA).upper)
        return self._lines.beta(false_positive)

    def _normal_form(self) -> NormalForm:
        if self._reduced is None:
            self._reduced = normal_form(self.event, self._relation)
        return self._reduced

    def _check(self, form: NormalForm) -> None:  # noqa: B027 most accountants take every form
        """Raise UnsupportedEventError if this accountant cannot bound `form`."""

    @abc.abstractmethod
    def _epsilon_interval(self, form: NormalForm, delta: float) -> Interval:
        """Bounds on epsilon for a form that is bounded and not empty."""

    @abc.abstractmethod
    def _delta_interval(self, form: NormalForm, epsilon: float) -> Interval:
        """Bounds on delta for a form that is bounded and not empty."""
