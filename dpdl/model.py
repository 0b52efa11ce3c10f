"""The private model: the user's module, whose training forward leads to per-sample gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import OnBackward, Passage
from dpdl.per_sample.engine import FrozenCall
from dpdl.per_sample.isolation import find_batch_norms, refuse_mixing
from dpdl.per_sample.runner import PerSampleRunner, plain_arguments
from dpdl.placement import Copies, Placement
from dpdl.ranks import Ranks
from dpdl.turns import Part, Turns

__all__ = ["PrivateModel"]


class PrivateModel(nn.Module):
    """Wraps a module without copying it or renaming anything in it.

    `state_dict()`, `named_parameters()`, `train()`, `to()` and attributes are the module's own. With
    gradients enabled, `forward` trains: it takes the private loader's current batch and no other, and a
    backward through its output goes to the private optimizer, never to `p.grad`. Without gradients, or in
    eval mode on anything but the current batch, it evaluates; a backward through that gives the parameters
    nothing.

    The current batch may be run several times before its step (pairs, two views of each example, a critic's real
    and fake samples), and each output may go backward several times: contributions to an example's gradient are
    added up, and the whole is clipped once, by `optimizer.step()`. Every call has as many rows as the batch has
    examples, and row n of each must be computed from example n, or from what is public, alone.

    `copy.deepcopy` gives a copy of the plain module (for averaging, say).

    Args:
        module: the user's module.
        runner: computes per-sample gradients of it.
        turns: knows the current batch.
        trainable: the parameters that the private optimizer updates, by name, as of now.
        placement: where they are; by default here, whole.

    Guarantee:
        None for what it computes: outputs, losses and gradients are private. Only the weights that `optimizer.step()`
        makes are released.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        runner: PerSampleRunner,
        turns: Turns,
        trainable: Callable[[], Mapping[str, Tensor]],
        placement: Placement | None = None,
    ) -> None:
        self.__dict__["_wrapped"] = module  # past __setattr__, which hands on to the module
        mode = module.training
        super().__init__()
        module.training = mode  # nn.Module's constructor has set it
        # The registries themselves are shared, so that every traversal of nn.Module sees plain names.
        for registry in ("_parameters", "_buffers", "_modules"):
            self.__dict__[registry] = module.__dict__[registry]
        self.__dict__["_runner"] = runner
        self.__dict__["_turns"] = turns
        self.__dict__["_trainable"] = trainable
        self.__dict__["_placement"] = placement or Copies(Ranks())

    @property
    def module(self) -> nn.Module:
        """The module itself. Calling it directly bypasses everything private; the optimizer refuses
        gradients that come from it."""
        wrapped: nn.Module = self.__dict__["_wrapped"]
        return wrapped

    @property
    def engine_name(self) -> str | None:
        """The engine that computes gradients; None before the first batch."""
        name: str | None = self._runner.engine_name
        return name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output.

        Raises:
            StepError: training on anything but the private loader's current batch.
            ModelError: the module mixes examples, keeps state from them, or no engine can run it.
        """
        args, kwargs = plain_arguments(args, kwargs)
        self._placement.settle()
        if not torch.is_grad_enabled():
            return self._evaluated(args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        if not tensors:
            raise ModelError("The private model was called without a tensor that has a batch axis.")
        size = tensors[0].shape[0]
        if not self.training and not self._trains_on(tensors, size):
            return self._evaluated(args, kwargs)
        part = self._turns.take(size)
        batch = ExampleBatch.from_call(args, kwargs, size=size)
        trainable = self._trainable()
        if not trainable:
            raise ModelError(
                "Every parameter that the optimizer holds is frozen: nothing would be trained, but the step would "
                "count. Unfreeze some with requires_grad_(True)."
            )
        with self._placement.whole():
            return self._runner.forward(batch, self._placement.whole_of(trainable), self._delivery_to(part))

    def _evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module with parameters as constants: gradients flow to inputs, if those ask for them.

        In training mode on copies of its buffers, so that running statistics take up no data.
        """
        with self._placement.evaluating():
            if not torch.is_grad_enabled() and not self.training:
                return self.module(*args, **kwargs)
            return FrozenCall(self.module, {}).run({}, args, kwargs)

    def _trains_on(self, tensors: list[Tensor], size: int) -> bool:
        """Whether a call in eval mode is taken for one on the current batch.

        Inputs that ask for gradients are a probe's, once the batch has been through backward; before that they are
        refused like all that would train something in front of the model.
        """
        part = self._turns.open_part
        if part is None or part.size != size:
            return False
        return not (part.delivered and any(tensor.requires_grad for tensor in tensors))

    def _delivery_to(self, part: Part) -> OnBackward:
        turns = self._turns

        def deliver(passage: Passage) -> None:
            turns.deliver(part, passage)

        return deliver

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop `p.grad`, and what backwards have brought for the current batch since its last step."""
        super().zero_grad(set_to_none=set_to_none)
        self._turns.drop()

    def train(self, mode: bool = True) -> PrivateModel:
        """As in nn.Module; refuses to put batch normalisation into training mode."""
        modes = [(child, child.training) for child in self.module.modules()]
        self.module.train(mode)
        findings = find_batch_norms(self.module)
        if findings:
            for child, training in modes:
                child.training = training
            refuse_mixing(findings)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain module's; of a sharded one whole, on the CPU, and all ranks call it together."""
        return self._placement.full_weights(self.module.state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The plain module's; a sharded one takes its slices of whole tensors."""
        return self.module.load_state_dict(self._placement.own_weights(state_dict), *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> PrivateModel:
        self.module._apply(*args, **kwargs)
        return self

    @property
    def training(self) -> bool:  # a plain attribute in nn.Module
        """The module's own mode."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.module.training = mode

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_wrapped"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes are the module's."""
        if name in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.__dict__["_wrapped"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__dict__["_wrapped"], name)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        raise TypeError(  # what pickle's callers expect
            "A private model cannot be pickled: half of its run would be left behind. Save state_dict(), which has "
            "the plain module's names, or use dpdl.save_checkpoint."
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what runs is the module, through the engine.

        Raises:
            ModelError: always.
        """
        raise ModelError("A private model cannot be compiled in place. Compile the module before make_private.")

    def __len__(self) -> int:
        return len(self.module)  # type: ignore[arg-type]  # a container's; others raise as they would

    def __iter__(self) -> Iterator[Any]:
        return iter(self.module)  # type: ignore[call-overload, no-any-return]

    def __getitem__(self, index: Any) -> Any:
        return self.module[index]  # type: ignore[index]

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(self.module, memo)

    def __repr__(self) -> str:
        return f"PrivateModel({self.module!r})"
