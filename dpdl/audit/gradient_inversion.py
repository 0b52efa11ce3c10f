"""An example from the update that it made: the label read off the last layer, the input by matching gradients.

    update = update_of_one_example(model, loss_fn, x, y, max_grad_norm=1.0, noise_multiplier=0.0)
    print(invert_update(model, loss_fn, update, shape=x.shape, max_grad_norm=1.0, truth=x))

Whoever gets the gradient of one example, or of few, looks for an input whose gradient is the same [1]; the label of one
example under cross-entropy is the one whose part of the last layer's gradient is negative [2]. On small smooth networks
and un-noised gradients, clipped or not, the input comes back to many digits.

**The attack gives up long before differential privacy means anything.** On images of 14x14 random pixels (variance
0.083) and a network with one hidden layer of 64 sigmoids, clipped, its mean squared error is below 1e-20 without noise,
6e-6 at a noise multiplier of 1e-4, 6e-4 at 1e-3, and at 0.01 most of the variance, 0.06: where the epsilon of that one
release is still above 5000 at delta = 1e-5. That it fails is no sign of privacy; that it succeeds is a sign that there
is none. Attackers who know more (other examples, a set of candidates, priors on images) go on where this one stops.

Private: the example. Public, to the attacker: weights, loss, clipping norm, and the update.

References:
    [1] Zhu, Liu, Han, Deep Leakage from Gradients, NeurIPS 2019. arXiv:1906.08935, algorithm 1 (L-BFGS).
    [2] Zhao, Mopuri, Bilen, iDLG: Improved Deep Leakage from Gradients, 2020. arXiv:2001.02610, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from accountants import Gaussian, PRVAccountant
from dpdl.audit.verdict import A_FAILURE_PROVES_NOTHING
from dpdl.errors import ModelError, ParameterError
from dpdl.noise import gaussian_mechanism
from dpdl.per_sample import clipped_sum
from dpdl.per_sample.randomness import isolated_randomness
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum

__all__ = ["InversionResult", "Progress", "inferred_label", "invert_update", "update_of_one_example"]

LossFunction = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[int, int, float], None]
"""Told (restarts done, restarts, smallest mismatch so far)."""

SHOWN_DELTA = 1e-5  # at which a result says what the update's noise was worth
_HISTORY = 50  # pairs that L-BFGS keeps: enough for images of a thousand pixels


def no_progress(done: int, restarts: int, mismatch: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InversionResult:
    """What was found.

    Attributes:
        guess: the input, shape [1, ...].
        label: the label it was found under.
        mismatch: relative squared distance of the guess's update from the one that was seen; 0 is a perfect match.
        error: mean squared error of the guess against the truth, per number; None if no truth was given.
        noise_multiplier: of the update, if it was said.

    Guarantee:
        None: of one attack; a guess that is wrong proves nothing.
    """

    guess: Tensor
    label: int
    mismatch: float
    error: float | None
    noise_multiplier: float | None

    def __str__(self) -> str:
        against = "" if self.error is None else f", mean squared error {self.error:.2g}"
        worth = ""
        if self.noise_multiplier:
            epsilon = PRVAccountant().compose(Gaussian(self.noise_multiplier)).epsilon(SHOWN_DELTA)
            worth = f", epsilon of this one update {epsilon:.3g} at delta = {SHOWN_DELTA:g}"
        return (
            f"gradient inversion: label {self.label}, mismatch {self.mismatch:.2g}{against}{worth}; it gives up long "
            f"before differential privacy means anything, and {A_FAILURE_PROVES_NOTHING}"
        )


def update_of_one_example(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    *,
    max_grad_norm: float,
    noise_multiplier: float,
    insecure_seed: int | None = None,
) -> dict[str, Tensor]:
    """The noisy clipped sum of a step whose batch is one example, as this library's steps release it.

    Args:
        model: the network, with parameters that require gradients.
        loss_fn: (outputs, targets) to the sum over rows.
        x: shape [1, ...].
        y: shape [1].
        max_grad_norm: C > 0.
        noise_multiplier: sigma >= 0, noise std over C.
        insecure_seed: to get the same noise again.

    Returns:
        Parameter name to the update, shaped as the parameter, not divided by a batch size.

    Guarantee:
        That of the Gaussian mechanism with noise_multiplier, for one release; none at 0.

    Raises:
        ParameterError: not one example; a value out of range.
    """
    _refuse_several(x)
    sums = clipped_sum(model, loss_fn, x, y, max_grad_norm=max_grad_norm, loss_reduction="sum")
    stream = RandomStream.from_os() if insecure_seed is None else RandomStream.from_insecure_seed(insecure_seed)
    total = ClippedSum(tensors=sums, sensitivity=max_grad_norm, examples=1, clipped=0, non_finite=0)
    return gaussian_mechanism(total, noise_multiplier=noise_multiplier, stream=stream, step=0).tensors


def inferred_label(update: Mapping[str, Tensor], *, last_layer: str) -> int:
    """The label of the one example that made an update under cross-entropy.

    The gradient by the scores is softmax minus one-hot: negative for the label alone; the last bias has just that
    gradient, and each row of the last weight has it times the same features                    [2, section 3.2]

    Args:
        update: parameter name to the update; clipping does not change signs, noise does.
        last_layer: name of the last linear layer: "<name>.bias" is used, or, without one, "<name>.weight", whose
            features must not be negative (after ReLU or a sigmoid) for the signs to hold.

    Returns:
        The label: the most negative entry.

    Guarantee:
        None, as of `invert_update`; under noise it is a guess.

    Raises:
        ParameterError: the update has no such layer.
    """
    bias, weight = update.get(f"{last_layer}.bias"), update.get(f"{last_layer}.weight")
    if bias is not None:
        return int(bias.argmin())
    if weight is None:
        raise ParameterError(f"The update has no '{last_layer}.weight'. last_layer is one of {sorted(update)}.")
    return int(weight.flatten(1).sum(dim=1).argmin())


def invert_update(
    model: nn.Module,
    loss_fn: LossFunction,
    update: Mapping[str, Tensor],
    *,
    shape: Sequence[int],
    label: int | None = None,
    last_layer: str | None = None,
    max_grad_norm: float | None = None,
    noise_multiplier: float | None = None,
    truth: Tensor | None = None,
    iterations: int = 200,
    restarts: int = 2,
    seed: int = 0,
    progress: Progress = no_progress,
) -> InversionResult:
    """Look for the example whose clipped gradient is the update.

    Minimises |clip(gradient at x', label) - update|^2 / |update|^2 over x' by L-BFGS from random starts  [1, alg. 1].

    Args:
        model: as it was when the update was made. Smooth activations: with ReLU the second derivatives that the search
            follows are mostly zero.
        loss_fn: (outputs, targets) to the sum over rows.
        update: parameter name to the update of one example, not divided by a batch size.
        shape: of the input, [1, ...].
        label: the example's, if known; else `inferred_label` is asked, for which `last_layer` is needed.
        last_layer: name of the last linear layer.
        max_grad_norm: C of the clipping; None if the update was not clipped.
        noise_multiplier: of the update, only to say in the result what it was worth.
        truth: the example, shape [1, ...], only to measure the error.
        iterations: L-BFGS steps of each start, >= 1.
        restarts: starts, >= 1; the best match is kept.
        seed: of the starts; torch's generators stay as they are.
        progress: told after each start.

    Returns:
        The guess of the start that matched best.

    Guarantee:
        None: it is an attack, and fails long before differential privacy means anything (see the module's docstring).

    Raises:
        ParameterError: names or shapes do not fit, the update is zero, or a setting is out of range.
        ModelError: the model has no parameter that requires a gradient.

    References:
        As [1] and [2] above.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to match.")
    _refuse_settings(parameters, update, shape, truth, iterations, restarts)
    if label is None:
        if last_layer is None:
            raise ParameterError("Give the label, or last_layer for it to be inferred from.")
        label = inferred_label(update, last_layer=last_layer)
    some = next(iter(parameters.values()))
    seen = {name: update[name].to(some) for name in parameters}
    size = sum(float(tensor.square().sum()) for tensor in seen.values())
    if not size > 0:
        raise ParameterError("The update is zero: there is nothing to match.")
    target = torch.tensor([label], device=some.device)

    def mismatch(guess: Tensor) -> Tensor:
        free = {name: p.requires_grad_() for name, p in parameters.items()}
        loss = loss_fn(functional_call(model, free, (guess,)), target).sum()
        found = dict(zip(free, torch.autograd.grad(loss, list(free.values()), create_graph=True), strict=True))
        scale = _clip_weight(found, max_grad_norm)
        return torch.stack([(scale * found[name] - seen[name]).square().sum() for name in seen]).sum() / size

    best, guess = math.inf, torch.zeros(tuple(shape), dtype=some.dtype, device=some.device)
    with isolated_randomness(some.device):
        torch.manual_seed(seed)
        for number in range(1, restarts + 1):
            start = torch.randn(tuple(shape), dtype=some.dtype).to(some.device)
            found, distance = _searched(mismatch, start, iterations)
            if distance < best:
                best, guess = distance, found
            progress(number, restarts, best)
    error = None if truth is None else float((guess - truth.to(guess)).square().mean())
    return InversionResult(guess=guess, label=label, mismatch=best, error=error, noise_multiplier=noise_multiplier)


def _searched(mismatch: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, float]:
    """One descent: the point that matched best on the way, and how well. Noise can send the last step far off."""
    guess = start.clone().requires_grad_()
    best, kept = math.inf, start
    optimizer = torch.optim.LBFGS(
        [guess],
        max_iter=iterations,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        nonlocal best, kept
        distance = mismatch(guess)
        (guess.grad,) = torch.autograd.grad(distance, guess)
        if (now := float(distance.detach())) < best:
            best, kept = now, guess.detach().clone()
        return distance.detach()

    optimizer.step(closure)
    return kept, best


def _clip_weight(gradient: Mapping[str, Tensor], max_grad_norm: float | None) -> Tensor:
    """min(1, C / norm), with its derivative: an attacker who knows C clips its guesses the same way."""
    norm = torch.stack([tensor.square().sum() for tensor in gradient.values()]).sum().sqrt()
    if max_grad_norm is None:
        return torch.ones_like(norm)
    return max_grad_norm / norm.clamp_min(max_grad_norm)


def _refuse_several(x: Tensor) -> None:
    if x.ndim == 0 or len(x) != 1:
        raise ParameterError(f"x must be one example, shape [1, ...], got shape {tuple(x.shape)}.")


def _refuse_settings(
    parameters: Mapping[str, Tensor],
    update: Mapping[str, Tensor],
    shape: Sequence[int],
    truth: Tensor | None,
    iterations: int,
    restarts: int,
) -> None:
    wrong = [n for n, p in parameters.items() if n not in update or update[n].shape != p.shape]
    if wrong:
        raise ParameterError(f"The update lacks {wrong}, or has them in other shapes. Give one tensor a parameter.")
    if not all(bool(torch.isfinite(update[name]).all()) for name in parameters):
        raise ParameterError("The update is not finite: it cannot be matched.")
    if not shape or shape[0] != 1 or (truth is not None and tuple(truth.shape) != tuple(shape)):
        got = "" if truth is None else f", truth of {tuple(truth.shape)}"
        raise ParameterError(f"shape must be that of one example, [1, ...], got {tuple(shape)}{got}.")
    for name, value in (("iterations", iterations), ("restarts", restarts)):
        if not isinstance(value, int) or value < 1:
            raise ParameterError(f"{name} must be a whole number >= 1, got {value!r}.")
