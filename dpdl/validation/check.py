"""`dpdl.check`: names every module that mixes examples or keeps state from data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpdl.errors import ParameterError
from dpdl.per_sample import per_sample_norms
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.isolation import Finding, find_batch_norms, find_mixing
from dpdl.per_sample.randomness import isolated_randomness

__all__ = ["Check", "check"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What `check` found; true if it is nothing. Prints as a list.

    Attributes:
        findings: places where examples are not kept apart.
    """

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        if not self.findings:
            return "Examples are kept apart: the model can be trained privately."
        return "\n".join(str(finding) for finding in self.findings)


def check(
    model: nn.Module,
    example_batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
) -> Check:
    """Look for modules that mix examples or keep state, by exchanging an example and watching the others.

    The model, its buffers and torch's random state are left as they were. What no example of the batch
    brings out is not found: give a batch like those to be trained on.

    Args:
        model: the module, in the mode in which it will be trained.
        example_batch: inputs as for `per_sample_gradients` (tensor, tuple or dict, batch first, at least two
            examples); with `loss_fn`, the pair (inputs, targets).
        loss_fn: if given, the loss and the engines are tried as well, as on a first training batch.

    Raises:
        ParameterError: fewer than two examples.
        ModelError, LossError: from the trial with `loss_fn`.
    """
    inputs, targets = (example_batch, None) if loss_fn is None else example_batch
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    batch = ExampleBatch.from_call(args, inputs if isinstance(inputs, dict) else {})
    if batch.size < 2:
        raise ParameterError(f"example_batch must have at least two examples to exchange one, got {batch.size}.")
    findings = tuple(find_batch_norms(model))
    findings += tuple(f for f in find_mixing(model, batch) if f.module not in {k.module for k in findings})
    if not findings and loss_fn is not None:
        with isolated_randomness(batch.device):
            per_sample_norms(model, loss_fn, inputs, targets)
    return Check(findings=findings)
