"""Losses that are not the mean of the examples' own, and data that is changed before its gradient is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import LossError, ModelError, StepError
from tests.misuse.case import Trial, misuse
from tests.oracles.one_at_a_time import clipped_sum_of, norms_of, per_sample_gradients
from tests.small_run import CLASSES, N, examples, network, released, same, small_run, step_once, weights_of

X, Y = examples()
LOSSES = "Losses"
WEIGHTS = torch.tensor([0.2, 3.0], dtype=torch.float64)
TOKENS = torch.arange(N * 3).reshape(N, 3) % 5


def batch_of(private: dpdl.Private) -> tuple[Tensor, Tensor]:
    x, y = next(iter(private.loader))
    return x, y


def assert_loss_refused(trial: Trial, private: dpdl.Private, loss: Tensor) -> None:
    with trial.refused(private):
        loss.backward()


@misuse(
    LOSSES,
    tried="a sum over examples, declared as a mean",
    peer="Opacus: no warning, norms times the batch size",
    refused=LossError,
)
def a_sum_declared_as_a_mean(trial: Trial) -> None:
    private = small_run()
    x, y = batch_of(private)
    assert_loss_refused(trial, private, F.cross_entropy(private.model(x), y, reduction="sum"))


@misuse(LOSSES, tried="a mean over examples, declared as a sum", refused=LossError)
def a_mean_declared_as_a_sum(trial: Trial) -> None:
    private = small_run(loss_reduction="sum")
    x, y = batch_of(private)
    assert_loss_refused(trial, private, F.cross_entropy(private.model(x), y))


@misuse(
    LOSSES,
    tried="a mean over class weights (cross_entropy with weight=)",
    refused=LossError,
)
def a_class_weighted_mean(trial: Trial) -> None:
    private = small_run(dataset=TensorDataset(X, (torch.arange(N) < 2).long()))
    x, y = batch_of(private)
    assert_loss_refused(trial, private, F.cross_entropy(private.model(x), y, weight=WEIGHTS))


@misuse(
    LOSSES,
    tried="the same, where the first half of the batch has as much of each class as the second",
    refused=LossError,
)
def a_class_weighted_mean_of_balanced_halves(trial: Trial) -> None:
    private = small_run(dataset=TensorDataset(X, torch.arange(N) % 2))
    x, y = batch_of(private)
    assert_loss_refused(trial, private, F.cross_entropy(private.model(x), y, weight=WEIGHTS))


@misuse(
    LOSSES,
    tried="a mean over all unpadded tokens of the batch (ignore_index)",
    peer="Opacus hooks: norms off by a factor of 0.21 to 1.26",
    refused=LossError,
)
def a_mean_over_unpadded_tokens(trial: Trial) -> None:
    labels = torch.where(torch.arange(3) <= torch.arange(N).unsqueeze(1) // 4, TOKENS, -100)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    private = small_run(model, dataset=TensorDataset(TOKENS, labels))
    x, y = batch_of(private)
    loss = F.cross_entropy(private.model(x).flatten(0, 1), y.flatten(), ignore_index=-100)
    assert_loss_refused(trial, private, loss)


@misuse(LOSSES, tried="a contrastive loss over pairs of examples", refused=LossError)
def a_contrastive_loss(trial: Trial) -> None:
    private = small_run()
    x, _ = batch_of(private)
    h = F.normalize(private.model(x), dim=1)
    assert_loss_refused(trial, private, F.cross_entropy(h @ h.T, torch.arange(len(h))))


@misuse(LOSSES, tried="a penalty on the batch's mean output", refused=LossError)
def a_penalty_on_the_mean(trial: Trial) -> None:
    private = small_run()
    x, y = batch_of(private)
    output = private.model(x)
    assert_loss_refused(trial, private, F.cross_entropy(output, y) + output.mean(0).square().sum())


@misuse(LOSSES, tried="the worst example's loss (max over the batch)", refused=LossError)
def the_maximum_over_examples(trial: Trial) -> None:
    private = small_run()
    x, y = batch_of(private)
    assert_loss_refused(trial, private, F.cross_entropy(private.model(x), y, reduction="none").max())


@misuse(LOSSES, tried="a loss of the detached output", refused=LossError)
def a_detached_loss(trial: Trial) -> None:
    private = small_run()
    x, y = batch_of(private)
    assert_loss_refused(trial, private, F.cross_entropy(private.model(x).detach().requires_grad_(True), y))


@misuse(
    LOSSES,
    tried="a mean loss, whose gradients are divided by the batch size before clipping",
    peer="deepee (D4): divided before and after; a true mean gradient of 1.0 arrives as 0.5 at batch size 2",
    harmless="each example's own gradient is clipped: the clipped sum is that of one-at-a-time autograd",
)
def a_mean_loss_is_not_divided_twice(trial: Trial) -> None:
    rows = per_sample_gradients(network(), F.cross_entropy, X, Y)
    clip = float(norms_of(rows).median())
    private = small_run(max_grad_norm=clip)
    step_once(private)
    for name, expected in clipped_sum_of(rows, clip).items():
        torch.testing.assert_close(released(private)[name], expected)


@misuse(
    LOSSES,
    tried="a sum loss, declared as one",
    peer="deepee (D2): noise is too small by the batch size (0.2495 where 1.0 is needed)",
    harmless="the noise has standard deviation noise_multiplier times max_grad_norm on the sum",
)
def noise_of_a_sum_loss(trial: Trial) -> None:
    model = nn.Linear(60, 60, bias=False).double()
    data = TensorDataset(torch.zeros(N, 60).double())
    private = small_run(model, dataset=data, noise_multiplier=2.0, max_grad_norm=0.5, loss_reduction="sum")
    (x,) = next(iter(private.loader))
    private.model(x).square().sum().backward()
    private.optimizer.step()
    spread = released(private)["weight"].std()  # of 3600 draws: three standard errors are 3.5 %
    assert 0.96 < spread < 1.04


@misuse(
    LOSSES,
    tried="the batch is changed in place between backward() and step()",
    refused=StepError,
    fails="torch's own RuntimeError about in-place operations comes out of step(), nothing is spent",
)
def the_batch_changed_before_the_step(trial: Trial) -> None:
    private = small_run()
    x, y = batch_of(private)
    F.cross_entropy(private.model(x), y).backward()
    x.mul_(100)
    with trial.refused(private):
        private.optimizer.step()


@misuse(LOSSES, tried="weights are written to between forward and step()", refused=ModelError)
def weights_changed_before_the_step(trial: Trial) -> None:
    private = small_run()
    x, y = batch_of(private)
    F.cross_entropy(private.model(x), y).backward()
    with torch.no_grad():
        private.model.module[0].weight.mul_(3)  # type: ignore[index,operator,union-attr]
    with trial.refused(private):
        private.optimizer.step()


@misuse(
    LOSSES,
    tried="a stray forward in training mode, then a usual step",
    peer="Opacus: 'Per sample gradient is not initialized'",
    harmless="what was not part of the loss leaves nothing behind",
)
def a_stray_forward(trial: Trial) -> None:
    disturbed, quiet = small_run(), small_run()
    for private in (disturbed, quiet):
        x, y = batch_of(private)
        if private is disturbed:
            private.model(x)
        F.cross_entropy(private.model(x), y).backward()
        private.optimizer.step()
    assert same(weights_of(disturbed.model), weights_of(quiet.model))


@misuse(
    LOSSES,
    tried="two forwards over one batch in one loss",
    harmless="an example's two gradients are added up before they are clipped, so its share stays bounded",
)
def two_forwards_in_one_loss(trial: Trial) -> None:
    private = small_run(max_grad_norm=0.05)
    x, y = batch_of(private)
    (F.cross_entropy(private.model(x), y) + private.model(2 * x).square().sum(1).mean()).backward()
    private.optimizer.step()
    norm = torch.cat([g.flatten() for g in released(private).values()]).norm()
    assert 0 < norm <= 0.05 * N
    assert private.optimizer.diagnostics.examples == N


@misuse(
    LOSSES, tried="backward(gradient=...) of the outputs, with gradients that mix nothing", harmless="exact as a sum"
)
def backward_from_the_outputs(trial: Trial) -> None:
    private = small_run(loss_reduction="sum", max_grad_norm=1e9)
    x, _ = batch_of(private)
    private.model(x).backward(torch.ones(N, CLASSES, dtype=torch.float64))
    private.optimizer.step()
    twin = network()
    twin(X).sum().backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(released(private)[name], p.grad)
