"""The processes of a data-parallel run: each takes a share of every logical batch, and one adds the noise.

    each rank: its share ─▶ clipped sum ─┐
    each rank: its share ─▶ clipped sum ─┴─▶ rank 0: total ─▶ + noise, once ─▶ the same noisy sum for all ranks

All ranks draw the same Poisson sample, from a key that rank 0 has made, and rank r takes its examples r, r + R, ...
So the examples of a step, and the guarantee, are those of one process. An example is in one share only, so the sum
over ranks has the sensitivity of one clipped sum. Noise is drawn by rank 0 alone, once a step. Every rank keeps the
same ledger.

Messages between ranks are private: they carry sums without noise. Encrypt them where others can listen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpdl.errors import ProcessGroupError, WrapError
from dpdl.flat_rows import FlatRows
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum, NoisyGradient

__all__ = ["Ranks"]

FIRST = 0


class Ranks:
    """The ranks of a process group, or a process on its own.

    Args:
        group: of `torch.distributed`; None for one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of_this_run(cls) -> Ranks:
        """All ranks of `torch.distributed`, if this process is one of several."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.group.WORLD)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that adds the noise and keeps the files."""
        return self.rank == FIRST

    @property
    def share(self) -> slice:
        """Which of a step's examples are this rank's."""
        return slice(self.rank, None, self.size)

    def refuse_differences(self, facts: dict[str, Any]) -> None:
        """Check that all ranks were given the same; changes nothing.

        Args:
            facts: plain values, by what they are.

        Raises:
            WrapError: on every rank, if ranks differ.
        """
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        with self._message("comparing what the ranks were given"):
            dist.all_gather_object(everyone, json.dumps(facts, sort_keys=True, default=str), group=self._group)
        others = [json.loads(each) for each in everyone]
        for rank, other in enumerate(others):
            for what in facts:
                if other.get(what) != others[FIRST].get(what):
                    raise WrapError(
                        f"Rank {rank} was given another {what} than rank 0: {other.get(what)}, not "
                        f"{others[FIRST].get(what)}. All ranks of a data-parallel run must be given the same plan, "
                        "model, data and settings."
                    )

    def same_start(self, model: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0."""
        if self.size == 1:
            return
        with self._message("sending the first weights"), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), self._first, group=self._group)

    def shared_key(self) -> bytes:
        """Fresh bytes from rank 0's operating system, the same on every rank."""
        key: list[Any] = [RandomStream.fresh_key()]
        if self.size > 1:
            with self._message("agreeing on a random stream"):
                dist.broadcast_object_list(key, self._first, group=self._group)
        fresh: bytes = key[0]
        return fresh

    def total(self, mine: ClippedSum) -> ClippedSum:
        """The sum over ranks; its tensors are whole on rank 0 only.

        Raises:
            ProcessGroupError: a rank is gone. Nothing was released.
        """
        if self.size == 1:
            return mine
        flat = FlatRows(mine.tensors)
        counts = torch.tensor([mine.examples, mine.clipped, mine.non_finite], device=flat.rows[0].device)
        with self._message("adding up the ranks' clipped sums"):
            dist.all_reduce(counts, group=self._group)
            for row in flat.rows:
                dist.reduce(row, self._first, group=self._group)
        examples, clipped, non_finite = counts.tolist()
        return replace(mine, tensors=flat.tensors(), examples=examples, clipped=clipped, non_finite=non_finite)

    def from_first(self, noisy: NoisyGradient) -> NoisyGradient:
        """What rank 0 has released, on every rank.

        Args:
            noisy: on rank 0 the release; on the others anything of its form.

        Raises:
            ProcessGroupError: a rank is gone. The release counts as spent.
        """
        if self.size == 1:
            return noisy
        flat = FlatRows(noisy.tensors)
        with self._message("sending out the noisy sum"):
            for row in flat.rows:
                dist.broadcast(row, self._first, group=self._group)
        return replace(noisy, tensors=flat.tensors())

    @property
    def _first(self) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, FIRST)

    @contextmanager
    def _message(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of a lost connection, or of the group's timeout
            raise ProcessGroupError(
                f"Rank {self.rank} of {self.size} lost the others while {what}: another rank has ended, with an error "
                "of its own, or did not answer in the process group's timeout. This run is over; the ledger holds what "
                "was released. Start all ranks again, and go on from the last checkpoint (dpdl.load_checkpoint)."
            ) from error
