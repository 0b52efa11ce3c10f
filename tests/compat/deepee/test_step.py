"""What one step of the facade releases: the numbers, and deepee's defects D1 to D6 and D10."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpdl.compat.deepee import PrivacyWrapper
from dpdl.errors import ExampleMixingError, LossError, ModelError, ParameterError, WrapError
from dpdl.execution import Execution
from tests.compat.deepee.training import clipped_mean, examples, gradients, network, release

B = 4


@pytest.mark.parametrize("clip", [0.1, 100.0])
def test_without_noise_a_step_is_the_mean_of_clipped_gradients_of_each_examples_own_loss(clip: float) -> None:
    x, y = examples(B)
    net = network()
    expected = clipped_mean(copy.deepcopy(net), x, y, clip)
    model = PrivacyWrapper(net, B, clip, 0.0)
    release(model, x, y)
    assert torch.allclose(gradients(net), expected, rtol=1e-5)
    assert float(expected.norm()) > 1e-3


def test_without_clipping_the_mean_gradient_arrives_whole() -> None:  # D4: deepee divides it by B twice
    x, y = examples(B)
    net, plain = network(), network()
    release(PrivacyWrapper(net, B, 1e6, 0.0), x, y)
    F.cross_entropy(plain(x), y).backward()
    assert torch.allclose(gradients(net), gradients(plain), rtol=1e-9)


def test_no_step_reuses_the_gradients_of_earlier_ones() -> None:  # D1
    layer = nn.Linear(1, 1, bias=False)
    model = PrivacyWrapper(layer, 1, 1e6, 0.0)
    seen = []
    for value in (1.0, 10.0, 1.0):
        release(model, torch.tensor([[value]]), torch.zeros(1), loss=lambda output, _: output.mean())
        seen.append(float(layer.weight.grad or 0))
        model.prepare_next_batch()
    assert seen == pytest.approx([1.0, 10.0, 1.0])


@pytest.mark.parametrize(("reduce", "divisor"), [("mean", B), ("sum", 1)])
def test_noise_has_the_scale_of_the_sensitivity_of_what_it_protects(reduce: str, divisor: int) -> None:  # D2
    draws, clip, sigma = 40, 0.5, 2.0
    x = torch.zeros(B, 50, dtype=torch.float64)  # no gradient but the bias's
    layer = nn.Linear(50, 20).double()
    model = PrivacyWrapper(layer, B, clip, sigma)
    noise = []
    for _ in range(draws):
        release(model, x, torch.zeros(B), reduce=reduce, loss=lambda output, _: output.mean())
        assert layer.weight.grad is not None
        noise.append(layer.weight.grad.flatten().clone())
        model.prepare_next_batch()
    drawn = torch.cat(noise)
    error = 5 / (2 * len(drawn)) ** 0.5  # of a standard deviation, at five sigma
    expected = sigma * clip / divisor
    assert float(drawn.std()) == pytest.approx(expected, rel=error)
    for wrong in (expected * B, expected / B, expected * 1.05):
        assert float(drawn.std()) != pytest.approx(wrong, rel=error)


@pytest.mark.parametrize("seed", [0, 42, None])
def test_no_two_parameters_or_steps_share_noise(seed: int | None) -> None:  # D3
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model = PrivacyWrapper(net, 2, 1.0, 1.0, seed=seed)
    found = []
    for _ in range(2):
        release(model, torch.zeros(2, 3).double(), torch.zeros(2), loss=lambda output, _: 0 * output.mean())
        found += [layer.weight.grad.clone() for layer in net]  # type: ignore[union-attr, operator]
        model.prepare_next_batch()
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("seed", [0, 42])
def test_a_seed_repeats_the_noise_and_none_does_not(seed: int) -> None:
    x, y = examples(B)

    def noise(seed: int | None) -> torch.Tensor:
        net = network()
        release(PrivacyWrapper(net, B, 1.0, 1.0, seed=seed), x, y)
        return gradients(net)

    assert torch.equal(noise(seed), noise(seed))
    assert not torch.equal(noise(None), noise(None))


def test_the_secure_generator_needs_no_extra_package_and_excludes_a_seed() -> None:
    PrivacyWrapper(network(), B, 1.0, 1.0, secure_rng=True)
    for seed in (0, 42):  # deepee lets 0 pass
        with pytest.raises(ValueError, match="incompatible with the secure_rng"):
            PrivacyWrapper(network(), B, 1.0, 1.0, secure_rng=True, seed=seed)


def test_nothing_is_copied_and_a_parent_sees_the_weights_only() -> None:  # D5, D10
    net = network()
    model = PrivacyWrapper(net, B, 1.0, 1.0)
    parent = nn.Module()
    parent.dp = model
    assert [id(p) for p in parent.parameters()] == [id(p) for p in net.parameters()]
    assert list(model.state_dict()) == [f"wrapped_model.{name}" for name in net.state_dict()]
    assert len(model.models) == B
    assert all(replica is net for replica in model.models)
    model.to(torch.float32)
    assert all(p.dtype is torch.float32 for replica in model.models for p in replica.parameters())


def test_a_state_dict_that_deepee_saved_loads() -> None:
    net, saved = network(1), network(2).state_dict()
    copies = {f"models.{i}.{name}": tensor for i in range(B) for name, tensor in saved.items()}
    PrivacyWrapper(net, B, 1.0, 1.0).load_state_dict({**{f"wrapped_model.{n}": t for n, t in saved.items()}, **copies})
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in saved.items())


def test_a_parameter_that_no_example_used_gets_its_noise() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    net = Half().double()
    x, y = examples(B)
    release(PrivacyWrapper(net, B, 1.0, 1.0), x, y)
    assert net.unused.weight.grad is not None
    assert net.unused.weight.grad.std() > 0.05


def test_a_non_finite_example_is_left_out() -> None:
    x, y = examples(B)
    net = network()
    expected = clipped_mean(copy.deepcopy(net), x[1:], y[1:], 0.5) * (B - 1) / B
    x[0] = torch.nan
    model = PrivacyWrapper(net, B, 0.5, 0.0)
    release(model, x, y)
    assert torch.allclose(gradients(net), expected, rtol=1e-5)


def test_a_sum_is_refused_until_it_is_declared() -> None:
    x, y = examples(B)

    def summed(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, reduction="sum")

    net = network()
    model = PrivacyWrapper(net, B, 0.1, 0.0)
    with pytest.raises(LossError, match="sum"):
        release(model, x, y, loss=summed)
    model.update_clones()
    model.execution = Execution(loss_reduction="sum")
    release(model, x, y, loss=summed)
    assert torch.allclose(gradients(net), clipped_mean(network(), x, y, 0.1), rtol=1e-5)


def test_execution_takes_no_second_seed_or_batch_size_and_waits_for_the_end_of_a_step() -> None:
    x, _ = examples(B)
    model = PrivacyWrapper(network(), B, 1.0, 1.0)
    for execution in (Execution(insecure_seed=1), Execution(max_physical_batch_size=2)):
        with pytest.raises(ParameterError):
            model.execution = execution
    model(x)
    with pytest.raises(RuntimeError, match="between steps"):
        model.execution = Execution(engine="loop")


@pytest.mark.parametrize("engine", ["tape", "vmap", "loop"])
def test_every_engine_gives_the_same_step(engine: str) -> None:
    x, y = examples(B)
    net = network()
    model = PrivacyWrapper(net, B, 0.1, 0.0)
    model.execution = Execution(engine=engine)  # type: ignore[arg-type]
    release(model, x, y)
    assert torch.allclose(gradients(net), clipped_mean(network(), x, y, 0.1), rtol=1e-5)


def test_a_model_that_mixes_examples_is_refused_though_no_class_gives_it_away() -> None:
    class Centred(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x - x.mean(0))

    x, _ = examples(B)
    with pytest.raises(ExampleMixingError):
        PrivacyWrapper(Centred(3, 2).double(), B, 1.0, 1.0)(x)


def test_training_what_comes_before_the_wrapper_is_refused() -> None:
    x, _ = examples(B)
    with pytest.raises(ModelError, match="requires a gradient"):
        PrivacyWrapper(network(), B, 1.0, 1.0)(nn.Linear(3, 3).double()(x))


def test_evaluation_is_the_plain_model_and_gives_parameters_no_gradient() -> None:
    x, y = examples(3)
    net = network()
    model = PrivacyWrapper(net, B, 1.0, 1.0)
    model.eval()
    assert torch.equal(model(x), net(x))
    probe = x.clone().requires_grad_()
    F.cross_entropy(model(probe), y).backward()
    assert probe.grad is not None
    assert all(p.grad is None for p in net.parameters())
    model.train()
    with torch.no_grad():
        model(x)
    assert not model._forward_succesful


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((network, B, 1.0, 1.0), "base_model"),
        ((network(), 0, 1.0, 1.0), "num_replicas"),
        ((network(), 2.5, 1.0, 1.0), "num_replicas"),
        ((network(), B, 0.0, 1.0), "L2_clip"),
        ((network(), B, float("inf"), 1.0), "L2_clip"),
        ((network(), B, 1.0, -1.0), "noise_multiplier"),
        ((network(), B, 1.0, float("nan")), "noise_multiplier"),
        ((network(), B, 1.0, 1.0, False, "one"), "seed"),
        ((network(), B, 1.0, 1.0, False, None, 8.0), "watchdog"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: tuple[object, ...], named: str) -> None:
    with pytest.raises((ParameterError, WrapError), match=named):
        PrivacyWrapper(*arguments)  # type: ignore[arg-type]


def test_what_takes_privacy_away_is_said(caplog: pytest.LogCaptureFixture) -> None:
    PrivacyWrapper(network(), B, 1.0, 1.0)
    assert not caplog.records
    PrivacyWrapper(network(), B, 1.0, 0.0)
    PrivacyWrapper(network(), B, 1.0, 1.0, seed=0)
    assert [record.message.split(":")[0] for record in caplog.records] == ["noise_multiplier is 0", "seed=0"]


def test_a_wrapper_cannot_be_copied() -> None:
    model = PrivacyWrapper(network(), B, 1.0, 1.0)
    with pytest.raises(WrapError, match="wrapped_model"):
        copy.deepcopy(model)
    assert torch.equal(copy.deepcopy(model.wrapped_model)[0].weight, model.wrapped_model[0].weight)  # type: ignore[operator, index]
