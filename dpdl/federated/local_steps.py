"""What a client does with its data in a round: the loop over steps, and FedProx's pull back to the global weights.

A client may bring a loop of its own, `train(model, optimizer, loader, steps)`. Under differential privacy these are the
private model, optimizer and loader; without it, plain ones: the same function serves both. What it returns, if
anything, is numbers by name; they are computed from the data, and leave only if the client was told to send them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dpdl.errors import ParameterError
from dpdl.federated.messages import Scalar

__all__ = ["LossFunction", "Train", "pull_to_start", "take_steps"]

LossFunction = Callable[[Any, Any], Tensor]
"""Outputs and targets to the loss of the batch."""
Train = Callable[[Any, Any, Any, int], Mapping[str, Scalar] | None]
"""The user's own loop: model, optimizer, loader, steps."""


def take_steps(
    model: Any, optimizer: Any, loader: Iterable[Any], steps: int, *, loss_fn: LossFunction, device: torch.device
) -> dict[str, Scalar]:
    """Train for `steps` steps, in as many passes as they take.

    A batch is a pair (inputs, targets). Inputs are a tensor, or a tuple (positional) or mapping (keyword arguments).

    Args:
        model, optimizer, loader: private or plain.
        steps: updates, of logical batches.
        loss_fn: of outputs and targets.
        device: where the model is.

    Returns:
        "loss": the mean over batches of the loss before the step. Private.

    Raises:
        ParameterError: batches are not pairs.
    """
    taken, batches = 0, 0
    total = torch.zeros((), dtype=torch.float64, device=device)
    while taken < steps:
        for batch in loader:
            if not isinstance(batch, (list, tuple)) or len(batch) != 2:
                raise ParameterError(
                    f"A batch of the dataset is a {type(batch).__name__}, not a pair (inputs, targets). Give the "
                    "client your own loop: train=function(model, optimizer, loader, steps)."
                )
            inputs, targets = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
            optimizer.zero_grad()
            loss = loss_fn(_output(model, inputs), targets)
            loss.backward()
            taken += getattr(optimizer, "completes_a_batch", True)
            optimizer.step()
            value = loss.detach().double()
            total += torch.where(value.isfinite(), value, 0.0)  # an empty batch has none
            batches += 1
            if taken == steps:
                break
    return {"loss": total.item() / batches}


def _output(model: Any, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (list, tuple)) else model(inputs)


def pull_to_start(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], *, strength: float) -> None:
    """Let an optimizer add strength * (w - w_start) to each gradient, right before it uses it: FedProx [1, eq. 2].

    w_start are the weights as of now. The term is computed from weights alone. Under differential privacy it comes
    after the noise (the optimizer is the one within the private one), so it is post-processing: not clipped, not spent.

    References:
        [1] Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020. arXiv:1812.06127
    """
    start = [(p, p.detach().clone()) for p in parameters]

    def add(*_: Any) -> None:
        with torch.no_grad():
            for p, was in start:
                if p.grad is not None:
                    p.grad.add_(p - was, alpha=strength)

    optimizer.register_step_pre_hook(add)
