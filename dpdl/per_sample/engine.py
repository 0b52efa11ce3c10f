"""What an engine promises: outputs now, and per-sample gradients when their gradients are known.

    engine.forward(batch, trainable) ─▶ ForwardPass.outputs ─▶ the user's loss ─▶ backward()
    engine.gradients([(ForwardPass, cotangents), ...]) ─▶ PerSampleGradients, in parts

A step may be fed by several forward passes of the same examples; their gradients are added up, example by example,
before anything is clipped. Each part answers `norms()` first and `weighted_sum(weights)` second, so that clipping is
arithmetic on N numbers and an engine is free to never materialise a gradient per example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.layout import OutputLayout
from dpdl.per_sample.materialized import MaterializedGradients, accumulation_dtype
from dpdl.per_sample.module_state import EmptyPlaces

__all__ = ["Engine", "ForwardPass", "FrozenCall", "PerSampleGradients", "PullBack", "accumulation_dtype", "form_of"]


class PerSampleGradients(Protocol):
    """Gradients of n examples' own losses, in whatever form the engine keeps them."""

    def norms(self) -> Tensor:
        """L2 norm over all parameters, shape [n]; non-finite for a non-finite gradient."""

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """sum_n weights[n] * gradient_n for each parameter; examples of weight 0 do not enter at all."""

    def materialize(self) -> dict[str, Tensor]:
        """The gradients themselves: parameter name to [n, *shape of the parameter]."""


class PullBack(Protocol):
    """What is left of a forward pass: the way back through it, to be taken once."""

    def __call__(self, cotangents: Mapping[int, Tensor]) -> Iterator[PerSampleGradients]:
        """Per-sample gradients of sum_i <cotangents[i], outputs[i]>, in parts, in batch order.

        Args:
            cotangents: output position to a tensor shaped as that output.
        """


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """The outputs of one forward call, and the way back.

    Attributes:
        outputs: the output's leaves, tensors without a graph, each with the batch where the model puts
            it; a scalar that the model computes for an example has shape [N].
        layout: how the outputs fit together.
        pull_back: from the outputs' gradients to per-sample gradients.
    """

    outputs: list[Any]
    layout: OutputLayout
    pull_back: PullBack


class Engine(ABC):
    """Computes per-sample gradients of one module.

    Args:
        module: the model. It is run with parameters handed in, or recorded so that its own never meet autograd.
        accumulate_dtype: the least precise dtype of norms and sums.
    """

    name: ClassVar[str]
    keeps_examples_apart: ClassVar[bool]  # whatever the model does: each example is computed on its own

    def __init__(self, module: nn.Module, *, accumulate_dtype: torch.dtype = torch.float32) -> None:
        self.module = module
        self.accumulate_dtype = accumulate_dtype
        self._layouts: dict[object, OutputLayout] = {}

    @abstractmethod
    def forward(self, batch: ExampleBatch, trainable: Mapping[str, Tensor]) -> ForwardPass:
        """Run the model on a batch of at least one example.

        Args:
            batch: the arguments.
            trainable: the parameters to differentiate by, by name.
        """

    def gradients(self, passes: Sequence[tuple[ForwardPass, Mapping[int, Tensor]]]) -> Iterator[PerSampleGradients]:
        """Per-sample gradients of the sum of several passes' losses, in parts, in batch order.

        Gradient of example n = sum over passes of the gradient of sum_i <cotangents[i], outputs[i]> for example n.

        Args:
            passes: at least one; each from this engine's `forward`, over the same examples with the same trainable
                parameters, with its outputs' gradients, as `PullBack` takes them. The passes' `outputs` have been
                handed out, and may be gone. Each pass is good for one call.
        """
        if len(passes) == 1:
            forward, cotangents = passes[0]
            yield from forward.pull_back(cotangents)
            return
        # An engine cuts every batch of one size alike, so that the parts of all passes are of the same examples.
        for together in zip(*(forward.pull_back(cotangents) for forward, cotangents in passes), strict=True):
            yield MaterializedGradients.joined(
                [part.materialize() for part in together], accumulate_dtype=self.accumulate_dtype
            )

    def layout_of(self, trainable: Mapping[str, Tensor], batch: ExampleBatch) -> OutputLayout:
        """The layout of the module's output, measured once for each form of arguments."""
        form = (form_of(self.module, batch), *(leaf.shape[1:] for leaf in batch.row_leaves))
        if form not in self._layouts:
            careful = FrozenCall(self.module, trainable, copy_parameters=True)
            layout = OutputLayout.measure(lambda rows: careful({}, rows), batch)
            careful.refuse_written_state()
            self._layouts[form] = layout
        return self._layouts[form]


def form_of(module: nn.Module, batch: ExampleBatch) -> Hashable:
    """What a call of a module has in common with others that take the same way through it, as far as can be told.

    The modes of all parts, the structure of the arguments, the values of those that are not tensors, and of tensors
    the number of axes.
    """
    leaves = tuple(_kind_of(leaf) for leaf in batch.leaves)
    return (tuple(child.training for child in module.modules()), repr(batch.spec), leaves)


