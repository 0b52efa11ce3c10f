"""Gradient inversion: it gets an image back from a clipped gradient, and gives up at noise that protects nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdl
from accountants import Gaussian, PRVAccountant
from dpdl.audit import (
    A_FAILURE_PROVES_NOTHING,
    InversionResult,
    gradient_inversion,
    inferred_label,
    invert_update,
    update_of_one_example,
)
from dpdl.errors import ModelError, ParameterError

SIDE, CLIP = 10, 0.5


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="sum")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 48), nn.Sigmoid(), nn.Linear(48, 10)).double()


def image(seed: int) -> Tensor:
    """Squares on a dark ground, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.rand(1, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    for _ in range(3):
        top, left = torch.randint(SIDE - 3, (2,), generator=generator).tolist()
        x[0, 0, top : top + 4, left : left + 4] += 0.3
    return x


def attacked(sigma: float, seed: int = 0) -> tuple[InversionResult, Tensor]:
    x, y = image(seed), torch.tensor([seed % 10])
    model = network()
    update = update_of_one_example(
        model, loss, x, y, max_grad_norm=CLIP, noise_multiplier=sigma, insecure_seed=100 + seed
    )
    result = invert_update(
        model,
        loss,
        update,
        shape=x.shape,
        last_layer="3",
        max_grad_norm=CLIP,
        noise_multiplier=sigma,
        truth=x,
        restarts=1,
    )
    return result, x


def test_an_update_is_clipped_and_noised_as_said() -> None:
    """Against the gradient of plain autograd."""
    model, x, y = network(), image(0), torch.tensor([4])
    plain = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    norm = torch.cat([g.flatten() for g in plain]).norm()
    assert norm > CLIP
    clean = update_of_one_example(model, loss, x, y, max_grad_norm=CLIP, noise_multiplier=0.0)
    for (name, _), gradient in zip(model.named_parameters(), plain, strict=True):
        torch.testing.assert_close(clean[name], gradient * CLIP / norm)
    noised = update_of_one_example(model, loss, x, y, max_grad_norm=CLIP, noise_multiplier=0.3, insecure_seed=1)
    noise = torch.cat([(noised[name] - clean[name]).flatten() for name in clean])
    assert float(noise.std()) == pytest.approx(0.3 * CLIP, rel=0.05)  # 5338 numbers: 5 standard errors


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_without_noise_a_clipped_gradient_is_the_image(seed: int) -> None:
    found, x = attacked(0.0, seed)
    assert found.label == seed
    assert found.error is not None
    assert found.error < 1e-8
    torch.testing.assert_close(found.guess, x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_it_gives_up_at_noise_whose_epsilon_is_in_the_thousands(seed: int) -> None:
    found, x = attacked(0.01, seed)
    assert found.error is not None
    assert found.error > 0.5 * float(x.var())  # half of what the mean as a guess would have
    assert PRVAccountant().compose(Gaussian(0.01)).epsilon(1e-5) > 5000
    assert A_FAILURE_PROVES_NOTHING in str(found)
    assert "long before differential privacy means anything" in str(found)
    assert "epsilon of this one update 5.4" in str(found)


def test_between_the_two_the_error_grows_with_the_noise() -> None:
    errors = [attacked(sigma)[0].error or 0.0 for sigma in (1e-4, 1e-3, 1e-2)]
    assert errors[0] < errors[1] / 10 < errors[2] / 100


def test_clipping_has_to_be_known_or_the_scale_is_wrong() -> None:
    """What is matched is the clipped gradient: the attack uses max_grad_norm."""
    model, x = network(), image(0)
    update = update_of_one_example(model, loss, x, torch.tensor([0]), max_grad_norm=CLIP, noise_multiplier=0.0)
    blind = invert_update(model, loss, update, shape=x.shape, label=0, truth=x, restarts=1)
    assert blind.error is not None
    assert blind.error > 1e-4


def test_the_mismatch_is_that_of_the_guess_by_plain_autograd() -> None:
    found, _ = attacked(1e-2)
    model, x, y = network(), image(0), torch.tensor([0])
    update = update_of_one_example(model, loss, x, y, max_grad_norm=CLIP, noise_multiplier=1e-2, insecure_seed=100)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(found.guess), y), [*model.parameters()])])
    seen = torch.cat([update[name].flatten() for name, _ in model.named_parameters()])
    clipped = gradient * min(1.0, CLIP / float(gradient.norm()))
    assert found.mismatch == pytest.approx(float((clipped - seen).norm() / seen.norm()) ** 2, rel=1e-6)


def test_a_search_that_goes_astray_comes_back_with_the_best_point_on_its_way() -> None:
    worse = itertools.count()
    start = torch.ones(3, dtype=torch.float64)
    found, distance = gradient_inversion._searched(lambda x: x.square().sum() + 100 * next(worse), start, 5)
    assert next(worse) > 1
    assert torch.equal(found, start)
    assert distance == 3


@pytest.mark.parametrize("label", range(10))
def test_the_label_is_read_off_the_last_layer_with_a_bias_and_without(label: int) -> None:
    x, y = image(1), torch.tensor([label])
    model = network()
    update = dpdl.clipped_sum(model, loss, x, y, max_grad_norm=CLIP, loss_reduction="sum")
    assert inferred_label(update, last_layer="3") == label
    assert inferred_label({"3.weight": update["3.weight"]}, last_layer="3") == label


def test_model_and_generators_stay_as_they_were() -> None:
    model, x = network(), image(0)
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    told: list[int] = []
    update = update_of_one_example(model, loss, x, torch.tensor([0]), max_grad_norm=CLIP, noise_multiplier=0.0)
    invert_update(
        model,
        loss,
        update,
        shape=x.shape,
        label=0,
        iterations=3,
        progress=lambda done, restarts, mismatch: told.append(done),
    )
    assert all(torch.equal(p, was) and p.grad is None for p, was in zip(model.parameters(), before, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert told == [1, 2]


def test_what_cannot_be_inverted_is_refused() -> None:
    model, x, y = network(), image(0), torch.tensor([0])
    update = update_of_one_example(model, loss, x, y, max_grad_norm=CLIP, noise_multiplier=0.0)
    zero = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    with pytest.raises(ParameterError, match=r"lacks \['1.weight'\]"):
        invert_update(model, loss, {k: v for k, v in update.items() if k != "1.weight"}, shape=x.shape, label=0)
    with pytest.raises(ParameterError, match="shape must be that of one example"):
        invert_update(model, loss, update, shape=(2, 1, SIDE, SIDE), label=0)
    with pytest.raises(ParameterError, match="Give the label, or last_layer"):
        invert_update(model, loss, update, shape=x.shape)
    with pytest.raises(ParameterError, match=r"has no '9.weight'"):
        invert_update(model, loss, update, shape=x.shape, last_layer="9")
    with pytest.raises(ParameterError, match="The update is zero"):
        invert_update(model, loss, zero, shape=x.shape, label=0)
    with pytest.raises(ParameterError, match="restarts must be a whole number >= 1, got 0"):
        invert_update(model, loss, update, shape=x.shape, label=0, restarts=0)
    with pytest.raises(ParameterError, match="one example"):
        update_of_one_example(model, loss, x.repeat(2, 1, 1, 1), y, max_grad_norm=CLIP, noise_multiplier=0.0)
    with pytest.raises(ModelError, match="no parameter that requires a gradient"):
        invert_update(model.requires_grad_(False), loss, update, shape=x.shape, label=0)
