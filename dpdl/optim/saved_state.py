"""Whether a saved state of the wrapped optimizer fits, looked at before anything is loaded.

`torch.optim.Optimizer.load_state_dict` takes nearly everything and fails at the next step, when a release was spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import CheckpointError

__all__ = ["refuse_unfit_state"]


def refuse_unfit_state(state: Mapping[str, Any], name: object, inner: torch.optim.Optimizer) -> None:
    """Raise unless `inner` can go on from `state`.

    Args:
        state: what the wrapped optimizer's `state_dict` returned.
        name: of the optimizer that it was saved from.
        inner: the optimizer that it is for.

    Raises:
        CheckpointError: it is another optimizer's, has other parameter groups or settings, or is damaged.
    """
    groups = state.get("param_groups")
    if name != type(inner).__name__ or not isinstance(groups, list) or not isinstance(state.get("state"), dict):
        raise CheckpointError(
            f"The state was saved from the optimizer {name}, but this run has {type(inner).__name__}."
        )
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        raise CheckpointError("The optimizer's state is damaged: a parameter group has no list of parameters.")
    saved = [len(group["params"]) for group in groups]
    mine = [len(group["params"]) for group in inner.param_groups]
    if saved != mine:
        raise CheckpointError(
            f"The optimizer's state has parameter groups of {saved} parameters, but this optimizer has {mine}. "
            "Build the optimizer as for the saved run."
        )
    parameters: dict[int, Tensor] = {}
    for k, (group, own) in enumerate(zip(groups, inner.param_groups, strict=True)):
        _refuse_other_settings(k, group, own)
        for number, parameter in zip(group["params"], own["params"], strict=True):
            if type(number) is not int or number in parameters:
                raise CheckpointError(f"The optimizer's state is damaged: parameter {number!r} in group {k}.")
            parameters[number] = parameter
    for number, values in state["state"].items():
        _refuse_other_values(number, values, parameters)


def _refuse_other_settings(k: int, group: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    # A scheduler adds settings of its own ("initial_lr"), so there may be more; none may be missing.
    for setting, mine in own.items():
        if setting in ("params", "initial_lr", "param_names", "swa_lr"):
            continue
        if setting not in group:
            raise CheckpointError(
                f"The optimizer's state has no {setting!r} in group {k}. Build the optimizer as for the saved run."
            )
        saved = group[setting]
        if not (_is_number(saved) and _is_number(mine)) and not (
            saved is None or mine is None or isinstance(saved, type(mine)) or isinstance(mine, type(saved))
        ):
            raise CheckpointError(f"The optimizer's state is damaged: {setting} = {saved!r} in group {k}.")


def _refuse_other_values(number: object, values: object, parameters: Mapping[int, Tensor]) -> None:
    parameter = parameters.get(number) if type(number) is int else None
    if parameter is None or not isinstance(values, dict):
        raise CheckpointError(f"The optimizer's state is damaged: it has values for parameter {number!r}.")
    for what, value in values.items():
        # One number, as many as the parameter has, or one for each row or column (Adafactor).
        fits = not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 1
        if not fits and isinstance(value, Tensor) and value.ndim == parameter.ndim:
            fits = all(size in (1, own) for size, own in zip(value.shape, parameter.shape, strict=True))
        if not fits:
            raise CheckpointError(
                f"The optimizer's state is damaged, or of another model: {what} of parameter {number} has shape "
                f"{tuple(value.shape)}, the parameter {tuple(parameter.shape)}."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
