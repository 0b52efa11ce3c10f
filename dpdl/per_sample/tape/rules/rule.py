"""What a rule is given, and what it must do.

A rule runs one torch operation with its parameters as constants, and says what the operation's parameters receive
once the gradient of the output is known:

    def rule(call, *the operation's own arguments) -> the operation's output, or NotImplemented

NotImplemented: the rule does not know this form; a general way is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from dpdl.per_sample.tape.batch_axis import BatchAxis
from dpdl.per_sample.tape.contribution import Contribution
from dpdl.per_sample.tape.source import Source

__all__ = ["Contributions", "Rule", "RuleCall"]

# From what the rule kept, and the gradient of the output: what each source receives.
Contributions = Callable[[tuple[Tensor, ...], Tensor], Iterable[tuple[Source, Contribution]]]
Rule = Callable[..., Any]


class RuleCall(ABC):
    """One call of an operation, as its rule sees it."""

    examples: int
    function: Callable[..., Any]

    @abstractmethod
    def source(self, tensor: Any) -> Source | None:
        """The source that an argument is; None for data and constants."""

    @abstractmethod
    def constant(self, tensor: Any) -> Any:
        """An argument, a source as its values without a graph."""

    @abstractmethod
    def axis(self, tensor: Any) -> BatchAxis | None:
        """Where an operand carries the examples; None if it does not."""

    @property
    @abstractmethod
    def output_axis(self) -> BatchAxis | None:
        """Where the output carries the examples."""

    @abstractmethod
    def front(self, tensor: Tensor, axis: BatchAxis) -> Tensor:
        """A tensor as [n, k, ...], in the dtype in which sums are taken."""

    @abstractmethod
    def widened(self, tensor: Tensor) -> Tensor:
        """A tensor in the dtype in which sums are taken."""

    @property
    @abstractmethod
    def anchor(self) -> Tensor:
        """A scalar that makes autograd reach nodes that nothing else asks for."""

    @abstractmethod
    def uses(self, *sources: Source | None) -> None:
        """Say that these sources will receive something by `receive`."""

    @abstractmethod
    def receive(self, source: Source, contribution: Contribution) -> None:
        """Hand over what a source receives, where `tap` does not serve."""

    @abstractmethod
    def copy(self, source: Source) -> Tensor:
        """A copy of a source for each example, [n, *shape], whose gradient becomes the source's contribution."""

    @abstractmethod
    def tap(
        self, output: Tensor, kept: tuple[Tensor, ...], contributions: Contributions, *uses: Source | None
    ) -> Tensor:
        """The output, with `contributions` called when its gradient is known.

        Args:
            output: of the operation.
            kept: tensors that `contributions` needs.
            contributions: see above.
            uses: the sources that will receive something.
        """
