"""Checkpoints of a facade run: Opacus's keys, plain weight names, and with which noise the run was.

The file reads with `torch.load(path, weights_only=True)`. It holds no noise key: a resumed run draws fresh noise. What
was spent is restored and never forgotten; to go on with less noise than was saved is refused.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpdl.compat.opacus.accountants import IAccountant
from dpdl.compat.opacus.optimizers.optimizer import DPOptimizer
from dpdl.errors import CheckpointError, PrivacyWarning

__all__ = ["Saved", "load", "save"]

_PREFIX = "_module."
_PRIVATE = "privacy_settings"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What is saved, and loaded into.

    Attributes:
        module: wrapped or plain.
        accountant: the engine's.
        optimizer, noise_scheduler, grad_clip_scheduler: None for none.
    """

    module: nn.Module
    accountant: IAccountant
    optimizer: DPOptimizer | None
    noise_scheduler: Any
    grad_clip_scheduler: Any


def save(
    path: Any, what: Saved, *, extra: dict[str, Any], module_kwargs: dict[str, Any], torch_kwargs: dict[str, Any]
) -> None:
    """Write a checkpoint.

    Args:
        path: a file name or an open binary file.
        what: the run.
        extra: more to save; plain values and tensors.
        module_kwargs: for `module.state_dict`.
        torch_kwargs: for `torch.save`.
    """
    weights = what.module.state_dict(**module_kwargs)
    state = {
        **extra,
        "module_state_dict": {name.removeprefix(_PREFIX): value for name, value in weights.items()},
        "privacy_accountant_state_dict": dict(what.accountant.state_dict()),
    }
    if what.optimizer is not None:
        state["optimizer_state_dict"] = what.optimizer.state_dict()
        state[_PRIVATE] = _settings(what.optimizer)
    for key, scheduler in _schedulers(what):
        if scheduler is not None:
            state[key] = scheduler.state_dict()
    torch.save(state, path, **torch_kwargs)


def load(path: Any, into: Saved, *, module_kwargs: dict[str, Any], torch_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint into a run.

    Args:
        path: a file name or an open binary file.
        into: the run, built as the saved one was.
        module_kwargs: for `module.load_state_dict`.
        torch_kwargs: for `torch.load`, which reads plain values only unless told otherwise.

    Returns:
        What the file holds, apart from optimizer and schedules.

    Raises:
        CheckpointError: the file is something else, was saved with more noise, or of another run; nothing was changed.
    """
    state = _read(path, torch_kwargs)
    history = state["privacy_accountant_state_dict"]
    _refuse_forgetting(into.accountant, history)
    settings = state.get(_PRIVATE)
    if into.optimizer is not None and settings is not None:
        _refuse_less_noise(into.optimizer, settings)
    # From here on nothing of ours is refused.
    weights = state["module_state_dict"]
    wrapped = any(True for name in into.module._modules if name == "_module")
    prefix = _PREFIX if wrapped else ""
    plain = {prefix + name.removeprefix(_PREFIX): value for name, value in weights.items()}
    into.module.load_state_dict(plain, **module_kwargs)
    into.accountant.load_state_dict(history)
    optimizer = state.pop("optimizer_state_dict", None)
    if into.optimizer is not None and optimizer:
        into.optimizer.load_state_dict(optimizer)
    elif (into.optimizer is None) != (not optimizer):
        warnings.warn(
            f"The checkpoint has {'an' if optimizer else 'no'} optimizer state, but "
            f"{'no' if into.optimizer is None else 'an'} optimizer was given. It was left as it is.",
            PrivacyWarning,
            stacklevel=4,
        )
    for key, scheduler in _schedulers(into):
        saved = state.pop(key, None)
        if scheduler is not None and saved:
            scheduler.load_state_dict(saved)
    return state


def _schedulers(what: Saved) -> list[tuple[str, Any]]:
    return [
        ("noise_scheduler_state_dict", what.noise_scheduler),
        ("grad_clip_scheduler_state_dict", what.grad_clip_scheduler),
    ]


def _settings(optimizer: DPOptimizer) -> dict[str, Any]:
    return {
        "noise_multiplier": float(optimizer.noise_multiplier),
        "max_grad_norm": optimizer.max_grad_norm,
        "expected_batch_size": optimizer.expected_batch_size,
    }


def _read(path: Any, torch_kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        state = torch.load(path, **{"weights_only": True, **torch_kwargs})
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"The checkpoint cannot be read ({type(error).__name__}: {error}). If it holds objects of your own and you "
            'trust it, pass torch_load_kwargs={"weights_only": False}.'
        ) from error
    needed = ("module_state_dict", "privacy_accountant_state_dict")
    if not isinstance(state, dict) or any(not isinstance(state.get(key), dict) for key in needed):
        raise CheckpointError(f"The file is not a checkpoint of a private run: it has no {' or no '.join(needed)}.")
    return state


def _refuse_forgetting(accountant: IAccountant, saved: dict[str, Any]) -> None:
    if accountant.history and list(map(tuple, saved.get("history", []))) != accountant.history:
        raise CheckpointError(
            f"This engine has accounted for {accountant.history} already, which loading the checkpoint would forget. "
            "Load into an engine that has spent nothing, or go on without loading."
        )


def _refuse_less_noise(optimizer: DPOptimizer, saved: dict[str, Any]) -> None:
    before = saved["noise_multiplier"]
    if optimizer.noise_multiplier < before:
        raise CheckpointError(
            f"The checkpoint was saved with noise_multiplier {before}, but this run has {optimizer.noise_multiplier}. "
            f"Make it private with noise_multiplier={before} or more."
        )
    now = _settings(optimizer)
    differing = {key: (saved.get(key), now[key]) for key in now if saved.get(key) != now[key]}
    if differing:
        warnings.warn(
            f"The run goes on with other settings than it was saved with (saved, now): {differing}. Each step is "
            "accounted for with the noise it has.",
            PrivacyWarning,
            stacklevel=5,
        )
