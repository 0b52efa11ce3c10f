"""Parameters used where function modes do not see, or see under a transform: exact or refused, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpdl
from dpdl.errors import ModelError
from dpdl.per_sample.batch import ExampleBatch
from dpdl.per_sample.select import select_engine
from tests.per_sample.tape.against_autograd import (
    Numbers,
    Using,
    assert_same,
    check,
    cotangents_of,
    measured,
    refusal_of,
    truth,
)

Forward = Callable[[Any, Tensor], Tensor]


def layers(forward: Callable[..., Any], **more: Any) -> nn.Module:
    """A model of two linear layers, a scale, and whatever else."""
    members: dict[str, Any] = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "scale": Numbers(5)(4), **more}
    return Using(forward, **members)


class Clipped(torch.autograd.Function):
    """An activation with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 + x.square())


class Affine(torch.autograd.Function):
    """x weight^T, as a user may write it; function modes do not see inside, and do not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


def test_activations_with_gradients_of_their_own() -> None:
    check(layers(lambda m, x: m.second(Clipped.apply(m.first(x)))), Numbers()(4, 4, 4))


def outside(forward: Forward, x: Tensor) -> tuple[str, str]:
    """What the tape says of a model that it must not run; and which engine auto takes, which must be exact."""
    model = layers(forward).double()
    refusal = refusal_of(model, x)
    trainable = dict(model.named_parameters())
    selection = select_engine("auto", model, ExampleBatch.from_call((x,), {}), trainable)
    assert selection.engine.name in ("vmap", "loop")
    true = truth(model, (x,))
    found = dpdl.per_sample_gradients(model, _loss, x, None, engine="auto", loss_reduction="sum")
    for name, expected in true.gradients.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
    return refusal, selection.note


def _loss(output: Tensor, _: Any) -> Tensor:
    return (output * cotangents_of([tuple(output.shape)])[0]).sum()


def test_a_custom_function_that_takes_a_parameter_is_refused_by_name() -> None:
    refusal, note = outside(lambda m, x: Affine.apply(m.first(x), m.second.weight), Numbers()(4, 4, 4))
    assert "second.weight" in refusal
    assert "first" not in refusal
    assert "second.weight" in note
    derived, _ = outside(lambda m, x: Affine.apply(m.first(x), m.second.weight.exp()), Numbers()(4, 4, 4))
    assert "second.weight" in derived


HIDDEN: dict[str, Forward] = {
    "functional_call of a part": lambda m, x: torch.func.functional_call(
        m.first, {"weight": m.second.weight, "bias": 2 * m.first.bias}, (x,)
    ),
    "vmap with a parameter": lambda m, x: torch.func.vmap(lambda row: m.first(row))(x),
    "vmap over parameters": lambda m, x: torch.func.vmap(F.linear, in_dims=(None, 0))(
        x, torch.stack([m.first.weight, m.second.weight])
    ).transpose(0, 1),
    "vmap over positions": lambda m, x: torch.func.vmap(m.first, in_dims=1, out_dims=1)(x),
    "grad inside of the model": lambda m, x: torch.func.grad(lambda z: m.first(z).sin().sum())(x),
    "autograd.grad inside": lambda m, x: _inner_gradient(m, x),
    "hook on a tensor": lambda m, x: _hooked(m.first(x)),
    "attention with learned keys": lambda m, x: m.attention(x, x, x)[0],
    "jvp": lambda m, x: torch.func.jvp(m.first, (x,), (torch.ones_like(x),))[1],
    "torch.ops": lambda m, x: torch.ops.aten.mul(x, m.scale),
    "aten linear": lambda m, x: torch.ops.aten.linear(x, m.first.weight, m.first.bias),
    "utils.parameters_to_vector": lambda m, x: x * nn.utils.parameters_to_vector(m.first.parameters())[:4],
    "torch.cond": lambda m, x: torch.where(x.sum() > 0, x, x) @ m.first.weight,
    "jit function": lambda m, x: _scripted(x, m.first.weight),
    "script and a rule": lambda m, x: _scripted(m.first(x), m.first.weight),
    "tensor.apply of a subclass": lambda m, x: F.linear(x, m.first.weight.as_subclass(torch.Tensor)),
}


def _inner_gradient(m: Any, x: Tensor) -> Tensor:
    z = x.detach().clone().requires_grad_()
    energy = torch.tanh(m.first(z)).square().sum()
    (gradient,) = torch.autograd.grad(energy, z, create_graph=True)
    return m.second(gradient)


def _hooked(h: Tensor) -> Tensor:
    h.register_hook(lambda gradient: 2 * gradient)
    return h


@torch.jit.script
def _scripted(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("engine", ["tape", "auto"])
def test_parameters_reached_by_other_ways_are_exact_or_refused(name: str, engine: Any) -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    model, x = layers(HIDDEN[name], attention=attention).double(), Numbers()(4, 4, 4)
    true = truth(model, (x,))
    try:
        found = dpdl.per_sample_gradients(model, _loss, x, None, engine=engine, loss_reduction="sum")
    except ModelError:
        assert engine == "tape"
        return
    for parameter, expected in true.gradients.items():
        torch.testing.assert_close(found[parameter], expected, rtol=1e-10, atol=1e-12)


class Listed(nn.Module):
    """Holds its parameters in a list besides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(Numbers(1)(4, 4)), nn.Parameter(Numbers(2)(4))
        self.listed = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.listed[0] + self.listed[1]


def test_parameters_held_in_a_list() -> None:
    model, x = Listed(), Numbers()(3, 4, 4)
    found = measured(model, (x,))
    direct = Using(lambda m, x: x @ m.a + m.b, a=Numbers(1)(4, 4), b=Numbers(2)(4))
    assert_same(found, truth(direct, (x,)), torch.float64)
    with pytest.raises(ModelError, match="'a'"):  # engines that hand parameters in would not reach the list
        dpdl.per_sample_gradients(model, _loss, x, None, engine="auto", loss_reduction="sum")


def test_a_hook_on_a_derived_weight_is_refused_and_each_example_then_meets_it_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.first.weight - m.first.weight.mean(1, keepdim=True)
        if weight.requires_grad:
            weight.register_hook(lambda gradient: gradient / gradient.norm().clamp_min(0.1))
        return x @ weight.t()

    refusal, _ = outside(forward, Numbers()(5, 4))
    assert "a hook is put on what is made of first.weight" in refusal
