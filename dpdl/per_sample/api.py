"""Per-sample gradients of a model and a loss, outside of any private run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpdl.clipping import flat_weights
from dpdl.errors import LossError, ModelError, ParameterError
from dpdl.execution import EngineName, Execution, LossReduction
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.boundary import Passage, visit_gradients
from dpdl.per_sample.engine import PerSampleGradients
from dpdl.per_sample.runner import PerSampleRunner

__all__ = ["clipped_sum", "per_sample_gradients", "per_sample_norms"]

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]
LossFunction = Callable[[Any, Any], Tensor]


def per_sample_gradients(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    *,
    engine: EngineName = "auto",
    loss_reduction: LossReduction = "mean",
) -> dict[str, Tensor]:
    """The gradient of each example's own loss, by parameter.

    Args:
        model: any module that keeps examples apart; `p.grad` is neither read nor written.
        loss_fn: (outputs, targets) to the batch's loss, a scalar.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; the tensors in
            it have the batch first, [N, ...]. N may be 0.
        targets: handed to loss_fn as they are.
        engine: "auto", "tape", "vmap" or "loop".
        loss_reduction: whether loss_fn takes the "mean" or the "sum" over examples.

    Returns:
        Parameter name to [N, *shape], for each parameter that requires a gradient. Never divided by N.

    Guarantee:
        No privacy: each row is a function of one private example.

    Raises:
        ModelError: the model mixes examples, or the engine cannot run it.
        LossError: the loss is not what loss_reduction says.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> per_sample_gradients(layer, lambda y, _: y.sum(), x, None, loss_reduction="sum")["weight"].flatten()
        tensor([1., 3.])
    """
    trainable = _trainable(model)
    rows: dict[str, list[Tensor]] = {name: [p.new_zeros((0, *p.shape))] for name, p in trainable.items()}

    def collect(part: PerSampleGradients) -> None:
        for name, gradient in part.materialize().items():
            rows[name].append(gradient)

    _backward(model, loss_fn, inputs, targets, engine, loss_reduction, collect)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def per_sample_norms(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    *,
    engine: EngineName = "auto",
    loss_reduction: LossReduction = "mean",
) -> Tensor:
    """The L2 norm of each example's gradient over all parameters.

    Args and errors: as in `per_sample_gradients`.

    Returns:
        Norms, shape [N], float32 or wider.

    Guarantee:
        No privacy: each norm is a function of one private example.

    References:
        [1] Goodfellow, Efficient Per-Example Gradient Computations, 2015. arXiv:1510.01799: norms without gradients,
            where the engine can.
    """
    norms: list[Tensor] = []

    def collect(part: PerSampleGradients) -> None:
        norms.append(part.norms())

    _backward(model, loss_fn, inputs, targets, engine, loss_reduction, collect)
    return torch.cat(norms) if norms else torch.zeros(0)


def clipped_sum(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    *,
    max_grad_norm: float,
    engine: EngineName = "auto",
    loss_reduction: LossReduction = "mean",
) -> dict[str, Tensor]:
    """The sum over examples of gradients clipped to L2 norm max_grad_norm.

    Args and errors: as in `per_sample_gradients`.

    Args:
        max_grad_norm: C > 0.

    Returns:
        Parameter name to a tensor of the parameter's shape, float32 or wider.

    Guarantee:
        Adding or removing one example moves the whole by at most max_grad_norm in L2 norm. An example
        with a non-finite gradient does not enter.

    Raises:
        ParameterError: max_grad_norm is not positive.

    References:
        [1] Li, Tramèr, Liang, Hashimoto, Large Language Models Can Be Strong Differentially Private Learners, 2022.
            arXiv:2110.05679: clipping from norms alone, where the engine can.
    """
    if not max_grad_norm > 0:
        raise ParameterError(f"max_grad_norm must be > 0, got {max_grad_norm}.")
    sums = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)).detach()
        for name, p in _trainable(model).items()
    }

    def add(part: PerSampleGradients) -> None:
        weights = flat_weights(part.norms(), max_grad_norm=max_grad_norm)
        for name, tensor in part.weighted_sum(weights).items():
            sums[name] += tensor

    _backward(model, loss_fn, inputs, targets, engine, loss_reduction, add)
    return sums


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    trainable: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ModelError(f"{type(model).__name__} has no parameter that requires a gradient.")
    return trainable


def _backward(
    model: nn.Module,
    loss_fn: LossFunction,
    inputs: Inputs,
    targets: Any,
    engine: EngineName,
    loss_reduction: LossReduction,
    visit: Callable[[PerSampleGradients], None],
) -> None:
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    batch = ExampleBatch.from_call(args, kwargs)
    runner = PerSampleRunner(model, Execution(engine=engine, loss_reduction=loss_reduction))
    targets = runner.begin_batch(targets, batch.size)
    passages: dict[Passage, None] = {}  # one, once the loss has gone backward
    with torch.enable_grad():
        loss = loss_fn(runner.forward(batch, _trainable(model), passages.setdefault), targets)
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise LossError(
            f"loss_fn must return one number for the batch, got {getattr(loss, 'shape', type(loss).__name__)}. "
            f"Take the {loss_reduction} over examples."
        )
    if loss.requires_grad:
        loss.backward()
        visit_gradients(list(passages), visit)
