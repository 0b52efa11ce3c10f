"""A round against plain loops over records, and its noise against its scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.federated.messages import FitReply
from tests.federated.clients.worlds import N, client, network, records, request, same, sgd, weights

CLIP, LR, MOMENTUM = 0.3, 0.5, 0.9


def by_hand(state: dict[str, Tensor], steps: int, *, proximal: float = 0.0, momentum: float = 0.0) -> dict[str, Tensor]:
    """Gradient descent on clipped gradients of all records, one record at a time, in float64, without noise."""
    names = list(state)
    model = network()
    now = [state[name].clone() for name in names]
    velocity = [torch.zeros_like(w) for w in now]
    for step in range(steps):
        total = [torch.zeros_like(w) for w in now]
        for x, y in zip(*records(), strict=True):
            variables = [w.clone().requires_grad_() for w in now]
            output = torch.func.functional_call(model, dict(zip(names, variables, strict=True)), (x[None],))
            gradients = torch.autograd.grad(F.cross_entropy(output, y[None]), variables)
            norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
            for sums, gradient in zip(total, gradients, strict=True):
                sums += gradient * min(1.0, CLIP / norm)
        for i, name in enumerate(names):
            gradient = total[i] / N + proximal * (now[i] - state[name])
            velocity[i] = gradient if step == 0 else momentum * velocity[i] + gradient
            now[i] = now[i] - LR * velocity[i]
    return {name: w - state[name] for name, w in zip(names, now, strict=True)}


def update_of(answer: object) -> dict[str, Tensor]:
    assert isinstance(answer, FitReply), answer
    return dict(answer.update)


def noiseless(**changed: object) -> dict[str, Tensor]:
    settings = {"noise_multiplier": 0.0, "batch_size": N, "max_grad_norm": CLIP, "optimizer": sgd(LR), **changed}
    return update_of(client(**settings).answer(request(steps=5)))


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=0, atol=tolerance) for name in expected
    )


@pytest.mark.parametrize("engine", ["tape", "vmap", "loop"])
def test_a_round_is_clipped_gradient_descent_from_the_global_weights(engine: str) -> None:
    wide = dpdl.Execution(engine=engine, accumulate_dtype=torch.float64)
    assert close(noiseless(execution=wide), by_hand(weights(), 5))


def test_parts_of_a_batch_and_a_sample_rate_of_one_make_the_same_steps() -> None:
    parts = dpdl.Execution(max_physical_batch_size=5, accumulate_dtype=torch.float64)
    assert close(noiseless(execution=parts), by_hand(weights(), 5))
    assert close(noiseless(sample_rate=1.0, batch_size=None), by_hand(weights(), 5))


def test_the_proximal_term_is_that_of_fedprox_and_is_neither_clipped_nor_divided() -> None:
    wide = dpdl.Execution(accumulate_dtype=torch.float64)
    found = noiseless(proximal=0.7, execution=wide)
    assert close(found, by_hand(weights(), 5, proximal=0.7))
    assert not close(found, by_hand(weights(), 5, proximal=0.6), tolerance=1e-4)
    assert not close(found, by_hand(weights(), 5), tolerance=1e-4)


def test_the_proximal_term_also_pulls_back_what_noise_has_moved() -> None:
    """With a loss linear in the weights gradients are the same everywhere, so that what is left is the term."""

    def linear(output: Tensor, target: Tensor) -> Tensor:
        return (output.sum(1) * (1 + target)).mean()

    def moved(steps: int, proximal: float) -> Tensor:
        model = nn.Linear(3, 2, bias=False).double()
        state = {"weight": torch.zeros(2, 3, dtype=torch.float64)}
        settings = {"model": model, "loss_fn": linear, "batch_size": N, "insecure_seed": 4, "proximal": proximal}
        return update_of(client(**settings).answer(request(state=state, steps=steps)))["weight"]

    one, two, pulled = moved(1, 0.0), moved(2, 0.0), moved(2, 0.8)
    torch.testing.assert_close(pulled - two, -LR * 0.8 * one, rtol=1e-6, atol=1e-9)
    assert one.abs().max() > 1e-3


def test_the_optimizers_state_begins_anew_with_each_round() -> None:
    wide = dpdl.Execution(accumulate_dtype=torch.float64)
    momentum = sgd(LR, momentum=MOMENTUM)
    ward = client(
        noise_multiplier=0.0, batch_size=N, max_grad_norm=CLIP, optimizer=momentum, execution=wide, proximal=0.1
    )
    for round in (1, 2, 3):
        found = update_of(ward.answer(request(round, steps=4)))
        assert close(found, by_hand(weights(), 4, momentum=MOMENTUM, proximal=0.1))


def test_steps_beyond_one_pass_over_the_data_are_taken_in_further_passes() -> None:
    ledger = dpdl.Ledger(relation="add_or_remove")
    update_of(client(ledger, batch_size=N // 2).answer(request(steps=7)))
    assert ledger.releases == 7


def noise_of_one_step(noise_multiplier: float, *, clip: float, lr: float, seed: int | None) -> Tensor:
    """What a step of eight thousand weights adds over the same step without noise, brought to unit scale."""
    inputs = torch.randn(N, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dataset = TensorDataset(inputs, records()[1])

    def update(noise: float) -> Tensor:
        ward = client(
            model=nn.Linear(4000, 2).double(),
            dataset=dataset,
            noise_multiplier=noise,
            max_grad_norm=clip,
            optimizer=sgd(lr),
            insecure_seed=seed,
        )
        state = {"weight": torch.zeros(2, 4000, dtype=torch.float64), "bias": torch.zeros(2, dtype=torch.float64)}
        return torch.cat([t.flatten() for t in update_of(ward.answer(request(state=state, steps=1))).values()])

    return (update(noise_multiplier) - update(0.0)) * (N // 2) / (-lr * noise_multiplier * clip)


def has_unit_variance(values: Tensor) -> bool:
    """Within five standard deviations of chi-square's; 8,002 values tell 5 % in scale apart."""
    count = values.numel()
    return abs(float(values.square().mean()) - 1) < 5 * math.sqrt(2 / count) and abs(float(values.mean())) < 5 / (
        math.sqrt(count)
    )


