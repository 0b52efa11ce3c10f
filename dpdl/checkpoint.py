"""A private run on disk: weights with plain names, optimizer, schedule, ledger and position, in one file."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_flatten, tree_map

from dpdl.checkpoint_format import read_tree, write_tree
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
    """Save a run; the file appears whole or not at all, and is read back before it replaces another.

    A logical batch that is half done is not saved: nothing of it was released, and it is drawn again.

    The file reads with `torch.load(path, weights_only=True)`, or, if its name ends in ".safetensors", is in that format
    (`pip install dpdl[safetensors]`). It holds no noise key: whoever has it cannot subtract noise. It is as private as
    the weights are, which is what the report says.

    Args:
        path: where to. A file that is there is replaced.
        model, optimizer: what `make_private` returned.
        scheduler: a learning-rate scheduler, if there is one.
        extra: plain values and tensors of your own.

    Raises:
        CheckpointError: it cannot be written there, `extra` holds more than plain values and tensors, or safetensors is
            not installed.
    """
    state = {
        "model": model.state_dict(),
        "optimizer": tree_map(_plain_number, optimizer.state_dict()),
        "scheduler": None if scheduler is None else tree_map(_plain_number, scheduler.state_dict()),
        "extra": extra or {},
    }
    target = Path(os.path.realpath(path))  # what a link points to, not the link
    try:
        _write({"schema": _SCHEMA, "sha256": _digest(state), **state}, target)
    except (OSError, RuntimeError) as error:  # torch has its own, for a full disk
        raise CheckpointError(
            f"The checkpoint {target} could not be written: {error}. What was there before is as it was. Give a "
            "path in a folder that exists and has room."
        ) from error


def _write(tree: dict[str, Any], target: Path) -> None:
    """The tree in a file of that name, whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write_tree(tree, Path(temporary), named=target)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _read(temporary, named=target)
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
    state = _read(path, named=Path(path))
    if (scheduler is None) != (state["scheduler"] is None):
        raise CheckpointError(
            f"The checkpoint was saved {'without' if state['scheduler'] is None else 'with'} a scheduler. "
            "Pass the same to load_checkpoint."
        )
    expected, saved = _shapes(model.state_dict()), _shapes(state["model"])
    if expected != saved:
        differing = sorted(n for n in expected.keys() | saved.keys() if expected.get(n) != saved.get(n))
        raise CheckpointError(f"The checkpoint is of another model: {differing[:5]} differ in name or shape.")
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    extra: dict[str, Any] = state["extra"]
    return extra


def _read(path: str | os.PathLike[str], *, named: Path) -> dict[str, Any]:
    """The saved state, if it is whole."""
    state = read_tree(path, named=named)
    parts: dict[str, type | tuple[type, ...]] = {
        "model": dict,
        "optimizer": dict,
        "scheduler": (dict, type(None)),
        "extra": dict,
    }
    if not isinstance(state, dict) or state.get("schema") != _SCHEMA:
        raise CheckpointError(f"{path} is not a checkpoint of a private run (schema {_SCHEMA}).")
    if set(state) != {"schema", "sha256", *parts} or not all(isinstance(state[k], t) for k, t in parts.items()):
        raise CheckpointError(f"The checkpoint {path} is incomplete: expected {sorted(parts)}.")
    if _digest({name: state[name] for name in parts}) != state["sha256"]:
        raise CheckpointError(f"The checkpoint {path} is damaged: its contents do not match their checksum.")
    return state


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 over the structure, values, and tensors' bytes."""
    leaves, spec = tree_flatten(state)
    digest = hashlib.sha256(repr(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}


def _plain_number(value: Any) -> Any:
    """Settings given as numpy numbers would make the file unreadable without trusting it."""
    return value.item() if isinstance(value, np.generic) else value
