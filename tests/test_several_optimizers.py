"""A private optimizer beside others: a generator, public batches, one model in two private runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import StepError, WrapError
from tests.oracles.one_at_a_time import per_sample_gradients
from tests.small_run import N, examples, network, small_run

NOISES, CLIP, RATE = 4, 0.5, 0.1


def generator() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(NOISES, 3, dtype=torch.float64)


def discriminator() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def test_of_a_gan_the_discriminator_is_private_and_the_generator_learns_from_it() -> None:
    rows, _ = examples()
    loader = DataLoader(TensorDataset(rows), batch_size=N)
    plain = discriminator()
    plan = dpdl.PrivacyPlan(sample_rate=1.0, expected_batch_size=N, steps=5, noise_multiplier=0.0, max_grad_norm=CLIP)
    judge, step_judge, batches = dpdl.make_private(plain, torch.optim.SGD(plain.parameters(), lr=RATE), loader, plan)
    make = generator()
    step_make = torch.optim.SGD(make.parameters(), lr=RATE)
    torch.manual_seed(7)
    for (real,) in batches:
        before = {name: p.detach().clone() for name, p in judge.named_parameters()}
        noise = torch.randn(len(real), NOISES, dtype=torch.float64)
        fake = make(noise)

        step_judge.zero_grad()
        loss = F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean()
        loss.backward()
        step_judge.step()
        # Example n's own loss is that of real and fake row n together, clipped as one.
        expected = _clipped_average(before, real, fake.detach())
        for name, p in judge.named_parameters():
            torch.testing.assert_close(p.detach(), before[name] - RATE * expected[name])

        judge.eval()  # its weights are constants now, and the gradient goes through to the generator
        weights = [p.detach().clone() for p in judge.parameters()]
        step_make.zero_grad()
        F.softplus(-judge(make(noise))).mean().backward()
        twin = discriminator()
        twin.load_state_dict(judge.state_dict())
        wanted = torch.autograd.grad(F.softplus(-twin(make(noise))).mean(), list(make.parameters()))
        for p, gradient in zip(make.parameters(), wanted, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, gradient)
        step_make.step()
        judge.train()
        assert all(torch.equal(p, kept) for p, kept in zip(judge.parameters(), weights, strict=True))
    assert step_judge.steps_taken == 1


def _clipped_average(state: dict[str, Tensor], real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    model = discriminator()
    model.load_state_dict(state)

    def loss(outputs: Tensor, kinds: Tensor) -> Tensor:
        return F.softplus(-outputs * kinds).mean()

    kinds = torch.ones(len(real), 1, dtype=torch.float64)
    of_real = per_sample_gradients(model, loss, real, kinds)
    of_fake = per_sample_gradients(model, loss, fake, -kinds)
    rows = {name: of_real[name] + of_fake[name] for name in of_real}
    norms = torch.stack([row.flatten(1).square().sum(1) for row in rows.values()]).sum(0).sqrt()
    assert (norms > CLIP).any()
    weights = (CLIP / norms).clamp(max=1)
    return {name: torch.tensordot(weights, row, 1) / len(real) for name, row in rows.items()}


def test_public_batches_cost_nothing_and_touch_nothing_private() -> None:
    private = small_run(noise_multiplier=1.0, steps=4)
    public = torch.optim.SGD(private.model.module.parameters(), lr=RATE)
    x, y = examples(5)
    for batch, classes in private.loader:
        private.optimizer.zero_grad()
        F.cross_entropy(private.model(batch), classes).backward()
        private.optimizer.step()
        private.optimizer.zero_grad()
        spent = private.optimizer.epsilon(1e-5)

        before = [p.detach().clone() for p in private.model.parameters()]
        F.cross_entropy(private.model.module(x), y).backward()
        public.step()
        public.zero_grad()
        assert not any(torch.equal(p, b) for p, b in zip(private.model.parameters(), before, strict=True))
        assert private.optimizer.epsilon(1e-5) == spent


def test_a_public_gradient_that_is_left_behind_is_not_stepped_on() -> None:
    private = small_run(noise_multiplier=1.0)
    x, y = examples(5)
    batch, classes = next(iter(private.loader))
    F.cross_entropy(private.model.module(x), y).backward()
    F.cross_entropy(private.model(batch), classes).backward()
    with pytest.raises(StepError, match="did not come from the private model"):
        private.optimizer.step()
    assert private.optimizer.steps_taken == 0


def test_one_model_cannot_be_in_two_private_runs() -> None:
    model = network()
    small_run(model)
    with pytest.raises(WrapError, match="part of a private run already"):
        small_run(model)


def test_frozen_parameters_stay_and_unfrozen_ones_join_with_noise() -> None:
    private = small_run(noise_multiplier=1.0, steps=4)
    first = private.model.module[0]
    first.requires_grad_(False)
    frozen = [p.detach().clone() for p in first.parameters()]
    for turn in range(2):
        for batch, classes in private.loader:
            private.optimizer.zero_grad()
            F.cross_entropy(private.model(batch), classes).backward()
            private.optimizer.step()
        moved = [not torch.equal(p, kept) for p, kept in zip(first.parameters(), frozen, strict=True)]
        assert moved == [turn == 1] * 2
        first.requires_grad_(True)
