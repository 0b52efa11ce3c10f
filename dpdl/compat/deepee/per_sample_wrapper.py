"""`PerSampleGradientWrapper`: per-sample gradients in `p.accumulated_gradients`, with nothing private about them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dpdl.compat.deepee.errors import OrderError
from dpdl.compat.deepee.replicated_forward import (
    ReplicatedForward,
    number_of_replicas,
    refuse_models_that_cannot,
    trainable_of,
)
from dpdl.errors import ParameterError
from dpdl.execution import Execution
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.engine import PerSampleGradients

__all__ = ["PerSampleGradientWrapper"]


class PerSampleGradientWrapper(nn.Module):
    """Computes what each example of a batch contributes to the gradient of a loss.

    Args:
        base_model: the module; wrapped, not copied.
        num_replicas: B, the size of every training batch.

    Raises:
        WrapError: not a module.
        BadModuleError: the model keeps statistics or mixes examples.
        ParameterError: num_replicas is no positive integer.
    """

    def __init__(self, base_model: nn.Module, num_replicas: int) -> None:
        super().__init__()
        refuse_models_that_cannot(base_model)
        self.num_replicas = number_of_replicas(num_replicas)
        self.wrapped_model = base_model
        self.input_size = getattr(base_model, "input_size", None)
        # Whatever the loss is, gradients are handed over as they come: a mean divides them by B.
        self._forward = ReplicatedForward(
            base_model, self.num_replicas, execution=Execution(loss_reduction="sum"), checks_loss=False
        )
        self._passages: list[Passage] = []
        self._forward_succesful = False

    def forward(self, x: Tensor) -> Any:
        """The module's output; in training mode for `num_replicas` examples, which begin a new batch.

        Raises:
            ParameterError: another number of examples.
            ModelError: the module mixes examples, or no engine can run it.
        """
        if not self.training or not torch.is_grad_enabled():
            return self._forward.evaluate(x)
        self._forward.refuse_other_sizes(x)
        passages: list[Passage] = []

        def deliver(passage: Passage) -> None:
            if passage.is_used_up:
                raise OrderError("backward() was called after calculate_per_sample_gradients(). Call the model again.")
            if not passages:
                passages.append(passage)

        output = self._forward.run(x, deliver)
        self._passages = passages
        self._forward_succesful = True
        return output

    def calculate_per_sample_gradients(self) -> None:
        """Put into `p.accumulated_gradients` what backwards since the last forward have brought, [B, *shape of p].

        They add up to the gradient of the loss. A frozen parameter gets none.

        Raises:
            OrderError: no forward, or no backward.
        """
        if not self._forward_succesful:
            raise OrderError(
                "model.forward() must be called, in training mode, before calculating per-sample gradients."
            )
        if not self._passages:
            raise OrderError(
                "No gradients have been calculated yet! calculate_per_sample_gradients() must be called after "
                ".backward() was called on a loss of the model's output."
            )
        if self._passages[0].is_used_up:
            return  # computed already
        trainable = trainable_of(self.wrapped_model)
        rows: dict[str, list[Tensor]] = {name: [] for name in trainable}

        def collect(part: PerSampleGradients) -> None:
            for name, gradients in part.materialize().items():
                rows[name].append(gradients)

        visit_gradients(self._passages, collect)
        for name, p in self.wrapped_model.named_parameters():
            if name not in trainable:
                if hasattr(p, "accumulated_gradients"):
                    del p.accumulated_gradients
                continue
            found = torch.cat(rows[name]) if rows[name] else p.new_zeros((self.num_replicas, *p.shape))
            p.accumulated_gradients = found.detach().to(p.dtype)  # type: ignore[attr-defined]

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The replicas: all of them are the module."""
        return (self.wrapped_model,) * self.num_replicas

    def parameters(self, recurse: bool = True) -> NoReturn:
        """Refused, as in deepee.

        Raises:
            ParameterError: always.
        """
        raise ParameterError(
            "The PerSampleGradientWrapper instance has no own parameters. Use its wrapped_model.parameters()."
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop `p.grad` and `p.accumulated_gradients` of the wrapped module."""
        self.wrapped_model.zero_grad(set_to_none=set_to_none)
        for p in self.wrapped_model.parameters():
            if hasattr(p, "accumulated_gradients"):
                del p.accumulated_gradients

    def requires_grad_(self, requires_grad: bool = True) -> PerSampleGradientWrapper:
        """As of any module."""
        self.wrapped_model.requires_grad_(requires_grad)
        return self
