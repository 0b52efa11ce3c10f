"""All positions that parameters had during a training, seen by whoever sees every step.

    with Transcript([parameter]) as seen:
        train(...)
    seen.moves          # [steps, n]: how far each weight went, step by step

DP-SGD's accounting lets the adversary see all of them, so an audit may use them: they say more than the final weights.
They are watched through torch's hook on steps of any optimizer, so that the training code needs to know nothing of it,
and may be anybody's.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from dpdl.errors import StepError

__all__ = ["STATISTICS", "Transcript", "statistics_of"]

Array = NDArray[np.float64]

_SHARPNESS = 2.0  # per standard deviation of a step: between the sum (0) and the largest (infinite)
STATISTICS = ("sum", "largest", "soft maximum", "range")


class Transcript:
    """Watches parameters while it is entered.

    Args:
        parameters: those to watch; they must stay the same tensors. A training that copies them is not seen.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._positions: list[Array] = []

    def __enter__(self) -> Transcript:
        self._positions = [self._position()]
        self._handle = register_optimizer_step_post_hook(self._after_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._handle.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in self._parameters):
            position = self._position()
            if not np.array_equal(position, self._positions[-1]):  # a wrapped optimizer's step is seen twice
                self._positions.append(position)

    def _position(self) -> Array:
        flat = [p.detach().to("cpu", torch.float64).reshape(-1).numpy() for p in self._parameters]
        return np.concatenate(flat).copy()

    @property
    def moves(self) -> Array:
        """Differences of successive positions, shape [steps, n].

        Raises:
            StepError: no optimizer has moved the parameters.
        """
        if len(self._positions) < 2:
            raise StepError(
                "No optimizer has moved the audited parameters. Train the very model that the audit hands over, not a "
                "copy of it, with a torch optimizer."
            )
        return np.diff(np.stack(self._positions), axis=0)


def statistics_of(moves: Array, *, reference: Array | None = None) -> dict[str, Array]:
    """What an attacker may make of the steps of each weight, each a score: larger for whom it was pushed up.

    Args:
        moves: shape [steps, n].
        reference: moves from which the spread of a step is taken, shape [steps, k]; by default all.

    Returns:
        For each of `STATISTICS` the scores, shape [n]: their sum (best where everybody is in all batches); the largest
        (where everybody is in few); the soft maximum between the two, log-sum-exp in units of the spread (the
        likelihood ratio of one batch in which it was, unknown which); and the range, which is free of noise that
        repeats itself from step to step.
    """
    seen = moves if reference is None else reference
    spread = float(np.median(np.abs(seen - np.median(seen)))) / 0.6745  # a standard deviation, of a Gaussian
    soft = special.logsumexp(_SHARPNESS / spread * moves, axis=0) if spread > 0 else moves.sum(axis=0)
    found = (moves.sum(axis=0), moves.max(axis=0), soft, moves.max(axis=0) - moves.min(axis=0))
    return dict(zip(STATISTICS, found, strict=True))
