"""What an engine promises: outputs now, and per-sample gradients when their gradients are known.

    engine.forward(batch, trainable) ─▶ ForwardPass.outputs ─▶ the user's loss ─▶ backward()
                                        ForwardPass.pull_back(cotangents) ─▶ PerSampleGradients, in parts

Each part answers `norms()` first and `weighted_sum(weights)` second, so that clipping is arithmetic
on N numbers and an engine is free to never materialise a gradient per example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.layout import OutputLayout

__all__ = ["Engine", "ForwardPass", "FrozenCall", "PerSampleGradients", "PullBack"]


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
        module: the model. It is run by `functional_call`, with parameters handed in: its own
            parameters never meet autograd.
        accumulate_dtype: the least precise dtype of norms and sums.
    """

    name: ClassVar[str]

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

    def layout_of(self, trainable: Mapping[str, Tensor], batch: ExampleBatch) -> OutputLayout:
        """The layout of the module's output, measured once for each form of arguments."""
        form = (self.module.training, repr(batch.spec), tuple(leaf.ndim for leaf in batch.row_leaves))
        if form not in self._layouts:
            careful = FrozenCall(self.module, trainable, copy_parameters=True)
            layout = OutputLayout.measure(lambda rows: careful({}, rows), batch)
            careful.refuse_written_state()
            self._layouts[form] = layout
        return self._layouts[form]


class FrozenCall:
    """A module with its state taken out: a function of (trainable parameters, batch).

    Buffers are copied, so that a forward that writes to them leaves the module as it was; parameters are
    too where `copy_parameters` is set, and watched where not. Autocast is as it was when the call was made,
    also when the call is repeated during a backward pass.

    Args:
        module: the model.
        trainable: the parameters that will be handed in.
        copy_parameters: run on copies of all parameters.
    """

    def __init__(self, module: nn.Module, trainable: Mapping[str, Tensor], *, copy_parameters: bool = False) -> None:
        self.module = module
        parameters = dict(module.named_parameters())
        self.fixed = {
            name: p.detach().clone() if copy_parameters else p.detach()
            for name, p in parameters.items()
            if copy_parameters or name not in trainable
        }
        self.buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
        self._watched = {**parameters, **self.fixed, **self.buffers}
        self._versions = {n: t._version for n, t in self._watched.items()}
        device = next((t.device.type for t in self._watched.values()), "cpu")
        self._autocast = partial(
            torch.autocast, device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        self.without_autocast = partial(torch.autocast, device, enabled=False)

    def __call__(self, parameters: Mapping[str, Tensor], batch: ExampleBatch) -> Any:
        """The module's output; where parameters were copied, the copies stand for those handed in."""
        return self.run(parameters, *batch.call_arguments())

    def run(self, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for arguments as they are."""
        with self._autocast():
            return functional_call(self.module, {**parameters, **self.fixed, **self.buffers}, args, kwargs)

    def written_state(self) -> list[str]:
        """Buffers and parameters that a forward has written to, or put another tensor in place of."""
        written = [name for name, tensor in self._watched.items() if tensor._version != self._versions[name]]
        return written

    def refuse_written_state(self) -> None:
        """Raise if a forward wrote to the module's state, which would carry data from step to step."""
        written = self.written_state()
        if written:
            raise ModelError(
                f"The model's forward writes to its buffers or parameters {written}. State that is updated from "
                "private data leaves through the saved model without noise. Freeze the modules that own it "
                "(module.eval(), track_running_stats=False, max_norm=None), or replace them, e.g. BatchNorm by "
                "GroupNorm."
            )


def detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters as constants."""
    return {name: parameter.detach() for name, parameter in parameters.items()}


def is_differentiable(value: Any) -> bool:
    """Whether a gradient can flow back through an output."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def accumulation_dtype(dtype: torch.dtype, least: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are added up: theirs, but at least `least`."""
    return torch.promote_types(dtype, least)
