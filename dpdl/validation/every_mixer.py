"""Names the modules that mix examples behind others that do.

Once examples have met, exchanging one moves all others, and what comes after can no longer be judged by the model's
run. So each module is judged by itself, on the inputs that it was given.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import FrozenCall
from dpdl.per_sample.isolation import EXAMPLES, Finding, find_mixing
from dpdl.per_sample.randomness import RandomState

__all__ = ["find_every_mixer"]

# A module that is handed the batch's size as a number, say, cannot be run by itself on one example more.
NOT_BY_ITSELF = (IndexError, ModelError, RuntimeError, TypeError, ValueError)


def find_every_mixer(model: nn.Module, batch: ExampleBatch, known: list[Finding]) -> list[Finding]:
    """The modules that mix examples besides those that are known, innermost first.

    A module around another one that mixes is not judged: what it adds shows once the inner one is gone. Nor is one
    whose inputs do not all have the examples first.

    Args:
        model: left as it is; runs twice, and each of its modules several times, on a few examples.
        batch: at least two examples.
        known: findings that need not come again.
    """
    rows = batch.rows(slice(0, EXAMPLES))
    longer = rows.with_row_leaves(tuple(torch.cat([r, r[:1]]) for r in rows.row_leaves), size=rows.size + 1)
    state = RandomState(batch.device)
    calls, longer_calls = (_first_calls(model, each, state) for each in (rows, longer))
    found: list[Finding] = []
    for name, module in reversed(list(model.named_modules())):
        mixers = [finding.module for finding in (*known, *found) if finding.kind == "mixes examples"]
        if not name or name not in calls or any(mixer == name or mixer.startswith(f"{name}.") for mixer in mixers):
            continue
        if not _has_examples_first(calls[name], longer_calls.get(name), size=rows.size):
            continue
        args, kwargs = calls[name]
        try:
            inside = find_mixing(module, ExampleBatch.from_call(args, kwargs, size=rows.size))
        except NOT_BY_ITSELF:
            continue
        found += [
            replace(finding, module=f"{name}.{finding.module}" if finding.module else name)
            for finding in inside
            if finding.kind == "mixes examples"
        ]
    return found[::-1]


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _first_calls(model: nn.Module, rows: ExampleBatch, state: RandomState) -> dict[str, Call]:
    calls: dict[str, Call] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in calls:
            leaves, spec = tree_flatten((args, kwargs))
            copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            calls[name] = tree_unflatten(copies, spec)

    with ExitStack() as handles, torch.enable_grad(), state.replayed():
        for name, module in model.named_modules():
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
            )
            handles.callback(handle.remove)
        FrozenCall(model, {}, copy_parameters=True)({}, rows.copy())
    return calls


def _has_examples_first(call: Call, longer: Call | None, *, size: int) -> bool:
    """Whether, with one example more, each tensor that the module was given had one row more."""
    if longer is None:
        return False
    pairs = list(zip(tree_leaves(call), tree_leaves(longer), strict=False))
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim and b.ndim]
    return bool(tensors) and all(len(a) == size and len(b) == size + 1 for a, b in tensors)
