"""One round's updates, added up as they come: clipped and weighed, or plainly averaged where there is no plan.

    updates = ClippedUpdates(model, max_update_norm=S, max_weight=1.0)
    updates.add(reply)                     # as often as replies come; nothing of a reply is kept
    clipped = updates.total()              # a ClippedSum, with its sensitivity

**What one client can do.** Its contribution is w min(1, S / ||u||) u, with the norm over all its tensors together (a
0-d tensor is one coordinate like others) and w at most max_weight: whatever it sends, its L2 norm is at most
max_weight S. An update that is not finite, of other shapes, lacks a tensor, or has a weight that is no finite number
>= 0, counts as zero, and is counted. So does whoever does not answer. The noise that is added afterwards is of the
sensitivity, and the sum is divided by a number that was fixed before, so neither depends on who replied.

Norms and sums are taken in float64, the clipping norm lowered by the most that rounding can add to a norm of d
squares, in whatever order they are added: (d + 32) units in the last place.

**A secure aggregation** would take the place of `ClippedUpdates`: clients clip, encode their updates as whole numbers
modulo 2^b and mask them; the server gets the sum alone, decodes it, and hands on the same `ClippedSum`, with the
sensitivity of the encoding. What comes after (`dpdl.federated.round_release`) does not see how a sum came about.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import final

import torch
from torch import Tensor

from dpdl.clipping.flat import ROUNDINGS
from dpdl.federated.global_model import GlobalModel
from dpdl.federated.messages import FitReply
from dpdl.types import ClippedSum

__all__ = ["ACCEPTED", "MALFORMED", "NOT_FINITE", "ClippedUpdates", "RoundUpdates", "WeighedUpdates"]

# What becomes of a reply.
ACCEPTED = "accepted"
NOT_FINITE = "not finite"
MALFORMED = "malformed"

_ADDED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # narrower ones have no norms and sums
_EPS = torch.finfo(torch.float64).eps


class RoundUpdates(ABC):
    """A sum over the replies of one round.

    Attributes:
        excluded: how many tensors came that are in the state and are not averaged. Private.
        problem: what was wrong with the latest reply that was not accepted. Private.
    """

    excluded = 0
    problem = ""

    @abstractmethod
    def add(self, reply: FitReply) -> str:
        """Take one client's update into the sum; returns what became of it: `ACCEPTED`, ..."""


@final
class ClippedUpdates(RoundUpdates):
    """Sum of updates, each clipped and of bounded weight.

    Args:
        model: whose trained tensors are added up.
        max_update_norm: S > 0.
        max_weight: > 0.
        quantile: what the bits "not clipped" are centred at; see `dpdl.federated.adaptive_clipping`.

    Attributes:
        clipped: accepted updates that were scaled down. Private.
        lowered: replies whose weight was lowered to max_weight. Private.
        centred_bits: sum over accepted replies of ([norm <= S] - quantile). Private.

    Guarantee:
        `total()` moves by at most max_weight * max_update_norm in L2 norm, and centred_bits by at most
        max(quantile, 1 - quantile), when one client's replies are added or removed, if each client's first reply alone
        is added.
    """

    def __init__(self, model: GlobalModel, *, max_update_norm: float, max_weight: float, quantile: float = 0.5) -> None:
        self._model = model
        self._norm = max_update_norm
        self._bound = max_update_norm * (1 - (model.coordinates + ROUNDINGS) * _EPS)
        self._max_weight = max_weight
        self._quantile = quantile
        self._sum = model.zeros()
        self._accepted = self._not_finite = 0
        self.clipped = self.lowered = 0
        self.centred_bits = 0.0

    def add(self, reply: FitReply) -> str:
        """Clip, weigh, and add in float64."""
        problem, ignored = fault(reply, self._model)
        if problem:
            self.problem = problem
            return MALFORMED
        norm = update_norm(reply, self._model)
        if not math.isfinite(norm):
            self._not_finite += 1
            self.problem = "its norm is not finite"
            return NOT_FINITE
        scale = min(float(reply.weight), self._max_weight) * (1.0 if norm <= self._bound else self._bound / norm)
        for name, total in self._sum.items():
            total.add_(reply.update[name].detach().to(total.device), alpha=scale)
        self._accepted += 1
        self.clipped += norm > self._bound
        self.excluded += ignored
        self.lowered += reply.weight > self._max_weight
        self.centred_bits += (norm <= self._norm) - self._quantile
        return ACCEPTED

    def total(self) -> ClippedSum:
        """The sum so far, in float64, with its sensitivity."""
        return ClippedSum(
            tensors=self._sum,
            sensitivity=self._max_weight * self._norm,
            examples=self._accepted,
            clipped=self.clipped,
            non_finite=self._not_finite,
        )


@final
class WeighedUpdates(RoundUpdates):
    """Sum of updates times weights, for a federation without a plan: no bound, no privacy.

    Args:
        model: whose trained tensors are added up.
        max_weight: to which larger weights are lowered; None for no limit.
    """

    def __init__(self, model: GlobalModel, *, max_weight: float | None = None) -> None:
        self._model = model
        self._max_weight = math.inf if max_weight is None else max_weight
        self._sum = model.zeros()
        self._weight = 0.0

    def add(self, reply: FitReply) -> str:
        """Weigh, and add in float64."""
        problem, ignored = fault(reply, self._model)
        if problem:
            self.problem = problem
            return MALFORMED
        if not math.isfinite(update_norm(reply, self._model)):
            self.problem = "its norm is not finite"
            return NOT_FINITE
        weight = min(float(reply.weight), self._max_weight)
        for name, total in self._sum.items():
            total.add_(reply.update[name].detach().to(total.device), alpha=weight)
        self._weight += weight
        self.excluded += ignored
        return ACCEPTED

    def mean(self) -> dict[str, Tensor] | None:
        """The mean weighted update, in float64; None if no reply had a weight."""
        if self._weight == 0:
            return None
        return {name: total / self._weight for name, total in self._sum.items()}


def update_norm(reply: FitReply, model: GlobalModel) -> float:
    """The L2 norm of an update over all trained tensors, in float64; infinite or NaN if a number in it is."""
    norms = [
        torch.linalg.vector_norm(reply.update[name].detach(), dtype=torch.float64).item() for name in model.trained
    ]
    return math.hypot(*norms)


def fault(reply: FitReply, model: GlobalModel) -> tuple[str, int]:
    """What keeps a reply from being added ("" if nothing), and how many of its tensors are left out."""
    weight = reply.weight
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight <= sys.float_info.max:
        return f"its weight is {weight!r}, not a finite number >= 0", 0
    if not isinstance(reply.update, Mapping):
        return f"its update is {type(reply.update).__name__}, not tensors by name", 0
    for name in model.trained:
        if name not in reply.update:
            return (
                f"its update has no '{name}', which the server averages (it names what is trained: "
                "FederatedServer(model) or trained=[...])"
            ), 0
        tensor, mine = reply.update[name], model.state[name]
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
            return f"its '{name}' is not a dense tensor", 0
        if tensor.shape != mine.shape or tensor.dtype not in _ADDED:
            return f"its '{name}' is {tensor.dtype} of shape {tuple(tensor.shape)}, not {tuple(mine.shape)} floats", 0
    others = [name for name in reply.update if name not in model.trained]
    for name in others:
        if not model.ignores(name):
            return f"its update has {name!r}, which the global model has not", 0
    return "", len(others)
