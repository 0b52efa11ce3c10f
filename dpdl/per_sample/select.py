"""Which engine runs a model: the one asked for, or the fastest that can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpdl.errors import EngineMismatchError, ModelError
from dpdl.execution import EngineName
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import Engine, is_differentiable
from dpdl.per_sample.loop import LoopEngine
from dpdl.per_sample.self_check import refuse_mismatch
from dpdl.per_sample.tape import TapeEngine
from dpdl.per_sample.tape.refusal import TapeRefusal
from dpdl.per_sample.vmap import VmapEngine

__all__ = ["Selection", "select_engine", "why_not"]


TRIAL_EXAMPLES = 2  # as many as show whether the engine can run the model; each costs time before the first step


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
    checked: bool = True,
    refused: Mapping[str, str] | None = None,
) -> Selection:
    """The engine `name` for this model, tried on the first rows of a batch.

    "auto" is the first of tape, vmap and loop that can run the model and agrees with one-at-a-time autograd, with a
    note that says why not an earlier one. The tape computes examples together: it rests on the checks.

    Args:
        checked: whether the model and the engine are checked.
        refused: engines that have turned out not to serve, and why.

    Raises:
        ModelError: the engine asked for cannot run the model.
        EngineMismatchError: it can, and is wrong.
    """
    loop = LoopEngine(module, accumulate_dtype=accumulate_dtype)
    tape = TapeEngine(module, accumulate_dtype=accumulate_dtype)
    vmap = VmapEngine(module, accumulate_dtype=accumulate_dtype, chunk_size=chunk_size)
    every: tuple[Engine, ...] = (tape, vmap, loop)
    candidates = [engine for engine in every if name in ("auto", engine.name)]
    reasons = dict(refused or {})
    if name == "auto" and not checked:
        reasons["tape"] = "self_check=False, and it relies on the check that examples are kept apart"
    for engine in candidates:
        if engine.name in reasons:
            continue
        try:
            reason = why_not(engine, batch, trainable, checked=checked)
        except EngineMismatchError as mismatch:
            if name != "auto" or engine is loop:  # what the loop disagrees with is the model's own doing
                raise
            reason = str(mismatch)
        if reason is None:
            return Selection(engine=engine, note=_note(engine, reasons))
        reasons[engine.name] = reason
    _try(loop, _trial(batch), trainable)  # a model that is broken in itself fails here, in its own words
    raise ModelError(
        f"Engine '{name}' cannot run this model: {reasons[name]}. Use Execution(engine='auto') or engine='loop', which "
        "runs it one example at a time."
    )


def why_not(
    engine: Engine, batch: ExampleBatch, trainable: Mapping[str, Tensor], *, checked: bool = True
) -> str | None:
    """Why an engine cannot run the model on such batches; None if it can.

    What the loop meets is the model's own error, and is raised.

    Raises:
        EngineMismatchError: it can, but disagrees with one-at-a-time autograd.
    """
    try:
        _try(engine, _trial(batch), trainable)
        if checked:
            refuse_mismatch(engine, batch, trainable)
    except TapeRefusal as refusal:
        return str(refusal)
    except ModelError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # whatever an engine meets in user code
        if isinstance(engine, LoopEngine):
            raise
        return str(error).split("\n")[0].split(". ")[0]
    return None


def _trial(batch: ExampleBatch) -> ExampleBatch:
    return batch.rows(slice(0, TRIAL_EXAMPLES)).copy()


def _note(engine: Engine, reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    why = "; ".join(f"{name} cannot run the model: {reason}" for name, reason in reasons.items())
    return f"engine {engine.name}, because {why}"


def _try(engine: Engine, rows: ExampleBatch, trainable: Mapping[str, Tensor]) -> None:
    """One forward and backward, results thrown away."""
    forward = engine.forward(rows, trainable)
    cotangents = {i: torch.ones_like(leaf) for i, leaf in enumerate(forward.outputs) if is_differentiable(leaf)}
    for part in forward.pull_back(cotangents):
        part.norms()
