"""Finds modules in which one example reaches another, by running the model and watching.

The model is run on a few examples, then again with the last of them exchanged, all else equal (random
numbers too). Whatever changes for the other examples has crossed over. No list of classes is involved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpdl.errors import ExampleMixingError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import FrozenCall, is_differentiable
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.randomness import RandomState

__all__ = ["Finding", "find_mixing", "refuse_mixing"]

# Examples run together. Two would do; more show effects that need a crowd.
EXAMPLES = 4
# Relative change of another example's value that counts: well above what a different summation order in a
# float32 kernel does (1e-6), well below what any statistic over four examples does.
TOLERANCE = 1e-4

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place where examples are not kept apart.

    Attributes:
        module: the module's path in the model; "" for the model itself.
        type_name: its class.
        kind: "mixes examples", or "keeps state" that it updates in forward.
        detail: what was seen.
        remedy: what to do.
    """

    module: str
    type_name: str
    kind: Literal["mixes examples", "keeps state"]
    detail: str
    remedy: str

    def __str__(self) -> str:
        where = f"module '{self.module}'" if self.module else "the model itself"
        return f"{where} ({self.type_name}) {self.kind}: {self.detail} {self.remedy}"


def refuse_mixing(findings: list[Finding]) -> None:
    """Raise one error that names all findings, if there are any."""
    if findings:
        raise ExampleMixingError(
            "The model cannot be trained with per-example privacy:\n" + "\n".join(f"  - {f}" for f in findings)
        )


def find_batch_norms(module: nn.Module) -> list[Finding]:
    """Batch normalisation in training mode: known to mix without running it."""
    return [
        Finding(
            module=name,
            type_name=type(child).__name__,
            kind="mixes examples",
            detail="it normalises each example by statistics of the batch.",
            remedy=_remedy(child),
        )
        for name, child in module.named_modules()
        if isinstance(child, BATCH_NORMS) and child.training
    ]


def find_mixing(module: nn.Module, batch: ExampleBatch) -> list[Finding]:
    """Every module of `module` that mixes the examples of `batch` or keeps state from them.

    The model runs in the mode that it is in, twice, on at most four examples; its parameters, buffers and
    torch's random state are left as they were.

    Args:
        module: the model.
        batch: at least two examples.

    Returns:
        Findings, innermost module first; an empty list if the examples stay apart.
    """
    rows = batch.rows(slice(0, EXAMPLES))
    exchanged = _with_last_exchanged(rows)
    others = rows.size - 1
    state = RandomState(batch.device)
    first, before = _watched_run(module, rows, state)
    second, _ = _watched_run(module, exchanged, state)

    findings = [_state_finding(module, name) for name in before]
    culprits: list[str] = []
    for (name, inputs_a, outputs_a), (name_b, inputs_b, outputs_b) in zip(first, second, strict=False):
        if name != name_b:
            break  # control flow depends on the data; what follows cannot be compared call by call
        if _moved(outputs_a, outputs_b, rows.size, others) and not _moved(inputs_a, inputs_b, rows.size, others):
            inside = [c for c in culprits if c.startswith(f"{name}." if name else "")]
            if not inside and name not in culprits:
                culprits.append(name)
    findings += [_mixing_finding(module, name) for name in culprits]
    if not culprits and _final_output_moved(module, rows, exchanged, state):
        findings.append(_mixing_finding(module, ""))
    return findings


_Call = tuple[str, list[Tensor], list[Tensor]]


def _watched_run(module: nn.Module, rows: ExampleBatch, state: RandomState) -> tuple[list[_Call], list[str]]:
    """All calls of submodules in order of their end, and the buffers that were written to."""
    calls: list[_Call] = []
    with _watching(module, calls), torch.no_grad(), state.replayed():
        frozen = FrozenCall(module, {})
        frozen({}, rows)
    originals = dict(module.named_buffers())
    written = [n for n, b in frozen.buffers.items() if not torch.equal(b.nan_to_num(), originals[n].nan_to_num())]
    return calls, written


@contextmanager
def _watching(module: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Record inputs before and outputs after each submodule's forward."""
    pending: list[list[Tensor]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        pending.append(_copies((args, kwargs)))

    def after(name: str, output: Any) -> None:
        calls.append((name, pending.pop(), _copies(output)))

    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(child.register_forward_hook(lambda _m, _i, output, name=name: after(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies(tree: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _moved(before: list[Tensor], after: list[Tensor], size: int, others: int) -> bool:
    """Whether a value of the first `others` of `size` examples differs, in tensors with the batch first."""
    for a, b in zip(before, after, strict=False):
        if a.ndim and a.shape == b.shape and a.shape[0] % size == 0:
            rows = a.shape[0] // size * others
            if _differs(a[:rows], b[:rows]):
                return True
    return False


def _differs(a: Tensor, b: Tensor) -> bool:
    if not is_differentiable(a):
        return not torch.equal(a, b)
    scale = a.nan_to_num().abs().max() if a.numel() else a.new_zeros(())
    return not torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * float(scale), equal_nan=True)


def _final_output_moved(module: nn.Module, rows: ExampleBatch, exchanged: ExampleBatch, state: RandomState) -> bool:
    """The same question of the output alone, with the batch axis measured rather than assumed first."""
    call = FrozenCall(module, {})
    layout = OutputLayout.measure(lambda batch: call({}, batch), rows)
    with torch.no_grad():
        with state.replayed():
            a = layout.leaves(call({}, rows))
        with state.replayed():
            b = layout.leaves(call({}, exchanged))
    return any(
        axis is not None and _differs(x.narrow(axis, 0, rows.size - 1), y.narrow(axis, 0, rows.size - 1))
        for x, y, axis in zip(a, b, layout.axes, strict=True)
    )


def _with_last_exchanged(rows: ExampleBatch) -> ExampleBatch:
    """The same examples, but the last is another one: the first example's values, turned and stretched."""
    exchanged = []
    for leaf in rows.row_leaves:
        other = leaf[0].flatten().flip(0).view(leaf[0].shape)
        if is_differentiable(leaf):
            other = other * 1.5 + 0.25
        exchanged.append(torch.cat([leaf[:-1], other.unsqueeze(0)]))
    return rows.with_row_leaves(tuple(exchanged), size=rows.size)


def _mixing_finding(module: nn.Module, name: str) -> Finding:
    child = module.get_submodule(name)
    return Finding(
        module=name,
        type_name=type(child).__name__,
        kind="mixes examples",
        detail="exchanging one example changed what it computes for others.",
        remedy=_remedy(child),
    )


def _state_finding(module: nn.Module, buffer: str) -> Finding:
    owner, _, short = buffer.rpartition(".")
    child = module.get_submodule(owner)
    return Finding(
        module=owner,
        type_name=type(child).__name__,
        kind="keeps state",
        detail=f"its forward writes to the buffer '{short}', which the saved model would show un-noised.",
        remedy=_remedy(child),
    )


def _remedy(child: nn.Module) -> str:
    if isinstance(child, BATCH_NORMS):
        return (
            f"Use nn.GroupNorm({math.gcd(32, child.num_features)}, {child.num_features}), or freeze it: "
            "keep it in eval() and its parameters out of the optimizer."
        )
    if isinstance(child, nn.modules.instancenorm._InstanceNorm):
        return "Set track_running_stats=False."
    return "Compute statistics within one example (over its own positions or channels), and keep no state."
