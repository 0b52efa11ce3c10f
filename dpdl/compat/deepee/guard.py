"""Refuses every step of an optimizer on a gradient that did not come from `noise_gradient()`.

deepee lets the user keep any plain optimizer of `model.wrapped_model.parameters()`, so nothing of ours stands between
a gradient and the weights. Two hooks of torch do instead: one on each parameter, which refuses what a plain
`backward()` brings; and one that torch calls before every optimizer's step, which refuses to step in the middle of the
private calls, or on a `p.grad` that is not the tensor that `noise_gradient()` has put there. What is done to that
tensor in place afterwards (scaling, clipping) is post-processing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle, unserializable_hook

from dpdl.compat.deepee.errors import OrderError
from dpdl.errors import WrapError

__all__ = ["StepGuard"]

_in_charge: weakref.WeakSet[StepGuard] = weakref.WeakSet()
_installed: list[RemovableHandle] = []  # the one hook on all optimizers, from the first guard on


class StepGuard:
    """Watches one model's parameters for one wrapper.

    Args:
        model: whose parameters. A guard of the same model from before hands over to this one.
        pending: what has been left undone of the current step, or None between steps.

    Raises:
        WrapError: a parameter is another wrapped model's.
    """

    def __init__(self, model: nn.Module, *, pending: Callable[[], str | None]) -> None:
        self._model = weakref.ref(model)
        self._pending = pending
        self._watched: dict[str, nn.Parameter] = {}
        self._released: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._probed = False
        predecessors = self._predecessors(model)
        for guard in predecessors:
            guard._retire()
        self.watch()
        _in_charge.add(self)
        if not _installed:
            _installed.append(register_optimizer_step_pre_hook(_before_step))

    @staticmethod
    def _predecessors(model: nn.Module) -> list[StepGuard]:
        mine = {id(p): name for name, p in model.named_parameters()}
        found = []
        for guard in _in_charge:
            shared = [mine[id(p)] for p in guard._watched.values() if id(p) in mine]
            if shared and guard._model() is not model:
                raise WrapError(
                    f"Parameter '{shared[0]}' is part of another model in a PrivacyWrapper; two of them would not know "
                    "of each other's spending. Wrap one model that holds both, or copy.deepcopy this one."
                )
            if shared:
                found.append(guard)
        return found

    @property
    def is_in_charge(self) -> bool:
        """Whether no later wrapper of the same model has taken over."""
        return self in _in_charge

    def _retire(self) -> None:
        _in_charge.discard(self)
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watch(self) -> None:
        """Watch the model's parameters as they are now."""
        self._unhook()
        model = self._model()
        assert model is not None
        self._watched = dict(model.named_parameters())
        me = weakref.ref(self)
        for name, p in self._watched.items():
            if p.requires_grad:
                self._handles.append(p.register_hook(_refusing(name, me)))

    @contextmanager
    def probed(self) -> Iterator[None]:
        """While an engine runs: its checks send gradients of their own to the parameters, and take them away again."""
        self._probed = True
        try:
            yield
        finally:
            self._probed = False

    def release(self, gradients: Mapping[str, Tensor]) -> None:
        """Put noisy gradients into `p.grad`: these, and no others, may be stepped on."""
        for name, p in self._watched.items():
            if name in gradients:
                p.grad = gradients[name]
            elif name in self._released:
                p.grad = None  # frozen since: what was released before is not to be applied again
        self._released = dict(gradients)

    def refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise if `optimizer` is about to move a watched parameter by anything but a released gradient."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        mine = {name: p for name, p in self._watched.items() if id(p) in held}
        if not mine:
            return
        undone = self._pending()
        if undone is not None:
            raise OrderError(
                f"{type(optimizer).__name__}.step() was called {undone}. The order is forward, loss.backward(), "
                "clip_and_accumulate(), noise_gradient(), optimizer.step(), prepare_next_batch()."
            )
        for name, p in mine.items():
            foreign = p.grad is not None and p.grad is not self._released.get(name)
            if foreign and p.grad is not None and bool(p.grad.any()):
                raise OrderError(
                    f"{type(optimizer).__name__}.step() would move parameter '{name}' by a gradient that "
                    "noise_gradient() did not make. Drop it with optimizer.zero_grad(). A noisy gradient may be "
                    "changed in place (p.grad.mul_(...)), not replaced."
                )


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for guard in list(_in_charge):
        guard.refuse(optimizer)


def _refusing(name: str, guard: weakref.ref[StepGuard]) -> Callable[[Tensor], None]:
    def refuse(gradient: Tensor) -> None:
        owner = guard()
        if owner is not None and owner.is_in_charge and not owner._probed:
            raise OrderError(
                f"A plain backward() reached parameter '{name}' of a model in a PrivacyWrapper: its gradient would "
                "carry no noise. Call the wrapper, not its wrapped_model, and keep terms on the parameters themselves "
                "out of the loss (use the optimizer's weight_decay)."
            )

    marked: Callable[[Tensor], None] = unserializable_hook(refuse)  # torch.save does not warn of losing it
    return marked
