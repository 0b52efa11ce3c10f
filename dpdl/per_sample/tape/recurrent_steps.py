"""Which rows a recurrent layer computes at each step, and where the state of the step before lies.

A layer's buffers are flat: [rows, features], time-major, one row for each sequence that is alive at a position.
Padded batches have B rows at every position. Packed batches, sorted by falling length, have `sizes[t]` rows at
position t, those of the sequences 0 .. sizes[t] - 1, so nothing is ever computed for padding.

Axes: t position, b sequence (in packed order where packed), i input, h hidden, p output of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Carried", "Steps"]

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A state that goes from step to step: h, or the LSTM's c.

    For padded batches `rows` and `previous` are two windows on one buffer, B rows apart, so that to write a state
    is to hand it on. For packed batches they are two buffers, and `links` holds the copies that hand it on.

    Args:
        rows: [rows, features], the state after each row's step.
        previous: [rows, features], the state before it.
        links: for each step in order of processing, (where to, from where).
    """

    rows: Tensor
    previous: Tensor
    links: tuple[tuple[Tensor, Tensor], ...]

    def hand_on(self, step: int) -> None:
        """Make the state after a step, counted in order of processing, the state before the next one."""
        if step < len(self.links):
            target, source = self.links[step]
            target.copy_(source)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The order of work of one direction.

    Args:
        sizes: number of sequences alive at each position, never rising.
        reverse: from the last position to the first.
        packed: whether `sizes` came with the batch; otherwise they are all equal.
        per_block: positions for which what does not depend on the recursion is done in one operation.
    """

    sizes: tuple[int, ...]
    reverse: bool
    packed: bool
    per_block: int

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return self.sizes[0]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.sizes)

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows as the layer hands them out: [t, b, features], or flat if packed; a view."""
        return rows if self.packed else rows.view(len(self.sizes), self.batch, rows.shape[1])

    def flat(self, values: Tensor) -> Tensor:
        """[rows, features] of values shaped as a layer's input; a view where strides allow."""
        return values if self.packed else values.reshape(-1, values.shape[-1])

    def in_order(self, rows: Tensor) -> Sequence[Tensor]:
        """Views on each step's part of [rows, ...], in order of processing."""
        if self.packed:
            return self._turned(rows.split(self.sizes))
        return self._turned(rows.unflatten(0, (len(self.sizes), self.batch)).unbind(0))  # quicker

    def outputs_in_order(self, outputs: Tensor | None) -> Sequence[Tensor] | Sequence[None]:
        """As `in_order`, of values shaped as the layer's outputs, with any strides; Nones for None."""
        if outputs is None:
            return [None] * len(self.sizes)
        return self.in_order(outputs) if self.packed else self._turned(outputs.unbind(0))

    def alive(self, running: Tensor) -> Sequence[Tensor]:
        """Views on the part of [b, ...] that each step reaches, in order of processing."""
        if not self.packed:
            return [running] * len(self.sizes)
        return [running[:size] for size in self._turned(self.sizes)]

    def blocks(self) -> Sequence[range]:
        """The steps, counted in order of processing, in runs that share an operation."""
        count = len(self.sizes)
        return [range(begin, min(begin + self.per_block, count)) for begin in range(0, count, self.per_block)]

    def in_blocks(self, rows: Tensor) -> Sequence[Tensor]:
        """Views on each block's part of [rows, ...], in order of processing."""
        order = self._turned(self.sizes)
        lengths = [sum(order[block.start : block.stop]) for block in self.blocks()]
        return self._turned(rows.split(list(self._turned(lengths))))

    def _turned(self, parts: Sequence[Item]) -> Sequence[Item]:
        return parts[::-1] if self.reverse else parts

    def running(self, last: Tensor | None, like: Tensor) -> Tensor:
        """Where the backward loop carries the gradient of a state, [b, features]; begins as that of the last one.

        Sequences that a step does not reach keep what they have: the gradient of their last state until the loop
        comes to their last step, or that of their first state once it has left their first.
        """
        if last is None:
            return like.new_zeros((self.batch, like.shape[1]))
        return last.clone(memory_format=torch.contiguous_format)

    def carry(self, first: Tensor) -> Carried:
        """Buffers for a state that begins as `first`, [b, features]."""
        count, batch, width = self.rows, self.batch, first.shape[1]
        if not self.packed:
            buffer = first.new_empty((count + batch, width))
            early, late = buffer[:count], buffer[batch:]
            rows, previous = (early, late) if self.reverse else (late, early)
            buffer[count if self.reverse else 0 :][:batch] = first
            return Carried(rows=rows, previous=previous, links=())
        rows, previous = first.new_empty((count, width)), first.index_select(0, self.sequence_of_row(first.device))
        after, before = self.in_order(rows), self.in_order(previous)
        links = []
        for source, target in zip(after[:-1], before[1:], strict=True):
            alive = min(len(source), len(target))
            links.append((target[:alive], source[:alive]))
        return Carried(rows=rows, previous=previous, links=tuple(links))

    def last(self, rows: Tensor) -> Tensor:
        """Each sequence's state after its last step, [b, features]; a copy."""
        if self.packed and not self.reverse:
            return rows.index_select(0, self._last_rows(rows.device))
        return self.in_order(rows)[-1].clone()

    def padded(self, rows: Tensor) -> Tensor:
        """[t, b, features], zero beyond each sequence's length: a view if the batch is padded, a copy if packed."""
        if not self.packed:
            return self.shaped(rows)
        width = rows.shape[1]
        full = rows.new_zeros((len(self.sizes) * self.batch, width))
        full[self._padded_rows(rows.device)] = rows
        return full.view(len(self.sizes), self.batch, width)

    def inputs(self, values: Tensor) -> Tensor:
        """The layer's inputs as [t, b, features]; themselves if padded."""
        return self.padded(values) if self.packed else values

    def sequence_of_row(self, device: torch.device) -> Tensor:
        """b of each row."""
        return torch.cat([torch.arange(size, device=device) for size in self.sizes])

    def _padded_rows(self, device: torch.device) -> Tensor:
        """t * B + b of each row."""
        starts = torch.arange(len(self.sizes), device=device) * self.batch
        sizes = torch.tensor(self.sizes, device=device)
        return starts.repeat_interleave(sizes, output_size=self.rows) + self.sequence_of_row(device)

    def _last_rows(self, device: torch.device) -> Tensor:
        """The row of each sequence's last position."""
        sizes = torch.tensor(self.sizes, device=device)
        sequences = torch.arange(self.batch, device=device)
        lengths = (sizes[:, None] > sequences).sum(0)
        return (sizes.cumsum(0) - sizes)[lengths - 1] + sequences
