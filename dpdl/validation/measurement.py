"""Runs a model on an example batch to see what reaches its modules, and how far its outputs move.

The model's parameters, buffers, modes and torch's random state are left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpdl.errors import ModelError, ParameterError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.engine import FrozenCall
from dpdl.per_sample.randomness import RandomState, isolated_randomness
from dpdl.validation.repair_report import Change, ModeChanges

__all__ = [
    "MODES",
    "InputShapes",
    "Mode",
    "Outputs",
    "changes_between",
    "example_rows",
    "in_mode",
    "input_shapes",
    "outputs_by_mode",
]

Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = ("eval", "train")
# What the outputs were in each mode, flattened.
Outputs = Mapping[Mode, list[Tensor]]
# The shapes that a module was given, one for each call.
InputShapes = Mapping[nn.Module, list[torch.Size]]
# A forward hook: the module, its arguments by position and by name, its output.
Note = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def example_rows(inputs: Any) -> ExampleBatch:
    """An example batch as users give it: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        ParameterError: fewer than two examples.
        ModelError: the tensors' first axes are not one batch.
    """
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    batch = ExampleBatch.from_call(args, inputs if isinstance(inputs, dict) else {})
    if batch.size < 2:
        raise ParameterError(f"example_batch must have at least two examples to exchange one, got {batch.size}.")
    return batch


def input_shapes(model: nn.Module, modules: Iterable[nn.Module], batch: ExampleBatch) -> InputShapes:
    """The shapes of the first argument of each call of some modules, in one run of the model in eval mode."""
    shapes: dict[nn.Module, list[torch.Size]] = {module: [] for module in modules}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        shapes[module] += [leaf.shape for leaf in tree_leaves((args, kwargs))[:1] if isinstance(leaf, Tensor)]

    with _watching(shapes, note):
        _run(model, batch, "eval", RandomState(batch.device))
    return shapes


def outputs_by_mode(
    model: nn.Module, batch: ExampleBatch, replacements: Mapping[nn.Module, nn.Module] | None = None
) -> tuple[Outputs, dict[nn.Module, ModeChanges]]:
    """What the model computes in either mode, and what replacements of its modules would compute in their places.

    In training mode are those parts that are so now; all, if the model is in eval mode.

    Args:
        model: the model.
        batch: the examples.
        replacements: a module of the model to what will replace it.

    Returns:
        The outputs, and for each module that was called the change of its output, the largest of all calls.
    """
    state = RandomState(batch.device)
    outputs: dict[Mode, list[Tensor]] = {}
    seen: dict[nn.Module, dict[Mode, Change]] = {}
    for mode in MODES:

        def compare(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, mode: Mode = mode
        ) -> None:
            replacement = (replacements or {})[module]
            with isolated_randomness(batch.device), in_mode(replacement, mode):
                change = _change(_tensors(output), _tensors(replacement(*args, **kwargs)))
            before = seen.setdefault(module, {}).get(mode, change)
            seen[module][mode] = max(before, change, key=lambda each: each.max_abs)

        with _watching(replacements or {}, compare):
            outputs[mode] = _run(model, batch, mode, state)
    return outputs, {module: ModeChanges(**by_mode) for module, by_mode in seen.items()}


def changes_between(before: Outputs, after: Outputs) -> ModeChanges:
    """How far the outputs moved.

    Raises:
        ModelError: there are others than before, or of another shape.
    """
    return ModeChanges(**{mode: _change(before[mode], after[mode]) for mode in MODES})


def _change(before: list[Tensor], after: list[Tensor]) -> Change:
    if [t.shape for t in before] != [t.shape for t in after]:
        raise ModelError(
            f"The replacement gives outputs of shapes {[tuple(t.shape) for t in after]} where they were "
            f"{[tuple(t.shape) for t in before]}. Replace this module by hand."
        )
    pairs = [(_numbers(a), _numbers(b)) for a, b in zip(before, after, strict=True) if a.numel()]
    moved = max((float((b - a).abs().max()) for a, b in pairs), default=0.0)
    largest = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    return Change(max_abs=moved, relative=moved / largest if largest else math.inf if moved else 0.0)


def _numbers(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _run(model: nn.Module, batch: ExampleBatch, mode: Mode, state: RandomState) -> list[Tensor]:
    with in_mode(model, mode), torch.no_grad(), state.replayed():
        return _tensors(FrozenCall(model, {}, copy_parameters=True)({}, batch.copy()))


@contextmanager
def in_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Set by hand: `train()` is a method that models override, some to merge weights."""
    modes = [(module, module.training) for module in model.modules()]
    all_train = mode == "train" and not model.training
    for module, training in modes:
        module.training = mode == "train" and (training or all_train)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _watching(modules: Iterable[nn.Module], note: Note) -> Iterator[None]:
    with ExitStack() as handles:
        for module in modules:
            handle = module.register_forward_hook(note, with_kwargs=True)
            handles.callback(handle.remove)
        yield
