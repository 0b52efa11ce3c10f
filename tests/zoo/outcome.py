"""What an engine makes of a model: exact, refused or failed, against plain autograd on batches of one.

The truth is the gradient of each example's own loss, taken by a Python loop over batches of one, with the model
run as it is, in float64. It shares no code with the library.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dpdl
from dpdl.errors import ModelError
from tests.oracles import one_at_a_time as oracle
from tests.zoo.model import Batch, ZooModel

# A few thousand products are summed: rounding leaves about 1e-14 in float64 and 1e-6 in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
FLOAT32_INSIDE = 1e-6  # in float64, for models that compute some of it in float32
Verdict = Literal["exact", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one engine did on one model in one dtype.

    Attributes:
        verdict: exact within `TOLERANCE`; refused with a ModelError; or failed: inexact, or any other error.
        error: the largest relative error that was measured; None if there was nothing to measure.
        reason: the refusal or failure in its own words, one line.
    """

    verdict: Verdict
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What every engine is compared with.

    Attributes:
        cotangents: [N, ...], what the loss contracts the output with.
        gradients: parameter name to [N, *shape], float64.
        norms: of each example's whole gradient, [N].
        batch_effect: largest relative difference between an example's output in the batch and alone. Where it is
            not rounding, the model computes something else for a batch of N than for N batches of one.
    """

    cotangents: Tensor
    gradients: dict[str, Tensor]
    norms: Tensor
    batch_effect: float

    @property
    def max_grad_norm(self) -> float:
        """Clips about half of the examples."""
        return float(self.norms.median()) * 1.01


def truth_of(model: ZooModel, dtype: torch.dtype = torch.float64) -> Truth:
    """The oracle's answer, in float64, for weights and data rounded to `dtype`."""
    module, inputs = model.module(rounded_to=dtype), model.inputs(rounded_to=dtype)
    with torch.no_grad():
        together = model.tensor_of(copy.deepcopy(module)(**inputs))
        rows = [{name: t[n : n + 1] for name, t in inputs.items()} for n in range(len(together))]
        alone = torch.cat([model.tensor_of(copy.deepcopy(module)(**row)) for row in rows])
        cotangents = model.cotangents(copy.deepcopy(module)(**inputs))
    effect = (
        float((together - alone).abs().max() / alone.abs().max()) if together.shape == alone.shape else float("inf")
    )
    gradients = one_at_a_time(model, module, inputs, cotangents)
    return Truth(cotangents=cotangents, gradients=gradients, norms=oracle.norms_of(gradients), batch_effect=effect)


def one_at_a_time(model: ZooModel, module: nn.Module, inputs: Batch, cotangents: Tensor) -> dict[str, Tensor]:
    """Each example's gradient, as a user would get it: a batch of one, `backward()`, `p.grad`.

    Not by `torch.autograd.grad`, which misses what a custom backward adds to `p.grad` (reversible layers,
    re-entrant checkpoints).

    Returns:
        Parameter name to [N, *shape]; zeros where a parameter is not used.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name, p in module.named_parameters() if p.requires_grad}
    for n in range(len(cotangents)):
        twin = copy.deepcopy(module)
        loss = model.loss(twin(**{name: t[n : n + 1].clone() for name, t in inputs.items()}), cotangents[n : n + 1])
        loss.backward()
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                rows[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return {name: torch.stack(gradients).detach() for name, gradients in rows.items()}


def gradient_error(measured: dict[str, Tensor], true: dict[str, Tensor]) -> tuple[float, str]:
    """Largest error of any example's gradient for any parameter, over the norm of that example's whole gradient.

    Returns:
        The error, and the parameter's name.
    """
    assert set(measured) == set(true), set(measured) ^ set(true)
    whole = _scale(oracle.norms_of(true))
    errors = {
        name: float((((measured[name].double() - g).reshape(len(g), -1).norm(dim=1)) / whole).nan_to_num(nan=1e9).max())
        for name, g in true.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def largest_errors(model: ZooModel, truth: Truth, *, engine: Any, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of norms and clipped sum; in float64 also of the gradients, by what was measured."""
    arguments = (model.loss, model.inputs(dtype), truth.cotangents.to(dtype))
    errors: dict[str, float] = {}
    if dtype == torch.float64:
        gradients = dpdl.per_sample_gradients(model.module(dtype), *arguments, engine=engine)
        error, name = gradient_error(gradients, truth.gradients)
        errors[f"gradient of {name}"] = error
    norms = dpdl.per_sample_norms(model.module(dtype), *arguments, engine=engine).double()
    errors["norms"] = float(((norms - truth.norms).abs() / _scale(truth.norms)).nan_to_num(nan=1e9).max())
    clip = truth.max_grad_norm
    total = dpdl.clipped_sum(model.module(dtype), *arguments, engine=engine, max_grad_norm=clip)
    expected = oracle.clipped_sum_of(truth.gradients, clip)
    error, name = gradient_error(_one_row(total), _one_row(expected))
    errors[f"clipped sum of {name}"] = error
    return errors


def outcome_of(model: ZooModel, truth: Truth, *, engine: Any, dtype: torch.dtype = torch.float64) -> Outcome:
    """The verdict on an engine. An error other than a refusal is a failure here, and not raised."""
    try:
        errors = largest_errors(model, truth, engine=engine, dtype=dtype)
    except ModelError as error:
        return Outcome(verdict="refused", reason=f"{type(error).__name__}: {_line(error)}")
    except Exception as error:  # the table has to go on, and says which error it was
        return Outcome(verdict="failed", reason=f"{type(error).__name__}: {_line(error)}")
    worst = max(errors, key=lambda what: errors[what])
    tolerance = FLOAT32_INSIDE if model.float32_inside and dtype == torch.float64 else TOLERANCE[dtype]
    exact = errors[worst] <= tolerance
    return Outcome(
        verdict="exact" if exact else "failed",
        error=errors[worst],
        reason="" if exact else f"{worst} is off by {errors[worst]:.1e}",
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _scale(norms: Tensor) -> Tensor:
    """What errors are relative to, [N]: an example's norm, or a thousandth of the largest if that is more."""
    return norms.clamp(min=max(1e-3 * float(norms.max()), torch.finfo(torch.float64).tiny))


def _one_row(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.unsqueeze(0) for name, g in gradients.items()}
