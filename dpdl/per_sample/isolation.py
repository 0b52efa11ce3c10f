"""Finds modules in which one example reaches another, by running the model and watching.

The model is run on a few examples, then again with the last or the first exchanged, all else equal (random
numbers too). Whatever changes for the other examples has crossed over. No list of classes is involved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpdl.errors import ExampleMixingError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.compiled import refuse_compiled
from dpdl.per_sample.engine import FrozenCall, is_differentiable
from dpdl.per_sample.randomness import RandomState

__all__ = ["EXAMPLES", "Finding", "find_mixing", "find_mixing_in_a_crowd", "refuse_mixing", "with_one_exchanged"]

# Examples run together. Two would do; more show effects that need a crowd.
EXAMPLES = 4
# Relative change of another example's value that counts, in units of rounding. Runs of equal shape take the same
# kernels, which add up each example's numbers in the same order: what does not cross over is the same to the bit.
# Where a second run of the same examples is not (atomic additions on a GPU), less can be seen.
ROUNDINGS = 16
TOLERANCE_IF_NOT_REPRODUCIBLE = 1e-4

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

    The model runs in the mode that it is in, five times, on a few examples; its parameters, buffers and
    torch's random state are left as they were. Whether examples mix is decided by the model's outputs; the
    calls inside only tell where. A model whose only output is its own loss is judged by the calls inside.

    Args:
        module: the model.
        batch: at least one example; a single one is given a made-up neighbour.

    Returns:
        Findings, innermost module first; an empty list if the examples stay apart.
    """
    refuse_compiled(module)
    rows = batch.rows(slice(0, EXAMPLES)) if batch.size > 1 else _with_a_neighbour(batch)
    longer = rows.with_row_leaves(tuple(torch.cat([r, r[:1]]) for r in rows.row_leaves), size=rows.size + 1)
    state = RandomState(batch.device)
    base = _watched_run(module, rows, state)
    more = _watched_run(module, longer, state)
    exact = _equal(base.outputs, _watched_run(module, rows, state).outputs)
    findings = [_state_finding(module, name) for name in base.written]
    # What passes on from example to example in order shows for one end of the batch only.
    for exchanged in (rows.size - 1, 0):
        other = _watched_run(module, with_one_exchanged(rows, exchanged), state)
        kept = slice(0, rows.size - 1) if exchanged else slice(1, rows.size)
        culprits = _culprits(base, other, more, size=rows.size, kept=kept, exact=exact)
        kept_apart = _stays(base.outputs, other.outputs, more.outputs, size=rows.size, kept=kept, exact=exact)
        if kept_apart is False or (kept_apart is None and culprits):
            return findings + [_mixing_finding(module, name) for name in culprits or [""]]
    return findings


def find_mixing_in_a_crowd(module: nn.Module, batch: ExampleBatch) -> list[Finding]:
    """The same, judged by the model's outputs for a whole batch: shows what only many examples bring out.

    Three forwards of the batch without a graph, one with its middle example exchanged.
    """
    if batch.size < 2:
        return []
    state, position = RandomState(batch.device), batch.size // 2
    frozen = FrozenCall(module, {}, copy_parameters=True)
    outputs = []
    rows = batch.copy()
    versions = [leaf._version for leaf in rows.row_leaves]
    for exchange in (False, False, True):
        if [leaf._version for leaf in rows.row_leaves] != versions:
            rows = batch.copy()  # the model works in place on its input
        if exchange:
            _exchange(rows, position)
        with torch.enable_grad(), state.replayed():
            outputs.append([t.detach() for t in tree_leaves(frozen({}, rows)) if isinstance(t, Tensor)])
    written = frozen.written_state()
    if written:
        return [_state_finding(module, name) for name in written]
    first, again, exchanged = outputs
    exact = _equal(first, again)
    for base, other in zip(first, exchanged, strict=False):
        axes = [axis for axis in range(base.ndim) if base.shape[axis] == batch.size]
        if base.shape != other.shape or not axes:
            continue
        others = [i for i in range(batch.size) if i != position]
        index = torch.tensor(others, device=base.device)
        pairs = [(base.index_select(axis, index), other.index_select(axis, index)) for axis in axes]
        if all(_differs(a, b, exact=exact) for a, b in pairs):
            return find_mixing(module, batch) or [_mixing_finding(module, "")]
    return []


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of a submodule: its tensors before and after."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """One run of the model: its calls in order of their end, its outputs, and what of its state it wrote to."""

    calls: list[_Call]
    outputs: list[Tensor]
    written: list[str]


def _watched_run(module: nn.Module, rows: ExampleBatch, state: RandomState) -> _Watched:
    calls: list[_Call] = []
    frozen = FrozenCall(module, {}, copy_parameters=True)
    with _watching(module, calls), torch.enable_grad(), state.replayed():
        outputs = _copies(frozen({}, rows.copy()))
    return _Watched(calls=calls, outputs=outputs, written=frozen.written_state())


def _culprits(base: _Watched, other: _Watched, more: _Watched, *, size: int, kept: slice, exact: bool) -> list[str]:
    """Modules whose outputs for other examples moved although their inputs did not; innermost only."""
    culprits: list[str] = []
    for a, b, c in zip(base.calls, other.calls, more.calls, strict=False):
        if not a.name == b.name == c.name:
            break  # control flow depends on the data; what follows cannot be compared call by call
        moved = _stays(a.outputs, b.outputs, c.outputs, size=size, kept=kept, exact=exact) is False
        brought_in = _stays(a.inputs, b.inputs, c.inputs, size=size, kept=kept, exact=exact) is False
        inside = [name for name in culprits if name.startswith(f"{a.name}." if a.name else "")]
        if moved and not brought_in and not inside and a.name not in culprits:
            culprits.append(a.name)
    return culprits


def _stays(
    base: list[Tensor], other: list[Tensor], more: list[Tensor], *, size: int, kept: slice, exact: bool
) -> bool | None:
    """Whether the `kept` of `size` examples have the same values; None if no tensor carries the batch.

    The batch axis of a tensor is the one that grew when there was one example more.
    """
    seen = False
    for a, b, c in zip(base, other, more, strict=False):
        if a.ndim != c.ndim or a.shape != b.shape:
            continue
        grown = [axis for axis in range(a.ndim) if a.shape[axis] != c.shape[axis]]
        if len(grown) != 1 or a.shape[grown[0]] % size:
            continue
        seen = True
        each = a.shape[grown[0]] // size
        start, length = kept.start * each, (kept.stop - kept.start) * each
        if _differs(a.narrow(grown[0], start, length), b.narrow(grown[0], start, length), exact=exact):
            return False
    return True if seen else None


@contextmanager
def _watching(module: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Record inputs before and outputs after each submodule's forward."""
    pending: list[list[Tensor]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        pending.append(_copies((args, kwargs)))

    def after(name: str, output: Any) -> None:
        calls.append(_Call(name=name, inputs=pending.pop(), outputs=_copies(output)))

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
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    # What lives inside of a vmap of the model's own cannot be taken out of it.
    return [t.detach().clone() for t in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(t)]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


def _differs(a: Tensor, b: Tensor, *, exact: bool) -> bool:
    if not is_differentiable(a):
        return not torch.equal(a, b)
    tolerance = ROUNDINGS * torch.finfo(a.dtype).eps if exact else TOLERANCE_IF_NOT_REPRODUCIBLE
    scale = a.nan_to_num().abs().max() if a.numel() else a.new_zeros(())
    return not torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(scale), equal_nan=True)