def test_the_noise_has_the_scale_that_is_accounted() -> None:
    noise = noise_of_one_step(3.0, clip=0.25, lr=0.1, seed=9)
    assert has_unit_variance(noise)
    for wrong in (0.5, 0.9, 1.1, 2.0):
        assert not has_unit_variance(noise * wrong)


def test_other_rounds_federations_and_clients_have_other_noise_and_a_seed_repeats_its_own() -> None:
    def update(name: str = "ward", seed: int | None = 2, **asked: object) -> dict[str, Tensor]:
        return update_of(client(name=name, insecure_seed=seed).answer(request(**asked)))

    assert same(update(), update())
    others = [update(round=2), update(federation="other"), update(name="other"), update(seed=3), update(seed=None)]
    for other in others:
        assert not same(update(), other)
    assert not same(update(seed=None), update(seed=None))


def test_dropout_under_a_seed_repeats_too_and_leaves_the_global_generator_alone() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), network())

    state = {f"1.{name}": tensor for name, tensor in weights().items()}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = update_of(client(model=model, insecure_seed=2).answer(request(state=state)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, update_of(client(model=model, insecure_seed=2).answer(request(state=state))))


def test_a_module_that_was_given_is_left_as_it_was_and_two_clients_may_have_it() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("a", "b"):
        update_of(client(name=name, model=model).answer(request()))
    assert same(before, model.state_dict())
    assert all(p.grad is None for p in model.parameters())


def test_the_replys_state_is_the_requests_and_the_update() -> None:
    answer = client().answer(request())
    assert isinstance(answer, FitReply)
    assert same(answer.state, {name: weights()[name] + answer.update[name] for name in weights()})
    assert all(tensor.abs().max() > 0 for tensor in answer.update.values())


def test_a_loop_of_ones_own_gets_the_private_three() -> None:
    seen = {}

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: object, steps: int) -> dict[str, float]:
        seen["kinds"] = (type(model), type(optimizer), type(loader), steps)
        taken = 0
        while taken < steps:
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                taken += 1
                if taken == steps:
                    break
        model.eval()  # the next round must not stay there
        return {"half": 0.5}

    own = client(train=train, insecure_seed=6, metrics=["half"])
    for round in (1, 2):
        answer = own.answer(request(round))
        assert isinstance(answer, FitReply)
        assert answer.metrics == {"half": 0.5}
        assert same(answer.update, update_of(client(insecure_seed=6).answer(request(round))))
    assert seen["kinds"] == (dpdl.PrivateModel, dpdl.PrivateOptimizer, dpdl.PrivateLoader, 3)


def test_a_loop_that_ends_in_eval_mode_begins_the_next_round_in_training_mode() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), network())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: object, steps: int) -> None:
        x, y = next(iter(loader))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.eval()

    state = {f"1.{name}": tensor for name, tensor in weights().items()}
    own = client(model=model, train=train, insecure_seed=6, steps=1)
    other = client(model=model, insecure_seed=6, steps=1)
    for round in (1, 2):
        expected = update_of(other.answer(request(round, state)))
        assert same(update_of(own.answer(request(round, state))), expected)


def test_a_loop_that_never_drops_gradients_takes_the_next_round_too() -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: object, steps: int) -> None:
        batches = iter(loader)
        for _ in range(steps):
            x, y = next(batches)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    own = client(train=train, insecure_seed=6)
    for round in (1, 2):
        answer = own.answer(request(round, steps=2))
        assert same(update_of(answer), update_of(client(insecure_seed=6).answer(request(round, steps=2))))
