"""Per-sample gradients of one batch, computed when they are first asked for.

`p.grad_sample` looks like a tensor [N, *shape of p]. Most scripts never read it: the optimizer asks the record behind
it for norms and a weighted sum, which the engines give without ever holding a gradient per example. Whoever reads it
gets the real numbers, and pays for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpdl.compat.opacus.turn import Part
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.engine import PerSampleGradients
from dpdl.per_sample.materialized import MaterializedGradients

__all__ = ["GradSample", "LazyTensor", "NormSample", "PerSampleRecord"]


class PerSampleRecord:
    """The gradients that one group of forwards over the same N examples has brought.

    Args:
        parameters: the parameters they are of, by name.
        size: N.
        forwards: forwards begun before the first backward; those belong to this group.
        batch: identifies the batch that was handed out, if a private loader did.
        keep: hold the gradients after they were summed, so that `p.grad_sample` can be read then.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], *, size: int, forwards: int, batch: Part | None, keep: bool
    ) -> None:
        self.parameters = dict(parameters)
        self.size = size
        self.forwards = forwards
        self.batch = batch
        self.keep = keep
        self.processed = False
        self._waiting: list[Passage] = []
        self._parts: list[PerSampleGradients] = []
        self._names = {id(p): name for name, p in self.parameters.items()}

    def add(self, passage: Passage) -> None:
        """One more forward whose backward has come."""
        if not any(known is passage for known in self._waiting):
            self._waiting.append(passage)

    def covers(self, parameters: list[Tensor]) -> bool:
        """Whether the record is of exactly these parameters."""
        return {id(p) for p in parameters} == set(self._names)

    def norms_and_sum(self, weigh: Callable[[Tensor], Tensor], *, loss_scale: float = 1.0) -> dict[str, Tensor]:
        """sum_n weigh(norms)[n] * gradient_n by parameter; examples of weight 0 do not enter.

        Args:
            weigh: norms [n] to weights [n].
            loss_scale: what the loss was multiplied by.
        """
        sums: dict[str, Tensor] = {}

        def add(part: PerSampleGradients) -> None:
            norms = part.norms() / loss_scale
            for name, tensor in part.weighted_sum(weigh(norms) / loss_scale).items():
                sums[name] = sums[name] + tensor if name in sums else tensor

        if self.keep or self._parts:
            for part in self.parts():
                add(part)
        else:
            waiting, self._waiting = self._waiting, []
            visit_gradients(waiting, add)
        return sums

    def parts(self) -> list[PerSampleGradients]:
        """The gradients, in parts that follow each other along the batch."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            fresh: list[PerSampleGradients] = []
            visit_gradients(waiting, fresh.append)
            self._parts = fresh if not self._parts else [_added(self._parts, fresh)]
        return self._parts

    def norms(self) -> Tensor:
        """L2 norm of each example's gradient, [N]."""
        norms = [part.norms() for part in self.parts()]
        return torch.cat(norms) if norms else torch.zeros(0)

    def of(self, parameter: Tensor) -> Tensor:
        """The gradients of one parameter, [N, *shape], in its dtype."""
        name = self._names[id(parameter)]
        with torch.no_grad():
            rows = [part.materialize()[name] for part in self.parts()]
            return torch.cat(rows).to(parameter.dtype) if rows else parameter.new_zeros((0, *parameter.shape))


def _added(one: list[PerSampleGradients], other: list[PerSampleGradients]) -> PerSampleGradients:
    """The sum of two gradients of the same examples."""
    wholes = []
    for parts in (one, other):
        pieces = [part.materialize() for part in parts]
        wholes.append({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})
    return MaterializedGradients.joined(wholes, accumulate_dtype=torch.float32)


class LazyTensor(Tensor):
    """A tensor whose numbers are computed when an operation needs them.

    Args (of `made`):
        record: where they come from.
        parameter: whose gradients they are of.
    """

    record: PerSampleRecord
    parameter: Tensor

    @classmethod
    def made(cls, record: PerSampleRecord, parameter: Tensor) -> Self:
        """One of this kind."""
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, cls.shape_of(record, parameter), dtype=parameter.dtype, device=parameter.device
        )
        wrapper.record, wrapper.parameter = record, parameter
        return wrapper

    @classmethod
    def shape_of(cls, record: PerSampleRecord, parameter: Tensor) -> tuple[int, ...]:
        """The shape before anything is computed."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """The numbers, as an ordinary tensor."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub leaves the arguments out
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operation is on the plain tensor."""

        def plain(leaf: Any) -> Any:
            return leaf.plain() if isinstance(leaf, LazyTensor) else leaf

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as above
        return f"{type(self).__name__}({self.plain()!r})"


class GradSample(LazyTensor):
    """What `p.grad_sample` is: [N, *shape of p]."""

    @classmethod
    def shape_of(cls, record: PerSampleRecord, parameter: Tensor) -> tuple[int, ...]:
        """[N, *shape]."""
        return (record.size, *parameter.shape)

    def plain(self) -> Tensor:
        """The gradients."""
        return self.record.of(self.parameter)


class NormSample(LazyTensor):
    """What `p._norm_sample` is: the L2 norms of one parameter's per-sample gradients, [N]."""

    @classmethod
    def shape_of(cls, record: PerSampleRecord, parameter: Tensor) -> tuple[int, ...]:
        """[N]."""
        return (record.size,)

    def plain(self) -> Tensor:
        """The norms."""
        rows = self.record.of(self.parameter)
        norms: Tensor = rows.reshape(self.record.size, self.parameter.numel()).norm(dim=1)
        return norms
