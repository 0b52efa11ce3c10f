"""Which engine runs a model: the one asked for, or the fastest that can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpdl.errors import ModelError
from dpdl.execution import EngineName
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, is_differentiable
from dpdl.per_sample.loop import LoopEngine
from dpdl.per_sample.vmap import VmapEngine

__all__ = ["Selection", "select_engine"]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """An engine, and why it is this one.

    Attributes:
        engine: ready to run.
        note: for the report; empty unless "auto" fell back to a slower engine.
    """

    engine: Engine
    note: str = ""


def select_engine(
    name: EngineName,
    module: nn.Module,
    batch: ExampleBatch,
    trainable: Mapping[str, Tensor],
    *,
    accumulate_dtype: torch.dtype = torch.float32,
    chunk_size: int | None = None,
) -> Selection:
    """The engine `name` for this model, tried on the first rows of a batch.

    "auto" is vmap where it can run the model, otherwise loop, with a note that says why.

    Raises:
        ModelError: engine "vmap" was asked for and cannot run the model.
    """
    loop = LoopEngine(module, accumulate_dtype=accumulate_dtype)
    if name == "loop":
        return Selection(engine=loop)
    vmap = VmapEngine(module, accumulate_dtype=accumulate_dtype, chunk_size=chunk_size)
    trial = batch.rows(slice(0, 1)) if batch.size else batch.zero_rows(1)
    try:
        _try(vmap, trial, trainable)
    except ModelError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # whatever vmap meets in user code
        _try(loop, trial, trainable)  # a model that is broken in itself fails here, in its own words
        reason = str(error).split("\n")[0].split(". ")[0]
        if name == "vmap":
            raise ModelError(
                f"Engine 'vmap' cannot run this model: {reason}. Use Execution(engine='auto') or "
                "engine='loop', which run it one example at a time."
            ) from error
        return Selection(engine=loop, note=f"engine loop instead of vmap, which cannot run the model: {reason}")
    return Selection(engine=vmap)


def _try(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> None:
    """One forward and backward, results thrown away."""
    forward = engine.forward(rows, trainable)
    cotangents = {i: torch.ones_like(leaf) for i, leaf in enumerate(forward.outputs) if is_differentiable(leaf)}
    for part in forward.pull_back(cotangents):
        part.norms()
