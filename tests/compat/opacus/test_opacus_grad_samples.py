"""`p.grad_sample` outside of private runs, against gradients taken one at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpdl.compat.opacus import GradSampleModule, GradSampleModuleFastGradientClipping
from dpdl.compat.opacus.errors import AccumulationError, BufferError, EmptyBatchError
from dpdl.compat.opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping, get_gsm_class
from dpdl.compat.opacus.grad_sample.linear import compute_linear_grad_sample
from dpdl.compat.opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention, SequenceBias
from dpdl.compat.opacus.utils.module_utils import are_state_dict_equal
from dpdl.compat.opacus.utils.per_sample_gradients_utils import check_per_sample_gradients_are_correct
from tests.compat.opacus.small_run import N, examples, network
from tests.oracles.one_at_a_time import per_sample_gradients


def _assert_rows(model: Any, rows: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample.double(), rows[name.removeprefix("_module.")], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["hooks", "ew", "ghost"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_each_example(mode: str, reduction: str) -> None:
    x, y = examples()
    plain = network()
    model: Any = get_gsm_class(mode)(copy.deepcopy(plain), batch_first=True, loss_reduction=reduction)
    F.cross_entropy(model(x), y, reduction=reduction).backward()
    _assert_rows(model, per_sample_gradients(plain, F.cross_entropy, x, y))
    F.cross_entropy(plain(x), y, reduction=reduction).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)  # and p.grad is what it always is


def test_gradients_of_several_batches_are_a_list() -> None:
    x, y = examples()
    model: Any = GradSampleModule(network())
    for rows in (slice(0, 5), slice(5, N)):
        F.cross_entropy(model(x[rows]), y[rows]).backward()
    p = model._module[0].weight
    assert [len(part) for part in p.grad_sample] == [5, N - 5]
    oracle = per_sample_gradients(network(), F.cross_entropy, x, y)["0.weight"]
    torch.testing.assert_close(torch.cat(p.grad_sample).double(), oracle, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    assert p.grad_sample is None
    model.forbid_grad_accumulation()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(AccumulationError):
        F.cross_entropy(model(x), y).backward()


def test_two_forwards_before_a_backward_are_added_up() -> None:
    x, y = examples()
    model: Any = GradSampleModule(network())
    (F.cross_entropy(model(x), y) + F.cross_entropy(model(2 * x), y)).backward()
    one = per_sample_gradients(network(), F.cross_entropy, x, y)["2.weight"]
    two = per_sample_gradients(network(), F.cross_entropy, 2 * x, y)["2.weight"]
    torch.testing.assert_close(model._module[2].weight.grad_sample.double(), one + two, rtol=1e-4, atol=1e-5)


def test_a_forward_that_is_never_used_does_no_harm() -> None:
    x, y = examples()
    model: Any = GradSampleModule(network())
    unused = model(x)
    F.cross_entropy(model(x), y).backward()
    _assert_rows(model, per_sample_gradients(network(), F.cross_entropy, x, y))
    assert unused.requires_grad


def test_lazy_gradients_behave_as_tensors() -> None:
    x, y = examples()
    model: Any = GradSampleModule(network())
    F.cross_entropy(model(x), y).backward()
    g = model._module[0].weight.grad_sample
    assert isinstance(g, torch.Tensor)
    assert (g.shape, g.dtype, len(g)) == ((N, 4, 3), torch.float32, N)
    assert torch.equal(torch.einsum("n...->...", g), g.plain().sum(0))
    assert torch.equal(g[2:4] * 2, g.plain()[2:4] * 2)
    assert torch.equal(g.norm(2), g.plain().norm(2))
    assert "tensor" in repr(g)


def test_attributes_weights_and_the_plain_module() -> None:
    plain = network()
    plain.extra = "kept"  # type: ignore[assignment]
    model: Any = GradSampleModule(plain)
    assert model.extra == "kept"
    assert model.get_submodule("_module.0") is plain[0]
    with pytest.raises(AttributeError):
        _ = model.fc3
    assert set(model.state_dict()) == {f"_module.{name}" for name in plain.state_dict()}
    other: Any = GradSampleModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    other.load_state_dict(plain.state_dict())  # plain names
    assert are_state_dict_equal(other._module.state_dict(), plain.state_dict())
    other.load_state_dict(model.state_dict())
    assert model.to_standard_module() is plain
    assert not hasattr(plain[0].weight, "grad_sample")
    plain(examples()[0]).sum().backward()
    assert plain[0].weight.grad is not None


def test_hooks_leave_the_model_as_it_was() -> None:
    x, y = examples()
    model = network()
    hooks = GradSampleHooks(model)
    F.cross_entropy(model(x), y).backward()
    _assert_rows(model, per_sample_gradients(network(), F.cross_entropy, x, y))
    assert set(model.state_dict()) == set(network().state_dict())
    hooks.cleanup()
    assert torch.equal(model(x), network()(x))
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_norms_and_clipping_weights_of_ghost_modules() -> None:
    x, y = examples()
    rows = per_sample_gradients(network(), F.cross_entropy, x, y)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()]).norm(dim=0)
    wrapped: Any = GradSampleModuleFastGradientClipping(network(), max_grad_norm=2.0)
    model = network()
    hooks = GradSampleHooksFastGradientClipping(model, max_grad_norm=2.0)
    for called, of in ((wrapped, wrapped), (model, hooks)):
        F.cross_entropy(called(x), y).backward()
        torch.testing.assert_close(of.get_norm_sample().double(), norms, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of.get_clipping_coef().double(), (2.0 / norms).clamp(max=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        wrapped._module[0].weight._norm_sample.double(), rows["0.weight"].flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5
    )


def test_what_mixes_examples_is_refused_at_once() -> None:
    with pytest.raises(BufferError, match=r"'1'.*ModuleValidator"):
        GradSampleModule(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


class _First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (
            self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]
        )
        return out


@pytest.mark.parametrize("kind", [DPRNN, DPGRU, DPLSTM])
def test_recurrent_layers_are_torchs_own_and_right(kind: Any) -> None:
    layer = kind(3, 4, batch_first=True)
    assert check_per_sample_gradients_are_correct(torch.randn(4, 5, 3), _First(layer), atol=1e-5, rtol=1e-3)
    assert isinstance(layer, kind.__mro__[1])
    assert set(layer.state_dict()) == set(kind.__mro__[1](3, 4).state_dict())


def test_attention_and_its_learned_row() -> None:
    attention = _First(DPMultiheadAttention(4, 2, add_bias_kv=True, batch_first=True))
    assert check_per_sample_gradients_are_correct(torch.randn(3, 5, 4), attention, atol=1e-5, rtol=1e-3)
    for batch_first in (True, False):
        bias = SequenceBias(4, batch_first=batch_first)
        x = torch.randn(3, 5, 4)
        rows = bias(x) if batch_first else bias(x.transpose(0, 1)).transpose(0, 1)
        assert torch.equal(rows[:, :5], x)
        assert torch.equal(rows[:, 5], bias.bias.expand(3, 4))


def test_convolutions_with_padding_modes_that_opacus_gets_wrong() -> None:
    for mode in ("circular", "reflect", "replicate"):
        layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
        assert check_per_sample_gradients_are_correct(torch.randn(3, 2, 5, 5), layer, atol=1e-5, rtol=1e-3)
    with pytest.raises(EmptyBatchError):
        check_per_sample_gradients_are_correct(torch.zeros(0, 2, 5, 5), layer)


def test_the_linear_formula() -> None:
    layer = nn.Linear(3, 2)
    x, back = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    found = compute_linear_grad_sample(layer, [x], back)
    for n in range(4):
        weight, bias = torch.autograd.grad((layer(x[n]) * back[n]).sum(), [layer.weight, layer.bias])
        torch.testing.assert_close(found[layer.weight][n], weight)
        torch.testing.assert_close(found[layer.bias][n], bias)