def _kind_of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (leaf.ndim, leaf.dtype) if leaf.ndim else ("scalar", leaf.item())
    return leaf if isinstance(leaf, Hashable) else repr(leaf)


class FrozenCall:
    """A module with its state taken out: a function of (trainable parameters, batch).

    Buffers are copied, so that a forward that writes to them leaves the module as it was; parameters are
    too where `copy_parameters` is set, and watched where not. Autocast is as it was when the call was made,
    also when the call is repeated for its gradients; `as_when_called` does the same for training and eval mode.

    Args:
        module: the model.
        trainable: the parameters that will be handed in.
        copy_parameters: run on copies of all parameters.
    """

    def __init__(self, module: nn.Module, trainable: Mapping[str, Tensor], *, copy_parameters: bool = False) -> None:
        self.module = module
        parameters = dict(module.named_parameters())
        self.fixed = {
            name: p.detach().clone().requires_grad_(p.requires_grad) if copy_parameters else p.detach()
            for name, p in parameters.items()
            if copy_parameters or name not in trainable
        }
        self.buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
        self._copied = copy_parameters
        self._originals: dict[str, Tensor] = {**parameters, **dict(module.named_buffers())}
        self._watched = {**parameters, **self.fixed, **self.buffers}
        self._versions = {n: t._version for n, t in self._watched.items()}
        device = next((t.device.type for t in self._watched.values()), "cpu")
        self._autocast = partial(
            torch.autocast, device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        self.without_autocast = partial(torch.autocast, device, enabled=False)
        names = {id(t): n for n, t in [*parameters.items(), *module.named_buffers()]}
        self._places: list[tuple[dict[str, Any], str, str]] = [
            (registry, key, names[id(tensor)])
            for child in module.modules()
            for registry in (child._parameters, child._buffers)
            for key, tensor in registry.items()
            if tensor is not None
        ]
        self._modes = [(child, child.training) for child in module.modules()]
        self._empty = EmptyPlaces(module)
        self._replaced: list[str] = []

    def __call__(self, parameters: Mapping[str, Tensor], batch: ExampleBatch) -> Any:
        """The module's output; where parameters were copied, the copies stand for those handed in."""
        return self.run(parameters, *batch.call_arguments())

    def run(self, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for arguments as they are."""
        with self._autocast(), self.holding(parameters):
            return self.module(*args, **kwargs)

    @contextmanager
    def holding(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the module has these parameters, and the state that calls of this see.

        Not by `torch.func.functional_call`: where a module is registered twice that one leaves a copy behind.
        """
        values = {**parameters, **self.fixed, **self.buffers}
        before = [(registry, key, registry[key]) for registry, key, _ in self._places]
        try:
            for registry, key, name in self._places:
                registry[key] = values[name]
            yield
        finally:
            for registry, key, name in self._places:
                if registry.get(key) is not values[name]:
                    self._replaced.append(name)
            self._replaced += self._empty.cleared()
            for registry, key, tensor in before:
                registry[key] = tensor

    @contextmanager
    def as_when_called(self) -> Iterator[None]:
        """The module's parts in the modes, training or eval, in which they were when the call was made."""
        modes = [(child, child.training) for child, _ in self._modes]
        for child, training in self._modes:
            child.training = training
        try:
            yield
        finally:
            for child, training in modes:
                child.training = training

    def written_state(self) -> list[str]:
        """Buffers and parameters that a forward has written to, or put another tensor in place of."""
        written = [name for name, tensor in self._watched.items() if tensor._version != self._versions[name]]
        if self._copied:  # writes through .data leave no trace in versions
            written += [
                name
                for name, copy in {**self.fixed, **self.buffers}.items()
                if name not in written and not _same(copy.detach(), self._originals[name].detach())
            ]
        return list(dict.fromkeys(written + self._replaced))

    def refuse_written_state(self) -> None:
        """Raise if a forward wrote to the module's state."""
        refuse_written(self.written_state())


def refuse_written(names: list[str]) -> None:
    """Raise if a forward wrote to a module's state, which would carry data from step to step."""
    if names:
        raise ModelError(
            f"The model's forward writes to its buffers or parameters {names}. State that is updated from "
            "private data leaves through the saved model without noise. Freeze the modules that own it "
            "(module.eval(), track_running_stats=False, max_norm=None), or replace them, e.g. BatchNorm by "
            "GroupNorm. Buffers are as they were; parameters among these hold what was written, and have to be loaded "
            "again before the model is used or saved."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, or are not numbers at the same places."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters as constants."""
    return {name: parameter.detach() for name, parameter in parameters.items()}


def is_differentiable(value: Any) -> bool:
    """Whether a gradient can flow back through an output."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
