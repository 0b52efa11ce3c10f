"""What modules and hooks with per-sample gradients have in common."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor, nn

from dpdl.compat.opacus.grad_sample.per_sample_forward import PerSampleForward
from dpdl.errors import ParameterError
from dpdl.execution import LossReduction

__all__ = ["AbstractGradSampleHooks", "AbstractGradSampleModule"]

_LEFT_ON_PARAMETERS = ("grad_sample", "summed_grad", "_norm_sample")


class AbstractGradSampleHooks(abc.ABC):
    """Gives a module's parameters `grad_sample`: after backward, each example's own gradient, [N, *shape].

    Args:
        m: the plain module.
        batch_first: whether its tensors carry examples on their first axis, or on their second.
        loss_reduction: "mean" or "sum", how the loss combines examples.
        keep: keep gradients readable after the optimizer has summed them.
        norms: offer `p._norm_sample`.
    """

    _module: nn.Module
    per_sample: PerSampleForward

    def _set_up(
        self,
        m: nn.Module,
        *,
        batch_first: bool,
        loss_reduction: str,
        keep: bool = True,
        norms: bool = False,
    ) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ParameterError(f'loss_reduction must be "mean" or "sum", got {loss_reduction!r}.')
        reduction: LossReduction = "mean" if loss_reduction == "mean" else "sum"
        self._module = m
        self.batch_first = batch_first
        self.loss_reduction = loss_reduction
        self.__dict__["per_sample"] = PerSampleForward(
            m, batch_first=batch_first, loss_reduction=reduction, keep=keep, norms=norms
        )

    @property
    def hooks_enabled(self) -> bool:
        """Whether backwards bring per-sample gradients; otherwise the module is the plain one."""
        return self.per_sample.enabled

    def enable_hooks(self) -> None:
        """Let backwards bring per-sample gradients."""
        self.per_sample.enabled = True

    def disable_hooks(self) -> None:
        """Let the module be the plain one. A private optimizer refuses the gradients that it then brings."""
        self.per_sample.enabled = False

    def remove_hooks(self) -> None:
        """Let the module be the plain one from now on."""
        self.per_sample.enabled = False

    def forbid_grad_accumulation(self) -> None:
        """Refuse a second batch's backward before the first one's gradients are cleared."""
        self.per_sample.may_accumulate = False

    def allow_grad_accumulation(self) -> None:
        """Let `p.grad_sample` become a list, one tensor a batch."""
        self.per_sample.may_accumulate = True

    def set_grad_sample_to_none(self) -> None:
        """Forget per-sample gradients."""
        for p in self.per_sample.trainable().values():
            p.grad_sample = None  # type: ignore[attr-defined]  # the attribute that Opacus puts there
        self.per_sample.forget()

    def del_grad_sample(self) -> None:
        """Remove the attribute from all parameters."""
        self._remove_attributes("grad_sample")

    def cleanup(self) -> None:
        """Leave the plain module as it was before."""
        self.remove_hooks()
        self._remove_attributes(*_LEFT_ON_PARAMETERS)
        self.per_sample.forget()

    def _remove_attributes(self, *names: str) -> None:
        for p in self._module.parameters():
            for name in names:
                p.__dict__.pop(name, None)

    def _last_norms(self) -> Tensor:
        record = self.per_sample.last_record
        if record is None:
            raise ParameterError("There are no per-sample gradients yet. Call the module and backward() first.")
        return record.norms()


class AbstractGradSampleModule(nn.Module, AbstractGradSampleHooks):
    """A module around another whose parameters get `grad_sample`; see `AbstractGradSampleHooks`.

    `state_dict()` has Opacus's prefix "_module."; `load_state_dict()` takes plain keys too.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's output."""
        return self.per_sample(args, kwargs, self._module)

    def __getattr__(self, item: str) -> Any:
        try:
            return super().__getattr__(item)
        except AttributeError:
            if item == "_module":
                raise
            submodules = dict(self._module.named_modules())
            return submodules[item] if item in submodules else getattr(self._module, item)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget `p.grad` and `p.grad_sample`."""
        self.set_grad_sample_to_none()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights saved from this, or from the plain module."""
        prefix = "_module."
        plain = {key[len(prefix) :] if key.startswith(prefix) else key: value for key, value in state_dict.items()}
        return self._module.load_state_dict(plain, strict=strict, assign=assign)

    def to_standard_module(self) -> nn.Module:
        """The wrapped module, left as it was before."""
        self._close()
        return self._module

    def _close(self) -> None:
        self.cleanup()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._module!r})"
