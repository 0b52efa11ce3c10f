"""The vmap engine: `torch.func` vmap over vjp, in chunks. Exact for any pure module that vmap can run.

The forward runs under vmap without a graph. When the gradients of the outputs arrive, each chunk runs
forward again, with the same random numbers, and back; only one chunk's per-sample gradients exist at a
time. Every example is computed as a batch of one, so examples cannot meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, ForwardPass, FrozenCall, detached, is_differentiable
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.materialized import MaterializedGradients
from dpdl.per_sample.randomness import RandomState

__all__ = ["VmapEngine"]

# Bytes of per-sample gradients in one chunk. Measured with benchmarks/engines.py --chunks.
CHUNK_BYTES = 16 * 2**20


class VmapEngine(Engine):
    """Vectorised per-sample gradients.

    Args:
        module: the model.
        chunk_size: examples whose gradients exist at once. None: as many as fit `CHUNK_BYTES`.
    """

    name: ClassVar[str] = "vmap"
    keeps_examples_apart: ClassVar[bool] = True

    def __init__(
        self,
        module: nn.Module,
        *,
        accumulate_dtype: torch.dtype = torch.float32,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(module, accumulate_dtype=accumulate_dtype)
        self._chunk_size = chunk_size

    def forward(self, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> ForwardPass:
        """Run the model on a batch of at least one example; see `Engine.forward`."""
        call = FrozenCall(self.module, trainable)
        layout = self.layout_of(trainable, batch)
        examples = _VmappedExamples(call, layout, batch, detached(trainable), self.accumulate_dtype)
        outputs = examples.run_forward(self._chunks(batch.size, trainable))
        call.refuse_written_state()
        return ForwardPass(outputs=outputs, layout=layout, pull_back=examples.pull_back)

    def _chunks(self, size: int, trainable: Mapping[str, Tensor]) -> list[slice]:
        bytes_per_example = sum(p.numel() * p.element_size() for p in trainable.values())
        length = self._chunk_size or max(1, CHUNK_BYTES // max(1, bytes_per_example))
        return [slice(start, min(start + length, size)) for start in range(0, size, length)]


class _VmappedExamples:
    """A batch of examples on its way through the model and back."""

    def __init__(
        self,
        call: FrozenCall,
        layout: OutputLayout,
        batch: ExampleBatch,
        parameters: dict[str, Tensor],
        accumulate_dtype: torch.dtype,
    ) -> None:
        self._call = call
        self._layout = layout
        self._batch = batch
        self._parameters = parameters
        self._accumulate_dtype = accumulate_dtype
        self._chunks: list[_Chunk] = []
        self._constants: list[Any] = []
        self._positions: list[int] = []  # of the tensors among the output's leaves

    def run_forward(self, slices: list[slice]) -> list[Any]:
        """The output's leaves, without a graph."""
        parts = []
        for rows in slices:
            random_state = RandomState(self._batch.device)
            with torch.no_grad(), _vmappable_attention():
                run = vmap(lambda *leaves: self._one(self._parameters, leaves), randomness="different")
                part = run(*self._batch.rows(rows).row_leaves)
            prints = [_fingerprint(tensor) for tensor in part]
            self._chunks.append(_Chunk(rows=rows, random_state=random_state, fingerprints=prints))
            parts.append(part)
        outputs = list(self._constants)
        for k, position in enumerate(self._positions):
            joined = torch.cat([part[k] for part in parts]) if len(parts) > 1 else parts[0][k]
            axis = self._layout.axes[position]
            outputs[position] = joined if axis is None else joined.movedim(0, axis)
        return outputs

    def pull_back(self, cotangents: Mapping[int, Tensor]) -> Iterator[MaterializedGradients]:
        """One part a chunk."""
        wanted = [k for k, position in enumerate(self._positions) if position in cotangents]
        batch_first = [self._batch_first(cotangents[self._positions[k]], self._positions[k]) for k in wanted]

        def one(rows: tuple[Tensor, ...], cotangent: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], Any]:
            def outputs_of(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
                tensors = self._one(parameters, rows)
                return tuple(tensors[k] for k in wanted)

            pulled = vjp(outputs_of, self._parameters)
            outputs, back = pulled[0], pulled[1]
            return back(cotangent)[0], outputs

        for chunk in self._chunks:
            cotangent = tuple(c[chunk.rows] for c in batch_first)
            with (
                chunk.random_state.replayed(),
                self._call.without_autocast(),
                self._call.as_when_called(),
                _vmappable_attention(),
            ):
                gradients, again = vmap(one, randomness="different")(self._batch.rows(chunk.rows).row_leaves, cotangent)
            for k, second in zip(wanted, again, strict=True):
                _refuse_another_output(chunk.fingerprints[k], second)
            yield MaterializedGradients(tensors=gradients, accumulate_dtype=self._accumulate_dtype)

    def _one(self, parameters: Mapping[str, Tensor], rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One example's output tensors, without their batch axis."""
        batch = self._batch.with_row_leaves(tuple(row.unsqueeze(0) for row in rows), size=1)
        leaves = self._layout.leaves(self._call(parameters, batch))
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = []
        for position in self._positions:
            axis = self._layout.axes[position]
            tensors.append(leaves[position] if axis is None else leaves[position].squeeze(axis))
        return tuple(tensors)

    def _batch_first(self, tensor: Tensor, position: int) -> Tensor:
        axis = self._layout.axes[position]
        return tensor if axis is None else tensor.movedim(axis, 0)


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Examples that went through together: which, with what randomness, and what came out."""

    rows: slice
    random_state: RandomState
    fingerprints: list[Tensor]


def _fingerprint(tensor: Tensor) -> Tensor:
    """Two numbers an example, [n, 2]: enough to notice another output without keeping this one."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)
    if not is_differentiable(rows):
        return rows.new_empty(0)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    ramp = torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
    # A product and a sum rather than a matrix product, which autocast would compute in half precision.
    return torch.stack([(rows * ramp).sum(1), torch.linalg.vector_norm(rows, dim=1)], dim=1)


def _refuse_another_output(first: Tensor, tensor: Tensor) -> None:
    """The second forward must be the first one: otherwise the gradients belong to something else."""
    second = _fingerprint(tensor)
    tolerance = torch.finfo(tensor.dtype).eps ** 0.5
    if not torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ModelError(
            "The model gave another output when it was run again with the same inputs and the same random "
            "state, so its gradients would not belong to its outputs. Draw random numbers with torch's "
            "default generators, keep no state in forward, and write to neither weights nor batch between "
            "forward and step; or use engine='loop'."
        )


@contextmanager
def _vmappable_attention() -> Iterator[None]:
    """Attention by batched matrix products: fused kernels have no batching rule and would run one by one."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
