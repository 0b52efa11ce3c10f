"""What schedulers of noise and of the clipping norm have in common."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from dpdl.errors import ParameterError

__all__ = ["Schedule"]


class Schedule(abc.ABC):
    """Sets an attribute of a private optimizer at each `step()`, as torch's schedulers set the learning rate.

    A schedule must not depend on the data.

    Args:
        optimizer: a private optimizer.
        last_epoch: the epoch before the first.

    Raises:
        ParameterError: the optimizer has no such attribute, or a value is out of range.
    """

    attribute: ClassVar[str]

    def __init__(self, optimizer: Any, *, last_epoch: int = -1) -> None:
        if not hasattr(optimizer, self.attribute):
            raise ParameterError(
                f"{type(self).__name__} needs an optimizer with a {self.attribute}, got {type(optimizer).__name__}. "
                "Give the optimizer that make_private returned."
            )
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.step()

    @abc.abstractmethod
    def value(self) -> Any:
        """The value for `self.last_epoch`."""

    def current(self) -> Any:
        """The attribute as it is."""
        return getattr(self.optimizer, self.attribute)

    def step(self) -> None:
        """Go on by one epoch.

        Raises:
            ParameterError: the new value is negative.
        """
        self.last_epoch += 1
        value = self.value()
        if not all(number >= 0 for number in (value if isinstance(value, list) else [value])):
            raise ParameterError(f"{type(self).__name__} gave {self.attribute} = {value!r}; it must not be negative.")
        setattr(self.optimizer, self.attribute, value)

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer, and functions."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer" and not callable(value)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` wrote."""
        self.__dict__.update(state_dict)
