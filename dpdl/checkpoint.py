"""A private run on disk: weights with plain names, optimizer, schedule, ledger and position, in one file."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dpdl.errors import CheckpointError
from dpdl.model import PrivateModel
from dpdl.optim import PrivateOptimizer

__all__ = ["load_checkpoint", "save_checkpoint"]

_SCHEMA = "dpdl.checkpoint/1"


def save_checkpoint(
    path: str | os.PathLike[str],
    model: PrivateModel,
    optimizer: PrivateOptimizer,
    *,
    scheduler: LRScheduler | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Save a run between two steps; the file appears whole or not at all.

    The file reads with `torch.load(path, weights_only=True)`. It holds no noise key: whoever has it cannot
    subtract noise. It is as private as the weights are, which is what the report says.

    Args:
        path: where to. A file that is there is replaced.
        model, optimizer: what `make_private` returned.
        scheduler: a learning-rate scheduler, if there is one.
        extra: plain values and tensors of your own.

    Raises:
        StepError: a batch is open; save after `optimizer.step()`.
    """
    state = {
        "schema": _SCHEMA,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "extra": extra or {},
    }
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def load_checkpoint(
    path: str | os.PathLike[str],
    model: PrivateModel,
    optimizer: PrivateOptimizer,
    *,
    scheduler: LRScheduler | None = None,
) -> dict[str, Any]:
    """Go on from a saved run: weights, optimizer, schedule, ledger, and the place in the pass.

    Noise goes on with a fresh key (or, under `insecure_seed`, with the saved seed), by step number.

    Args:
        path: what `save_checkpoint` wrote.
        model, optimizer, scheduler: built as for the saved run, under the same plan.

    Returns:
        The `extra` that was saved.

    Raises:
        CheckpointError: the file is missing, damaged, or of another plan or model; nothing was changed.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint at {path}.") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("schema") != _SCHEMA:
        raise CheckpointError(f"{path} is not a checkpoint of a private run (schema {_SCHEMA}).")
    if (scheduler is None) != (state["scheduler"] is None):
        raise CheckpointError(
            f"The checkpoint was saved {'without' if state['scheduler'] is None else 'with'} a scheduler. "
            "Pass the same to load_checkpoint."
        )
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    saved = {name: tensor.shape for name, tensor in state["model"].items()}
    if expected != saved:
        differing = sorted(n for n in expected.keys() | saved.keys() if expected.get(n) != saved.get(n))
        raise CheckpointError(f"The checkpoint is of another model: {differing[:5]} differ in name or shape.")
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    extra: dict[str, Any] = state["extra"]
    return extra
