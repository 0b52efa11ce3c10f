"""What the server does with a round's mean update: FedAvg, and the adaptive rules of Reddi et al.

    optimizer = FedAdam(learning_rate=0.1)
    state = optimizer.step(state, mean_update)

They see the mean update alone, which has its noise by then: post-processing, at no cost in privacy, whatever the rule.
With Delta the mean update, eta the learning rate:

    FedAvg      x += eta Delta                                                                       [1]
    FedAvgM     v = beta v + Delta,                    x += eta v                                    [2]
    FedAdagrad  v = v + Delta^2                        }
    FedYogi     v = v - (1 - b2) Delta^2 sign(v - Delta^2)  } m = b1 m + (1 - b1) Delta,             [3, Algorithm 2]
    FedAdam     v = b2 v + (1 - b2) Delta^2            } x += eta m / (sqrt(v) + tau)

with v = tau^2 and m = 0 at first and no correction of bias, as there. (FedProx is a matter of the clients: their
`proximal`.) Under noise of standard deviation s in each coordinate of Delta, tau well below s lets the noise alone
decide the size of a step.

References:
    [1] McMahan, Moore, Ramage, Hampson, Aguera y Arcas, Communication-Efficient Learning of Deep Networks from
        Decentralized Data, 2017. arXiv:1602.05629
    [2] Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification,
        2019. arXiv:1909.06335
    [3] Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, Adaptive Federated Optimization, 2021.
        arXiv:2003.00295
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from accountants import arguments
from dpdl.errors import CheckpointError, ParameterError

__all__ = ["FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedYogi", "ServerOptimizer"]

Tensors = Mapping[str, Tensor]


class ServerOptimizer(ABC):
    """From a state and a mean update to the next state.

    Given are `FedAvg`, `FedAvgM`, `FedAdagrad`, `FedAdam` and `FedYogi`. One of your own implements `step`; if it
    remembers anything between rounds, `_slots` names it, so that a server that is resumed goes on with it.

    Units: an update is a difference of weights, weights after local training less the global ones, so a learning rate
    of 1 with `FedAvg` moves to the mean of the clients' weights.

    Guarantee:
        It sees the mean update alone, after noise and division: whatever it computes is post-processing, and costs
        nothing. It draws no randomness and reads no data, and the tensors that it is given stay as they are.

    References:
        Reddi et al., 2021 (the module has it), Algorithm 1: the frame, client and server optimizer apart.
    """

    @abstractmethod
    def step(self, state: Tensors, mean_update: Tensors) -> dict[str, Tensor]:
        """The state after a round; the tensors that come are not changed.

        Args:
            state: the global model's, by name, each tensor in its own shape and dtype.
            mean_update: of those of its tensors that are trained: the same names and shapes, in float64.

        Returns:
            The whole state, its shapes and dtypes unchanged, the tensors without an update as they are.
        """

    def state_dict(self) -> dict[str, Any]:
        """What it remembers between rounds, and whose it is."""
        return {"optimizer": type(self).__name__, "slots": {slot: dict(of) for slot, of in self._slots().items()}}

    def refuse_unfit(self, state: object, like: Tensors) -> None:
        """Raise unless `load_state_dict` can take `state`, for tensors such as those of `like`.

        Raises:
            CheckpointError: it is another optimizer's, of other tensors, or damaged.
        """
        mine = type(self).__name__
        found = state.get("optimizer") if isinstance(state, Mapping) else state
        if not isinstance(state, Mapping) or found != mine:
            raise CheckpointError(f"The state is of the server optimizer {found!r}, this one is {mine}.")
        slots = state.get("slots")
        if not isinstance(slots, Mapping) or set(slots) != set(self._slots()):
            raise CheckpointError(f"The state of {mine} is damaged: it should have {sorted(self._slots())}.")
        for slot in slots.values():
            fits = isinstance(slot, Mapping) and all(
                name in like and isinstance(tensor, Tensor) and tensor.shape == like[name].shape
                for name, tensor in slot.items()
            )
            if not fits:
                raise CheckpointError(f"The state of {mine} is damaged, or of another model: its tensors do not fit.")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what a `state_dict` has; settings such as the learning rate stay this object's own."""
        for slot, mine in self._slots().items():
            mine.clear()
            mine.update({name: tensor.clone() for name, tensor in state["slots"][slot].items()})

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        """What is kept between rounds: tensors by name, by what they are."""
        return {}


@final
class FedAvg(ServerOptimizer):
    """Adds the mean update, times a learning rate: x += eta Delta [1, Algorithm 1]. It remembers nothing.

    Args:
        learning_rate: eta > 0; 1 is the mean of the clients' weights.

    Raises:
        ParameterError: it is not a finite number above 0.
    """

    def __init__(self, learning_rate: float = 1.0) -> None:
        self.learning_rate = _positive("learning_rate", learning_rate)

    def step(self, state: Tensors, mean_update: Tensors) -> dict[str, Tensor]:
        """State plus learning rate times update."""
        return moved(state, {name: self.learning_rate * delta for name, delta in mean_update.items()})


