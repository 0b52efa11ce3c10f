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

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from dpdl.errors import PrivacyError, ProcessGroupError, StepError, WrapError
from dpdl.flat_rows import FlatRows
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum, NoisyGradient

__all__ = ["Ranks", "described"]

FIRST = 0
LOOKED_AT = 1 << 20  # numbers of a tensor that are compared between ranks

Told = TypeVar("Told")


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

    def agree(self, what: str, facts: dict[str, Any], *, refused: PrivacyError | None = None) -> None:
        """Check that all ranks do the same, with the same, and that none refuses it; changes nothing.

        Args:
            what: what they are about to do.
            facts: plain values, by what they are.
            refused: why this rank will not, if it will not.

        Raises:
            WrapError, StepError: on every rank, if ranks differ.
            PrivacyError: on every rank, of the kind that one has refused with.
        """
        if self.size == 1:
            if refused is not None:
                raise refused
            return
        told = self._told(what, (json.dumps(facts, sort_keys=True, default=str), refused))
        if refused is not None:
            raise refused
        for rank, (_, error) in enumerate(told):
            if error is not None:
                raise type(error)(f"Rank {rank}: {error}")
        first, *others = (json.loads(each) for each, _ in told)
        for rank, other in enumerate(others, start=1):
            for name in facts:
                if other.get(name) != first.get(name):
                    raise WrapError(
                        f"Rank {rank} was given another {name} than rank 0: {other.get(name)}, not {first.get(name)}. "
                        "All ranks of a data-parallel run must be given the same plan, model, data and settings, load "
                        "the same checkpoint, and freeze and record the same."
                    )

    def first_says(self, what: str, answer: Callable[[], Told]) -> Told:
        """What rank 0 answers, on every rank.

        Raises:
            PrivacyError: on every rank, what rank 0 has raised.
        """
        if self.size == 1:
            return answer()
        said: tuple[Told | None, PrivacyError | None] = (None, None)
        if self.is_first:
            try:
                said = (answer(), None)
            except PrivacyError as error:
                said = (None, error)
        value, refusal = self._told(what, said)[FIRST]
        if refusal is not None:
            raise refusal
        found: Told = value
        return found

    def _told(self, what: str, mine: Any) -> list[Any]:
        """What each rank says, all being about to do the same."""
        everyone: list[Any] = [None] * self.size
        with self.message(f"agreeing on {what}"):
            dist.all_gather_object(everyone, (what, mine), group=self._group)
        for rank, (doing, _) in enumerate(everyone):
            if doing != everyone[FIRST][0]:
                raise StepError(
                    f"Rank {rank} is at {doing}, rank 0 at {everyone[FIRST][0]}. All ranks of a data-parallel run must "
                    "make the same calls in the same order: load a checkpoint on all of them, step on all of them."
                )
        return [said for _, said in everyone]

    def same_start(self, model: nn.Module) -> None:
        """Give every rank the weights and buffers of rank 0; slices of a sharded model are what there is of each."""
        if self.size == 1:
            return
        with self.message("sending the first weights"), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if not hasattr(tensor, "device_mesh"):  # a DTensor has it
                    dist.broadcast(tensor.detach(), self._first, group=self._group)

    def shared_key(self) -> bytes:
        """Fresh bytes from rank 0's operating system, the same on every rank."""
        return self.first_says("a random stream", RandomStream.fresh_key)

    def total(self, mine: ClippedSum, *, reuse: bool = False) -> ClippedSum:
        """The sum over ranks; its tensors are whole on rank 0 only.

        Args:
            mine: this rank's.
            reuse: whether its long tensors may be used up, which saves their memory.

        Raises:
            ProcessGroupError: a rank is gone. Nothing was released.
        """
        if self.size == 1:
            return mine
        flat = FlatRows(mine.tensors, reuse=reuse)
        counts = torch.tensor([mine.examples, mine.clipped, mine.non_finite], device=flat.rows[0].device)
        with self.message("adding up the ranks' clipped sums"):
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
        with self.message("sending out the noisy sum"):
            for row in flat.rows:
                dist.broadcast(row, self._first, group=self._group)
        return replace(noisy, tensors=flat.tensors())

    @property
    def _first(self) -> int:
        assert self._group is not None
        return dist.get_global_rank(self._group, FIRST)

    @contextmanager
    def message(self, what: str) -> Iterator[None]:
        """A context for what ranks send each other.

        Raises:
            ProcessGroupError: a rank is gone.
        """
        try:
            yield
        except RuntimeError as error:  # of a lost connection, or of the group's timeout
            raise ProcessGroupError(
                f"Rank {self.rank} of {self.size} lost the others while {what}: another rank has ended, with an error "
                "of its own, or did not answer in the process group's timeout. This run is over; the ledger holds what "
                "was released. Start all ranks again, and go on from the last checkpoint (dpdl.load_checkpoint)."
            ) from error


def described(dataset: Any) -> list[Any]:
    """What can be compared of a dataset between ranks without reading its examples: those may be changed at random.

    Order matters: two ranks that number the examples differently would both take some of them.
    """
    found = [type(dataset).__name__, len(dataset)]
    if isinstance(dataset, Subset):
        indices = hashlib.sha256(json.dumps([int(index) for index in dataset.indices]).encode()).hexdigest()
        return [*found, indices, described(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [*found, [described(part) for part in dataset.datasets]]
    if isinstance(dataset, TensorDataset):
        return [*found, [_digest(tensor) for tensor in dataset.tensors]]
    return found


def _digest(tensor: Tensor) -> str:
    some = tensor.detach().flatten()[:: max(1, tensor.numel() // LOOKED_AT)].cpu().contiguous()
    told = f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + some.view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(told).hexdigest()
