"""The one door through which private rows leave a party: activations, gradients, labels, predictions.

    def door(leaving: Leaving) -> Departed:
        return Departed(rows=noised(leaving.rows))

An `Outlet` is asked once for everything that one party sends in one step under one name, however many parties get it,
and all of them get the same rows. Without one, rows leave as they are (`as_they_are`). Probes with made-up rows go
past it, since they have nothing to protect and no budget to spend.

One whose gradients compare the rows of a batch says so (`MixingOutlet`), and is refused beside noise. A door that
keeps account is a `KeptOutlet`: the party binds it to each run, and saves and loads its state with its own.

Not among what it is asked about: the norms and weights of joint clipping, row numbers, and how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from dpdl.split.clip import Clip
from dpdl.split.graph import SplitGraph

__all__ = ["Departed", "KeptOutlet", "Leaving", "MixingOutlet", "Outlet", "as_they_are"]

Content = Literal["activations", "gradients", "labels", "predictions"]
Purpose = Literal["train", "infer"]


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """Rows that are about to leave.

    Attributes:
        content: what they are.
        name: of the part whose output, or the output's gradient, they are; or of the column of labels.
        sender: whose they are.
        receivers: who gets them.
        rows: the tensor, rows first, without a graph. Private.
        row_numbers: the rows' numbers in the sender's data, shape [N]; None where it does not know them. Private.
        purpose: a training step, or inference.
        step: the number of the step, or of the inference, in its session.
        session: which.
    """

    content: Content
    name: str
    sender: str
    receivers: tuple[str, ...]
    rows: Tensor
    row_numbers: Tensor | None
    purpose: Purpose
    step: int
    session: str


@dataclass(frozen=True, kw_only=True)
class Departed:
    """What leaves instead.

    Attributes:
        rows: shaped as what was asked about.
        pull_back: from the gradient of these rows to that of the original ones (through a clip, say); None where they
            are the same.
    """

    rows: Tensor
    pull_back: Callable[[Tensor], Tensor] | None = None


# What a door is: asked once for all that a party sends in one step under one name, rows [N, ...] of one record each,
# and answers with rows of the same shape, which leave instead. What it promises of them is its own affair: a
# `ReleaseDoor` accounts for it, any other is taken to promise nothing, and reports say so.
Outlet = Callable[[Leaving], Departed]


@runtime_checkable
class KeptOutlet(Protocol):
    """An `Outlet` that keeps account of what it released."""

    def __call__(self, leaving: Leaving) -> Departed:
        """What leaves instead."""

    def bind(self, graph: SplitGraph, party: str, *, clip: Clip, noise_multiplier: float) -> None:
        """Compare what it was told with a run that it is about to serve; raises where the run does worse."""

    def state_dict(self) -> dict[str, Any]:
        """What it has released, as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember what `state_dict` returned, beside what is known here."""


@runtime_checkable
class MixingOutlet(Protocol):
    """An `Outlet` that says whether its `pull_back` lets rows meet: no plan with noise holds then."""

    mixes_rows: bool

    def __call__(self, leaving: Leaving) -> Departed:
        """What leaves instead."""


def as_they_are(leaving: Leaving) -> Departed:
    """Unprotected."""
    return Departed(rows=leaving.rows)
