"""What every accountant of the facade has: a history of steps, and a bound on what they spent."""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from copy import deepcopy
from typing import Any, Protocol

from accountants import Composed, Event, Gaussian, PoissonSampled
from dpdl.errors import ParameterError

__all__ = ["History", "IAccountant", "NoisyOptimizer", "event_of", "recorded"]

History = list[tuple[float, float, int]]


class NoisyOptimizer(Protocol):
    """What an accountant asks of an optimizer."""

    noise_multiplier: float

    @property
    def accumulated_iterations(self) -> int:
        """Batches that the coming release is made of."""


class IAccountant(abc.ABC):
    """Keeps the history of a run as (noise multiplier, sample rate, steps); subclasses bound its epsilon.

    Guarantee:
        An upper bound, but for `GaussianAccountant`, which estimates.
    """

    @abc.abstractmethod
    def __init__(self) -> None:
        self.history: History = []

    @abc.abstractmethod
    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Record one release.

        Args:
            noise_multiplier: its noise's standard deviation over the sum's sensitivity.
            sample_rate: the probability with which each example was in it; 1 if that was not random.
        """

    @abc.abstractmethod
    def get_epsilon(self, delta: float, **kwargs: Any) -> float:
        """An upper bound on the epsilon of the history at `delta`, 0.0 if it is empty."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Entries of the history."""

    @classmethod
    @abc.abstractmethod
    def mechanism(cls) -> str:
        """The name that `create_accountant` knows."""

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[NoisyOptimizer], None]:
        """A function for `DPOptimizer.attach_step_hook` that records each step.

        Args:
            sample_rate: of one batch; a release of several batches counts as one of all of them.
        """

        def hook_fn(optim: NoisyOptimizer) -> None:
            rate = min(1.0, sample_rate * optim.accumulated_iterations)
            self.step(noise_multiplier=optim.noise_multiplier, sample_rate=rate)

        return hook_fn

    def state_dict(self, destination: MutableMapping[str, Any] | None = None) -> MutableMapping[str, Any]:
        """The history and the mechanism's name, put into `destination` if there is one."""
        state: MutableMapping[str, Any] = OrderedDict() if destination is None else destination
        state["history"] = deepcopy(self.history)
        state["mechanism"] = self.mechanism()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history by one that `state_dict` wrote.

        Raises:
            ParameterError: it is empty, incomplete, of another mechanism, or not a history.
        """
        missing = [key for key in ("history", "mechanism") if key not in (state_dict or {})]
        if missing:
            raise ParameterError(f"The accountant's state has no {missing}. Load what state_dict() returned.")
        if state_dict["mechanism"] != self.mechanism():
            raise ParameterError(
                f"The state of a {state_dict['mechanism']!r} accountant cannot be loaded into a {self.mechanism()!r} "
                f"one. Make the engine with PrivacyEngine(accountant={state_dict['mechanism']!r})."
            )
        history = [(sigma, rate, steps) for sigma, rate, steps in state_dict["history"]]
        event_of(history)  # refuses what is not a history
        self.history = history


def event_of(history: History) -> Event:
    """The composition of what a history holds.

    Raises:
        ParameterError: a number is out of its range.
    """
    return Composed(tuple(_one(sigma, rate) * steps for sigma, rate, steps in history))


def _one(sigma: float, rate: float) -> Event:
    return Gaussian(float(sigma)) if rate == 1 else PoissonSampled(float(rate), Gaussian(float(sigma)))


def recorded(history: History, *, noise_multiplier: float, sample_rate: float) -> History:
    """The history with one more release; equal neighbours are counted together.

    Raises:
        ParameterError: a number is out of its range.
    """
    event_of([(noise_multiplier, sample_rate, 1)])
    if history and history[-1][:2] == (noise_multiplier, sample_rate):
        return [*history[:-1], (noise_multiplier, sample_rate, history[-1][2] + 1)]
    return [*history, (noise_multiplier, sample_rate, 1)]
