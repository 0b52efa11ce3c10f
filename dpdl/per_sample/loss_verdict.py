"""What a loss is over the examples of a batch, judged by computing it again.

In two ways, for either misses what the other sees:

- **Others in their place.** Some examples stay where they are, others take the content of those. Gradients of those
  that stayed must be the same. Nothing unmarked has to follow the batch, so nearly every loss can be computed like
  this, with masks [N, N] and pairs of rows as well. It does not tell a mean from a sum.
- **Fewer.** For a few examples, two at a time, then for the first half: for a mean, the gradients of their outputs
  grow by N / 2 and N / half; for a sum, they stay; for a loss that mixes examples, neither. What a loss takes from the
  batch as Python numbers (`len(y)`) or as tensors of its own is not marked, so it is read in several ways (`Reading`).
  A relation that holds in any reading is possible; a mean is believed before a sum, because only a number that
  follows the batch can make a sum look like a mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpdl.per_sample.loss_reading import FIXED, READINGS, READINGS_OF_SEVERAL, Reading
from dpdl.per_sample.loss_relation import Verdict, agree, relation_of
from dpdl.per_sample.loss_replay import Replay

__all__ = ["Judgement", "judge"]

# Of how many groups of two examples a loss is computed alone.
FEW = 3


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was found.

    Attributes:
        verdict: None where nothing was.
        has_run: whether the loss could be computed again in some way.
    """

    verdict: Verdict | None
    has_run: bool


def judge(replay: Replay, *, turn: int, several: bool) -> Judgement:
    """Compute a loss again, in all the ways.

    Args:
        replay: the loss.
        turn: a number, other ones for other batches: which examples are taken depends on it alone.
        several: whether its outputs come from several forward passes.
    """
    return _Judge(replay, turn=turn).judgement(READINGS_OF_SEVERAL if several else READINGS)


class _Judge:
    """Computes one loss again and again.

    Args: as for `judge`.
    """

    def __init__(self, replay: Replay, *, turn: int) -> None:
        self._replay = replay
        size = replay.size
        order = torch.randperm(size, generator=torch.Generator().manual_seed(turn))
        few = 2 if size > 3 else 1
        # Several: what passes from one row to all others, or a maximum, stays unseen where it is among the few.
        self._fewer = [*order[: FEW * few].split(few), torch.arange((size + 1) // 2)]
        self._kept = order[: (size + 1) // 2].sort().values
        self._others_replaced = torch.arange(size)
        self._others_replaced[order[len(self._kept) :]] = self._kept[: size // 2].flip(0)
        self._whole = replay.true_gradients()
        self._has_run = False

    def judgement(self, readings: Iterable[Reading]) -> Judgement:
        """The whole of it."""
        apart = self._keeps_apart()
        verdict: Verdict | None = None if self._replay.draws else self._of_fewer(readings)
        if apart and verdict not in (None, "neither"):
            return Judgement(verdict=verdict, has_run=True)
        if not self._comes_out_again():
            return Judgement(verdict=None, has_run=False)
        if apart is False or verdict == "neither":
            verdict = None if self._replay.takes_lists else "neither"
        return Judgement(verdict=verdict, has_run=self._has_run)

    def _comes_out_again(self) -> bool:
        """Whether the same loss comes out for the same examples: what is foreign in it was not followed."""
        again = self._replay.gradients(torch.arange(self._replay.size), None)
        return again is not None and agree(self._whole, again) is not False

    def _run(self, rows: Tensor, reading: Reading) -> list[Tensor] | None:
        gradients = self._replay.gradients(rows, reading)
        self._has_run |= gradients is not None
        return gradients

    def _keeps_apart(self) -> bool | None:
        """Whether gradients of examples stay when others take the content of those; None if that is not known."""
        for reading in FIXED if self._replay.reads_numbers else FIXED[-1:]:
            changed = self._run(self._others_replaced, reading)
            if changed is not None:
                return agree(self._replay.at(self._whole, self._kept), self._replay.at(changed, self._kept))
        return None

    def _of_fewer(self, readings: Iterable[Reading]) -> Verdict | None:
        """What the loss may be, by the readings in which it can be computed for fewer examples."""
        possible: set[Verdict] = set()
        tried: set[object] = set()
        for reading in readings:
            if possible and not reading.items and self._replay.reads_numbers:
                break  # numbers read from tensors were recognised: that reading is the one
            effects = tuple(self._replay.effects(reading, len(rows)) for rows in self._fewer)
            if effects in tried:
                continue  # nothing in this loss tells it from an earlier one
            tried.add(effects)
            if (verdict := self._read_as(reading)) is not None:
                possible.add(verdict)
        return next((verdict for verdict in ("mean", "sum", "neither") if verdict in possible), None)

    def _read_as(self, reading: Reading) -> Verdict | None:
        found: set[Verdict] = set()
        for rows in self._fewer:
            if (relation := self._relation(rows, reading)) is not None:
                found.add(relation)
            if (len(found) > 1 or "neither" in found) and not self._replay.takes_lists:
                return "neither"
        if len(found) > 1:
            return None  # lists follow the first half alone
        return found.pop() if found else None

    def _relation(self, rows: Tensor, reading: Reading) -> Verdict | None:
        part = self._run(rows, reading)
        if part is None:
            return None
        return relation_of(self._replay.at(self._whole, rows), part, size=self._replay.size, part_size=len(rows))
