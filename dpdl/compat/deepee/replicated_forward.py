"""The forward that both wrappers share: deepee's replicas as one pass of an engine for per-sample gradients.

deepee copies the model once for each example of the batch. An engine (`dpdl.per_sample`) answers the same question,
one gradient an example, with one copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accountants import arguments
from dpdl.compat.deepee.errors import ForwardError
from dpdl.compat.deepee.snooper import BadModuleError, ModelSnooper
from dpdl.errors import ModelError, ParameterError, WrapError
from dpdl.execution import Execution
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import OnBackward
from dpdl.per_sample.engine import FrozenCall
from dpdl.per_sample.isolation import find_batch_norms
from dpdl.per_sample.runner import PerSampleRunner, plain_arguments

__all__ = ["ReplicatedForward", "number_of_replicas", "refuse_models_that_cannot", "trainable_of"]


class ReplicatedForward:
    """Runs a module on batches of one size.

    Args:
        module: the model.
        num_replicas: examples in each training batch.
        execution: engine, checks and the loss's reduction.
        checks_loss: whether the loss is compared with `execution.loss_reduction`.
    """

    def __init__(self, module: nn.Module, num_replicas: int, *, execution: Execution, checks_loss: bool) -> None:
        self._module = module
        self._num_replicas = num_replicas
        self._runner = PerSampleRunner(module, execution)
        self._checks_loss = checks_loss

    @property
    def engine_name(self) -> str | None:
        """The engine in use; None before the first batch."""
        return self._runner.engine_name

    @property
    def notes(self) -> list[str]:
        """What a report should say of how gradients were computed."""
        return self._runner.notes

    def evaluate(self, x: Tensor) -> Any:
        """The module's output, with parameters as constants: a backward gives them nothing."""
        (x,), _ = plain_arguments((x,), {})
        if not torch.is_grad_enabled() and not self._module.training:
            return self._module(x)
        return FrozenCall(self._module, {}).run({}, (x,), {})

    def refuse_other_sizes(self, x: Tensor) -> None:
        """Raise unless `x` has one example for each replica.

        Raises:
            ParameterError: it does not.
        """
        if not isinstance(x, Tensor) or x.ndim == 0:
            raise ParameterError(
                f"The model takes one tensor with the batch on its first axis, got {type(x).__name__}. A model of "
                "several inputs can be trained with dpdl.make_private."
            )
        if x.shape[0] != self._num_replicas:
            raise ParameterError(
                f"num_replicas ({self._num_replicas}) must be equal to the batch size ({x.shape[0]}). Make the wrapper "
                "for that batch size; a last, smaller batch is not drawn by UniformDataLoader."
            )

    def run(self, x: Tensor, on_backward: OnBackward) -> Any:
        """The module's output for a training batch; each backward through it calls `on_backward`.

        Raises:
            ModelError: the module mixes examples, or no engine can run it.
            ForwardError: a normalisation has a single value to normalise.
        """
        (x,), _ = plain_arguments((x,), {})
        if self._checks_loss:
            self._runner.begin_batch(None, self._num_replicas)
        try:
            return self._runner.forward(ExampleBatch.from_call((x,), {}), trainable_of(self._module), on_backward)
        except ValueError as error:
            if "Expected more than 1" not in str(error):
                raise
            raise ForwardError(
                f"An error occurred during the forward pass: {error}. This is typical of InstanceNorm, or BatchNorm, "
                "on small images, where one position is left. Switch to GroupNorm: "
                "ModelSurgeon(SurgicalProcedures.BN_to_GN).operate(model)."
            ) from error


def trainable_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are to be trained, by name.

    Raises:
        ModelError: there is none.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ModelError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to train.")
    return trainable


def refuse_models_that_cannot(base_model: nn.Module) -> None:
    """Raise unless `base_model` is a module without normalisations that mix examples.

    Raises:
        WrapError: it is not a module.
        BadModuleError: deepee's check fails, or it normalises over the batch.
    """
    if not isinstance(base_model, nn.Module):
        kind = base_model.__name__ if isinstance(base_model, type) else type(base_model).__name__
        raise WrapError(f"base_model must be a module, got {kind}. Pass an instance: {kind}().")
    ModelSnooper().snoop(base_model)
    findings = find_batch_norms(base_model)
    if findings:
        raise BadModuleError(
            "Without running statistics BatchNorm normalises over the batch in eval mode, and each example alone in "
            "training: two models. ModelSurgeon(SurgicalProcedures.BN_to_BN_nostats).operate(model) makes it one.\n"
            + "\n".join(f"  - {finding}" for finding in findings)
        )


def number_of_replicas(num_replicas: object) -> int:
    """`num_replicas` as an int >= 1.

    Raises:
        ParameterError: it is none.
    """
    return arguments.positive_whole("num_replicas", num_replicas, remedy="Give the batch size.")
