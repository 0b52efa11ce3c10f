"""Where the weights of a model are: a copy on every rank, or, if it is sharded, a slice of each parameter.

The private step needs whole weights, and leads to one noisy sum. Who holds what before and after that is a placement's
matter; the step itself is the same. `Copies` is here, `dpdl.sharding` has the other one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from dpdl.ranks import Ranks
from dpdl.types import ClippedSum, NoisyGradient

__all__ = ["Copies", "Placement"]


class Placement(ABC):
    """Who holds which part of a model's parameters and of what is computed for them.

    The module's own parameters are what the optimizer steps on. A state is one that `state_dict` has returned, or is
    for `load_state_dict`; in a file it is whole.

    Args:
        ranks: the processes that train together.
    """

    takes_loss_scales: bool  # whether a gradient can be left on a parameter for a gradient scaler to find

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    @abstractmethod
    def settle(self) -> None:
        """Let the module hold the parameters that the optimizer has, if others took their place."""

    @abstractmethod
    def begin_batch(self) -> None:
        """The loader is about to hand out a part of a batch."""

    @abstractmethod
    def whole(self) -> Any:
        """A context in which the module is an ordinary one, with whole parameters, for the open batch.

        Raises:
            StepError: weights have changed since the batch was handed out.
        """

    @abstractmethod
    def evaluating(self) -> Any:
        """A context in which the module is an ordinary one, with whole parameters, as of now."""

    @abstractmethod
    def whole_of(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters that stand for these inside of `whole`."""

    @abstractmethod
    def refuse_loss_scale(self, *, given: bool) -> None:
        """Raise StepError if a gradient scaler was at work and cannot be followed."""

    @abstractmethod
    def part_here(self, tensor: Tensor) -> Tensor:
        """What this rank has of a gradient."""

    @abstractmethod
    def total(self, mine: ClippedSum) -> ClippedSum:
        """The sum over ranks; its tensors are whole on rank 0 only. See `Ranks.total`."""

    @abstractmethod
    def from_first(self, noisy: NoisyGradient) -> NoisyGradient:
        """What rank 0 has released, placed as the parameters are. See `Ranks.from_first`."""

    @abstractmethod
    def end_step(self) -> None:
        """The optimizer has stepped."""

    @abstractmethod
    def full_weights(self, state: Any) -> Any:
        """A module's state, whole."""

    @abstractmethod
    def own_weights(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A module's state as the module takes it here."""

    @abstractmethod
    def full_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's state, whole."""

    @abstractmethod
    def own_state(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's state as the optimizer takes it here."""


@final
class Copies(Placement):
    """Every rank has the whole model."""

    takes_loss_scales = True

    def settle(self) -> None:
        """Nothing else is ever in their place."""

    def begin_batch(self) -> None:
        """The weights are here."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """As it is."""
        yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """As it is."""
        yield

    def whole_of(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Themselves."""
        return parameters

    def refuse_loss_scale(self, *, given: bool) -> None:
        """It can be followed."""

    def part_here(self, tensor: Tensor) -> Tensor:
        """All of it."""
        return tensor

    def total(self, mine: ClippedSum) -> ClippedSum:
        """See `Ranks.total`."""
        return self._ranks.total(mine)

    def from_first(self, noisy: NoisyGradient) -> NoisyGradient:
        """See `Ranks.from_first`."""
        return self._ranks.from_first(noisy)

    def end_step(self) -> None:
        """The weights stay."""

    def full_weights(self, state: Any) -> Any:
        """As it is."""
        return state

    def own_weights(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """As it is."""
        return state

    def full_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As it is."""
        return optimizer.state_dict()

    def own_state(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As it is."""
        return state
