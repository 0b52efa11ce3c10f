"""Gradients that have not come through the private model, or that somebody looks for where there are none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpdl
from dpdl.errors import LossError, StepError
from tests.misuse.case import Trial, misuse
from tests.small_run import (
    examples,
    network,
    released,
    same,
    small_run,
    step_once,
    weights_of,
)

X, Y = examples()
GRADIENTS = "Gradients from elsewhere"


def forward(private: dpdl.Private) -> Tensor:
    """A loss of a fresh batch."""
    x, y = next(iter(private.loader))
    return F.cross_entropy(private.model(x), y)


def plain(tensor: Tensor) -> Tensor:
    """As if it had never come from the private loader."""
    return tensor.detach().clone().as_subclass(Tensor)


@misuse(
    GRADIENTS,
    tried="step() of the plain optimizer, after backward() through the private model",
    peer="Opacus: steps un-noised and unclipped, no error",
    refused=StepError,
)
def step_of_the_plain_optimizer(trial: Trial) -> None:
    private = small_run()
    forward(private).backward()
    with trial.refused(private):
        private.optimizer.inner.step()


@misuse(
    GRADIENTS,
    tried="another optimizer on the same parameters steps after backward() through the private model",
    peer="Opacus: steps un-noised and unclipped, no error",
    harmless="backward leaves nothing but zeros in p.grad: there is nothing to step with",
)
def another_optimizer_on_the_same_parameters(trial: Trial) -> None:
    private = small_run()
    raw = torch.optim.SGD(private.model.parameters(), lr=1.0)
    before = weights_of(private.model)
    forward(private).backward()
    raw.step()
    assert same(before, weights_of(private.model))
    assert not any(p.grad is not None and p.grad.any() for p in private.model.parameters())


@misuse(
    GRADIENTS,
    tried="a fused 'optimizer in backward': hooks on the parameters that step at once",
    harmless="no gradient of a parameter is ever computed by backward: the hooks see none",
)
def optimizer_in_backward(trial: Trial) -> None:
    model = network()
    seen: list[Tensor] = []
    for p in model.parameters():
        p.register_hook(lambda gradient: seen.append(gradient))
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    private = small_run(model)
    step_once(private)
    assert not seen


@misuse(
    GRADIENTS,
    tried="the plain module is called on the private batch, besides the private model",
    refused=LossError,
)
def the_plain_module_on_the_private_batch(trial: Trial) -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    loss = F.cross_entropy(private.model(x), y) + F.cross_entropy(private.model.module(x), y)
    with trial.refused(private):
        loss.backward()


@misuse(GRADIENTS, tried="the plain module's gradients, from data that no loader followed", refused=StepError)
def the_plain_module_on_other_data(trial: Trial) -> None:
    private = small_run()
    F.cross_entropy(private.model.module(X), Y).backward()
    forward(private).backward()
    with trial.refused(private, saying="'0.weight'"):
        private.optimizer.step()


@misuse(
    GRADIENTS,
    tried="left-over gradients of a public warm-up, no zero_grad() before the first step",
    refused=StepError,
)
def gradients_left_over_from_before(trial: Trial) -> None:
    model = network()
    F.cross_entropy(model(X), Y).backward()
    private = small_run(model)
    forward(private).backward()
    with trial.refused(private):
        private.optimizer.step()


@misuse(GRADIENTS, tried="p.grad written by hand before step()", refused=StepError)
def gradients_written_by_hand(trial: Trial) -> None:
    private = small_run()
    forward(private).backward()
    for p in private.model.parameters():
        p.grad = torch.ones_like(p)
    with trial.refused(private):
        private.optimizer.step()


@misuse(GRADIENTS, tried="p.grad of the last step changed in place, then the next step", harmless="it is replaced")
def released_gradients_changed_in_place(trial: Trial) -> None:
    disturbed, quiet = small_run(noise_multiplier=1.0), small_run(noise_multiplier=1.0)
    for private in (disturbed, quiet):
        step_once(private)
        if private is disturbed:
            for p in private.model.parameters():
                assert p.grad is not None
                p.grad.mul_(1e6)
        forward(private).backward()
        private.optimizer.step()
    assert same(weights_of(disturbed.model), weights_of(quiet.model))


@misuse(
    GRADIENTS,
    tried="torch.autograd.grad(loss, parameters), to take the gradients past the optimizer",
    harmless="backward never reaches the parameters: all are None",
)
def gradients_asked_of_autograd(trial: Trial) -> None:
    private = small_run()
    found = torch.autograd.grad(forward(private), list(private.model.parameters()), allow_unused=True)
    assert found == (None,) * 4


@misuse(
    GRADIENTS,
    tried="clip_grad_norm_ between backward() and step(), as in a plain loop",
    harmless="there is nothing to clip yet; the release is the same",
)
def clip_grad_norm_as_well(trial: Trial) -> None:
    clipping, quiet = small_run(), small_run()
    forward(clipping).backward()
    nn.utils.clip_grad_norm_(clipping.model.parameters(), 1e-6)
    clipping.optimizer.step()
    step_once(quiet)
    assert same(released(clipping), released(quiet))


@misuse(
    GRADIENTS,
    tried="weight decay, large enough to outweigh the noise",
    harmless="it is applied by the optimizer to the public weights; what is released of the data is the same",
)
def weight_decay(trial: Trial) -> None:
    decaying = small_run(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=10.0))
    quiet = small_run(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    step_once(decaying)
    step_once(quiet)
    assert same(released(decaying), released(quiet))


@misuse(GRADIENTS, tried="backward(create_graph=True): gradients of private gradients", refused=StepError)
def gradients_of_gradients(trial: Trial) -> None:
    private = small_run()
    with trial.refused(private):
        forward(private).backward(create_graph=True)
        private.optimizer.step()


@misuse(
    GRADIENTS,
    tried="a GradScaler of 2^16, which multiplies gradients before they are clipped",
    peer="Opacus: norms times 65,536 are clipped, then un-scaled, no error",
    harmless="the scale is taken out before clipping: the release is that of a run without",
)
def a_gradient_scaler(trial: Trial) -> None:
    scaled, quiet = small_run(max_grad_norm=0.3), small_run(max_grad_norm=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(forward(scaled)).backward()
    scaler.step(scaled.optimizer)
    scaler.update()
    step_once(quiet)
    for name, gradient in released(quiet).items():
        torch.testing.assert_close(released(scaled)[name], gradient, rtol=1e-9, atol=1e-12)