def with_one_exchanged(rows: ExampleBatch, position: int) -> ExampleBatch:
    """The same examples, but the one at `position` is another: a neighbour's values, turned and stretched."""
    exchanged = rows.copy()
    _exchange(exchanged, position)
    return exchanged


def _exchange(rows: ExampleBatch, position: int) -> None:
    """Put another example in place of the one at `position`, into the same tensors."""
    leaves = rows.row_leaves
    others = _another([leaf[0 if position else 1] for leaf in leaves], instead_of=[leaf[position] for leaf in leaves])
    for leaf, other in zip(leaves, others, strict=True):
        leaf[position] = other


def _with_a_neighbour(single: ExampleBatch) -> ExampleBatch:
    only = [leaf[0] for leaf in single.row_leaves]
    others = _another(only, instead_of=only)
    pairs = tuple(torch.stack([leaf, other]) for leaf, other in zip(only, others, strict=True))
    return single.with_row_leaves(pairs, size=2)


def _another(example: list[Tensor], *, instead_of: list[Tensor]) -> list[Tensor]:
    """Other values of the same kind than `instead_of`: real numbers of `example` turned round and stretched.

    Integers (tokens, coordinates) mean something by their order: they are taken as they are, unless nothing else would
    be different.
    """
    other = [_turned(leaf) * 1.5 + 0.25 if is_differentiable(leaf) else leaf for leaf in example]
    if all(torch.equal(a, b) for a, b in zip(other, instead_of, strict=True)):
        return [_turned(leaf) for leaf in other]
    return other


def _turned(example: Tensor) -> Tensor:
    return example.flatten().flip(0).view(example.shape)


def _mixing_finding(module: nn.Module, name: str) -> Finding:
    child = module.get_submodule(name)
    return Finding(
        module=name,
        type_name=type(child).__name__,
        kind="mixes examples",
        detail="exchanging one example changed what it computes for others.",
        remedy=_remedy(child),
    )


def _state_finding(module: nn.Module, name: str) -> Finding:
    owner, _, short = name.rpartition(".")
    child = module.get_submodule(owner)
    what = "parameter" if short in child._parameters else "buffer"  # which may be there no longer
    return Finding(
        module=owner,
        type_name=type(child).__name__,
        kind="keeps state",
        detail=f"its forward writes to the {what} '{short}', which the saved model would show un-noised.",
        remedy=_remedy(child),
    )


def _remedy(child: nn.Module) -> str:
    if isinstance(child, BATCH_NORMS):
        return (
            "Replace it by a normalisation of each example's own, such as nn.GroupNorm: dpdl.fix(model) does. Or "
            "freeze it: keep it in eval() and its parameters out of the optimizer."
        )
    if isinstance(child, nn.modules.instancenorm._InstanceNorm):
        return "Set track_running_stats=False."
    if isinstance(child, (nn.Embedding, nn.EmbeddingBag)):
        return "Set max_norm=None."
    return "Compute statistics within one example (over its own positions or channels), and keep no state."
