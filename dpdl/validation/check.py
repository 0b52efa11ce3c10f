"""`dpdl.check`: names every module that mixes examples or keeps state from data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dpdl.per_sample import per_sample_norms
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.isolation import Finding, find_batch_norms, find_mixing, find_mixing_in_a_crowd
from dpdl.per_sample.randomness import isolated_randomness
from dpdl.validation.absence import find_effects_of_absence
from dpdl.validation.conversions import batch_norm_to_group_norm
from dpdl.validation.every_mixer import find_every_mixer
from dpdl.validation.measurement import example_rows
from dpdl.validation.replacement import refuse_unfinished

__all__ = ["Check", "check"]

TRIES = 3  # orders of the examples; each takes ten forwards


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
    """Look for modules that mix examples or keep state: exchange an example, or leave it out, and watch the others.

    The model, its buffers and torch's random state are left as they were. What no example of the batch
    brings out is not found: give a batch like those to be trained on.

    Args:
        model: the module, in the mode in which it will be trained.
        example_batch: inputs as for `per_sample_gradients` (tensor, tuple or dict, batch first, at least two
            examples); with `loss_fn`, the pair (inputs, targets).
        loss_fn: if given, the loss and the engines are tried as well, as on a first training batch.

    Guarantee:
        None: a model that mixes examples only on other inputs than these passes. A run checks
        its own first batch too.

    Raises:
        ParameterError: fewer than two examples.
        ModelError: the model is compiled, or has no shape yet; or from the trial with `loss_fn`.
        LossError: from that trial.
    """
    inputs, targets = (example_batch, None) if loss_fn is None else example_batch
    batch = example_rows(inputs)
    refuse_unfinished(model)
    findings = find_batch_norms(model)
    findings += [f for f in _find_in_several_tries(model, batch) if f.module not in {k.module for k in findings}]
    if any(finding.kind == "mixes examples" for finding in findings):
        findings += find_every_mixer(model, batch, findings)
    findings = [_pointing_at_fix(finding, model.get_submodule(finding.module)) for finding in findings]
    if not findings and loss_fn is not None:
        with isolated_randomness(batch.device):
            per_sample_norms(model, loss_fn, inputs, targets)
    return Check(findings=tuple(findings))


def _find_in_several_tries(model: nn.Module, batch: ExampleBatch) -> list[Finding]:
    """A few examples at a time, then all together, in several orders: each tries other neighbours.

    Whether an example reaches another may depend on both, and on what else is there.
    """
    generator = torch.Generator().manual_seed(0)  # which orders is of no consequence
    orders = [torch.arange(batch.size), *(torch.randperm(batch.size, generator=generator) for _ in range(TRIES - 1))]
    for find in (find_mixing, find_mixing_in_a_crowd, find_effects_of_absence):
        for order in orders:
            if findings := find(model, batch.rows(order.to(batch.device))):
                return findings
    return []


def _pointing_at_fix(finding: Finding, module: nn.Module) -> Finding:
    """The finding; where `dpdl.fix` would help, with a remedy that says so."""
    if isinstance(module, _BatchNorm):
        remedy = (
            f"dpdl.fix(model) puts nn.{batch_norm_to_group_norm(module)} in its place, with its scale and shift. Or "
            "freeze it, if its running statistics are public: keep it in eval(), and its parameters out of the "
            'optimizer; dpdl.fix(model, batch_norm="frozen") makes that last.'
        )
    elif isinstance(module, _InstanceNorm):
        remedy = f"{finding.remedy} dpdl.fix(model) does, and carries scale and shift over."
    else:
        return finding
    return replace(finding, remedy=remedy)
