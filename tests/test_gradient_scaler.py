"""`torch.amp.GradScaler`: its scale is taken out before clipping, and it learns nothing of private gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpdl
from dpdl.errors import PrivacyError, PrivacyWarning, StepError
from tests.oracles import one_at_a_time, several_contributions
from tests.several_ways import DATA, DATASET, PLAIN, WAYS, A, Y, critic
from tests.small_run import N, network, refused, released, same, small_run, weights_of


def scaled_release(private: dpdl.Private, scaler: torch.amp.GradScaler, *, unscale: bool = False) -> dict[str, Tensor]:
    taken = private.optimizer.steps_taken
    for a, b, y, _ in private.loader:
        private.optimizer.zero_grad()
        scaler.scale(F.cross_entropy(private.model(a), y)).backward()
        scaler.scale(private.model(b).square().sum(1).mean()).backward()
        if unscale:
            scaler.unscale_(private.optimizer)
            assert nn.utils.clip_grad_norm_(private.model.parameters(), 1.0) == 0
        scaler.step(private.optimizer)
        scaler.update()
        if private.optimizer.steps_taken > taken:
            break
    return released(private)


@pytest.mark.parametrize("physical", [None, 5])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("scale", [65536.0, 1000.0, 1.0])
def test_a_gradient_scaler_changes_nothing_but_the_way(scale: float, unscale: bool, physical: int | None) -> None:
    private = WAYS["crossed"].run(max_physical_batch_size=physical)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    true = WAYS["crossed"].clipped_sum()
    got = scaled_release(private, scaler, unscale=unscale)
    # 1 / 1000 is told in float32 by unscale_; how much is clipped does not depend on it.
    assert one_at_a_time.worst_error(got, true)[0] < (1e-7 if unscale and scale == 1000.0 else 1e-9)
    assert scaler.get_scale() == scale
    assert not hasattr(private.optimizer, "grad_scale")


def test_scaling_goes_on_step_after_step_with_and_without_zero_grad() -> None:
    scaled, plain = PLAIN.run(), PLAIN.run()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        for private in (scaled, plain):
            a, _, y, _ = next(iter(private.loader))
            loss = F.cross_entropy(private.model(a), y)
            if number % 2:
                private.optimizer.zero_grad()
            if private is plain:
                loss.backward()
                private.optimizer.step()
                continue
            scaler.scale(loss).backward()
            if number >= 2:
                scaler.unscale_(private.optimizer)
            scaler.step(private.optimizer)
            scaler.update()
    left, right = weights_of(scaled.model), weights_of(plain.model)
    for name, weight in left.items():
        torch.testing.assert_close(weight, right[name], rtol=1e-12, atol=1e-15)


def test_empty_draws_are_steps_of_a_scaled_run_too() -> None:
    private = small_run(dataset=DATASET, batch_size=1, steps=30)
    scaler = torch.amp.GradScaler("cpu")
    sizes = []
    while private.optimizer.steps_taken < 30:
        for a, _, y, _ in private.loader:
            sizes.append(len(a))
            private.optimizer.zero_grad()
            scaler.scale(F.cross_entropy(private.model(a), y)).backward()
            scaler.step(private.optimizer)
            scaler.update()
    assert 0 in sizes
    assert len(sizes) == 30


def test_half_precision_is_scaled_as_in_plain_training() -> None:
    """Multiplied by N for a mean first, the outputs' gradients would overflow at a scale of 65,536."""
    model = network(torch.float32)
    with torch.no_grad():
        model[2].bias[:] = torch.tensor([30.0, 0.0])  # certain, and for half of the examples wrong
    true = several_contributions.clipped_sum(
        copy.deepcopy(model).double(), [lambda m, e: F.cross_entropy(m(e[0]), e[2])], DATA, PLAIN.clip
    )
    private = small_run(model.half(), dataset=DATASET, max_grad_norm=PLAIN.clip)
    scaler = torch.amp.GradScaler("cpu")
    a, _, y, _ = next(iter(private.loader))
    scaler.scale(F.cross_entropy(private.model(a.half()).float(), y)).backward()
    scaler.step(private.optimizer)
    scaler.update()
    assert private.optimizer.diagnostics.non_finite == 0
    assert one_at_a_time.worst_error(released(private), true)[0] < 2e-2


def test_an_overflow_skips_no_step_and_does_not_reach_the_scaler() -> None:
    """Whether private gradients overflow is private."""
    private = small_run(network(torch.float32), dataset=DATASET, noise_multiplier=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    a, _, y, _ = next(iter(private.loader))
    before = weights_of(private.model)
    scaler.scale(1e3 * F.cross_entropy(private.model(a.float()), y)).backward()
    scaler.step(private.optimizer)
    scaler.update()
    assert private.optimizer.steps_taken == 1
    assert private.optimizer.diagnostics.non_finite == N
    assert scaler.get_scale() == pytest.approx(1e38)
    after = weights_of(private.model)
    assert not same(before, after)
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())


def test_a_scale_that_grows_is_warned_of() -> None:
    private = PLAIN.run()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    scaled_release(private, scaler)
    assert scaler.get_scale() == 16.0
    with pytest.warns(PrivacyWarning, match="growth_interval"):
        got = scaled_release(private, scaler)
    assert all(bool(torch.isfinite(total).all()) for total in got.values())


def test_a_refused_step_does_not_leave_its_scale_for_the_next() -> None:
    private = PLAIN.run()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    a, _, y, _ = next(iter(private.loader))
    F.cross_entropy(private.model.module(A.clone()), Y).backward()
    scaler.scale(F.cross_entropy(private.model(a), y)).backward()
    with refused(private, StepError, "did not come from the private model"):
        scaler.step(private.optimizer)
    private.optimizer.zero_grad()
    scaler.scale(F.cross_entropy(private.model(a), y)).backward()
    scaler.step(private.optimizer)
    true = PLAIN.clipped_sum()
    assert one_at_a_time.worst_error(released(private), true)[0] < 1e-9


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 0.0])
def test_a_scale_that_cannot_be_taken_out_is_refused(scale: float) -> None:
    private = PLAIN.run()
    critic(private.model, next(iter(private.loader)))
    private.optimizer.grad_scale = torch.tensor(scale)
    with refused(private, PrivacyError, "gradient scaler", "init_scale"):
        private.optimizer.step()


def test_a_parameter_frozen_after_backward_is_not_moved_by_its_zero_gradient() -> None:
    private = small_run(dataset=DATASET, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5))
    a, _, y, _ = next(iter(private.loader))
    F.cross_entropy(private.model(a), y).backward()
    bias = private.model[2].bias  # the smallest
    assert bias.grad is not None
    assert not bool(bias.grad.any())
    before = bias.detach().clone()
    bias.requires_grad_(False)
    private.optimizer.step()
    assert torch.equal(bias, before)


def test_the_model_can_be_copied_between_backward_and_step() -> None:
    private = PLAIN.run()
    critic(private.model, next(iter(private.loader)))
    twin = copy.deepcopy(private.model)
    assert same(weights_of(twin), weights_of(private.model))
    private.optimizer.step()


def test_no_gradient_is_left_before_a_logical_batch_is_complete() -> None:
    private = WAYS["critic"].run(max_physical_batch_size=5)
    for batch in private.loader:
        critic(private.model, batch)
        private.optimizer.step()
        left = [p.grad is not None for p in private.model.parameters()]
        assert all(left) if private.optimizer.steps_taken else not any(left)
