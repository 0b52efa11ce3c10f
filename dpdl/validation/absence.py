"""Finds modules that compute an example otherwise when another one is not there.

Exchanging an example does not show everything: experts of limited capacity keep the later ones out whatever the earlier
ones are, as long as they choose the same expert. Adding or removing one example is what a privacy guarantee is about.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import FrozenCall
from dpdl.per_sample.isolation import Finding
from dpdl.per_sample.randomness import RandomState
from dpdl.validation.measurement import in_mode

__all__ = ["find_effects_of_absence"]

# Batches of other sizes may take other kernels, which round otherwise. Relative to the largest value.
LEAST_TOLERANCE, ROUNDINGS = 1e-4, 32


def find_effects_of_absence(model: nn.Module, batch: ExampleBatch) -> list[Finding]:
    """The modules that change what they compute for others when the first example is left out.

    The model runs twice, in eval mode: random numbers (dropout) are drawn by the shape of the batch. Where some are
    drawn all the same, nothing is found. Parameters, buffers and torch's random state are left as they were.

    Args:
        model: the model.
        batch: at least two examples.

    Returns:
        Findings, innermost modules first; an empty list if the model's outputs stay.
    """
    state = RandomState(batch.device)
    with in_mode(model, "eval"):
        all_there = _run(model, batch, state)
        one_missing = _run(model, batch.rows(slice(1, None)), state)
    if all_there.random or one_missing.random:
        return []
    if not all_there.calls or _stays(all_there.calls[-1].outputs, one_missing.calls[-1].outputs, size=batch.size):
        return []
    culprits: list[str] = []
    for a, b in zip(all_there.calls, one_missing.calls, strict=False):
        if a.name != b.name:
            break  # control flow depends on the data; what follows cannot be compared call by call
        moved = not _stays(a.outputs, b.outputs, size=batch.size)
        inside = [name for name in culprits if name.startswith(f"{a.name}." if a.name else "")]
        if moved and not inside and a.name not in culprits and _stays(a.inputs, b.inputs, size=batch.size):
            culprits.append(a.name)
    return [
        Finding(
            module=name,
            type_name=type(model.get_submodule(name)).__name__,
            kind="mixes examples",
            detail="leaving out one example changed what it computes for others.",
            remedy="Compute each example as if it were alone: no capacities, counts or places in the batch.",
        )
        for name in culprits or [""]
    ]


@dataclass(frozen=True, kw_only=True)
class _Call:
    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The calls of a model's modules in order of their end, the model itself last; were random numbers drawn?"""

    calls: list[_Call]
    random: bool


def _run(model: nn.Module, rows: ExampleBatch, state: RandomState) -> _Run:
    calls: list[_Call] = []
    pending: list[list[Tensor]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        pending.append(_copies((args, kwargs)))

    def after(name: str, output: Any) -> None:
        calls.append(_Call(name=name, inputs=pending.pop(), outputs=_copies(output)))

    with ExitStack() as handles, torch.enable_grad(), state.replayed():
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            handles.callback(handle.remove)
            handle = module.register_forward_hook(lambda _m, _i, output, name=name: after(name, output))
            handles.callback(handle.remove)
        FrozenCall(model, {}, copy_parameters=True)({}, rows.copy())
        return _Run(calls=calls, random=state.has_moved())


def _copies(tree: Any) -> list[Tensor]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    # What lives inside of a vmap of the model's own cannot be taken out of it.
    return [t.detach().clone() for t in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(t)]


def _stays(all_there: list[Tensor], one_missing: list[Tensor], *, size: int) -> bool:
    """Whether the examples that are in both have the same values, in each tensor that carries the batch."""
    for a, b in zip(all_there, one_missing, strict=False):
        axes = [axis for axis in range(min(a.ndim, b.ndim)) if a.shape[axis] != b.shape[axis]]
        if a.ndim != b.ndim or len(axes) != 1 or not a.is_floating_point():
            continue
        (axis,) = axes
        each, rest = divmod(a.shape[axis], size)
        if rest or b.shape[axis] != each * (size - 1):
            continue
        kept = a.narrow(axis, each, b.shape[axis]).double().nan_to_num()
        tolerance = max(LEAST_TOLERANCE, ROUNDINGS * torch.finfo(a.dtype).eps)
        if kept.numel() and float((kept - b.double().nan_to_num()).abs().max()) > tolerance * float(kept.abs().max()):
            return False
    return True