@final
class FedAvgM(ServerOptimizer):
    """FedAvg with momentum: v = beta v + Delta, x += eta v [2, section 4]; v is Delta in the first round.

    Args:
        learning_rate: eta > 0. Momentum lengthens steps by up to 1 / (1 - beta): lower it by as much.
        momentum: beta in [0, 1).

    Raises:
        ParameterError: a number is out of range.
    """

    def __init__(self, learning_rate: float = 1.0, momentum: float = 0.9) -> None:
        self.learning_rate = _positive("learning_rate", learning_rate)
        self.momentum = _decay("momentum", momentum)
        self._velocity: dict[str, Tensor] = {}

    def step(self, state: Tensors, mean_update: Tensors) -> dict[str, Tensor]:
        """State plus learning rate times velocity."""
        for name, delta in mean_update.items():
            before = self._velocity.get(name)
            self._velocity[name] = delta.clone() if before is None else self.momentum * before + delta
        return moved(state, {name: self.learning_rate * self._velocity[name] for name in mean_update})

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        return {"velocity": self._velocity}


class _Adaptive(ServerOptimizer):
    """m / (sqrt(v) + tau), for whichever v; see the module.

    Args:
        learning_rate: eta > 0.
        betas: b1 and b2 in [0, 1).
        tau: > 0, the degree of adaptivity, in units of an update's coordinate.

    Raises:
        ParameterError: a number is out of range.
    """

    def __init__(self, learning_rate: float = 0.1, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3) -> None:
        self.learning_rate = _positive("learning_rate", learning_rate)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ParameterError(f"betas must be two numbers in [0, 1), got {betas!r}.")
        self.betas = (_decay("betas[0]", betas[0]), _decay("betas[1]", betas[1]))
        self.tau = _positive("tau", tau)
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    @abstractmethod
    def _second_moment(self, before: Tensor, squared: Tensor) -> Tensor:
        """v of this round from that of the last one and Delta^2."""

    def step(self, state: Tensors, mean_update: Tensors) -> dict[str, Tensor]:
        """State plus learning rate times m / (sqrt(v) + tau)."""
        decay = self.betas[0]
        steps: dict[str, Tensor] = {}
        for name, delta in mean_update.items():
            first = self._first.get(name, torch.zeros_like(delta))
            second = self._second.get(name, torch.full_like(delta, self.tau**2))
            first = self._first[name] = decay * first + (1 - decay) * delta
            second = self._second[name] = self._second_moment(second, delta.square())
            steps[name] = self.learning_rate * first / (second.sqrt() + self.tau)
        return moved(state, steps)

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        return {"first": self._first, "second": self._second}


@final
class FedAdagrad(_Adaptive):
    """Adds up squares, so that steps only grow smaller [3, Algorithm 2]. The second of `betas` is not used.

    Args:
        learning_rate: eta > 0.
        betas: b1 in [0, 1), 0 for the plain rule, and a number that is not used.
        tau: > 0, the degree of adaptivity, in units of an update's coordinate.

    Raises:
        ParameterError: a number is out of range.
    """

    def _second_moment(self, before: Tensor, squared: Tensor) -> Tensor:
        return before + squared


@final
class FedAdam(_Adaptive):
    """An exponential average of squares, without correction of bias [3, Algorithm 2].

    Args:
        learning_rate: eta > 0.
        betas: decay of the averages of updates and of their squares, in [0, 1).
        tau: > 0, the degree of adaptivity, in units of an update's coordinate.

    Raises:
        ParameterError: a number is out of range.
    """

    def _second_moment(self, before: Tensor, squared: Tensor) -> Tensor:
        return self.betas[1] * before + (1 - self.betas[1]) * squared


@final
class FedYogi(_Adaptive):
    """Like FedAdam, but v moves by at most a fraction of the squares, whatever it was [3, Algorithm 2].

    Args:
        learning_rate: eta > 0.
        betas: decay of the average of updates, and one less the fraction, in [0, 1).
        tau: > 0, the degree of adaptivity, in units of an update's coordinate.

    Raises:
        ParameterError: a number is out of range.
    """

    def _second_moment(self, before: Tensor, squared: Tensor) -> Tensor:
        return before - (1 - self.betas[1]) * squared * torch.sign(before - squared)


def moved(state: Tensors, steps: Tensors) -> dict[str, Tensor]:
    """State plus steps, added in float64 and rounded once."""
    new = {name: (state[name].double() + step).to(state[name].dtype) for name, step in steps.items()}
    return {**state, **new}


def _positive(name: str, value: object) -> float:
    number = arguments.real(name, value, remedy="Give a number such as 1.0.")
    if not 0 < number < math.inf:
        raise ParameterError(f"{name} must be > 0 and finite, got {number!r}.")
    return number


def _decay(name: str, value: object) -> float:
    number = arguments.real(name, value, remedy="Give a number such as 0.9.")
    if not 0 <= number < 1:
        raise ParameterError(f"{name} must be in [0, 1), got {number!r}.")
    return number
