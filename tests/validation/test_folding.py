"""Frozen normalisations folded into the layer before them: the same function, and only where nothing else sees it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dpdl.errors import ModelError
from dpdl.validation import Conversion, FrozenBatchNorm, fix, fix_report
from tests.small_run import same, weights_of
from tests.validation.small_resnet import images, resnet
from tests.validation.test_conversions import seen_data
from tests.validation.test_fix_refusals import NormThenAct

Layers = dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]]
LAYERS: Layers = {
    "linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d, (5, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d, (5, 4, 7, 6)),
    "conv2d without bias, dilated": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False),
        nn.BatchNorm2d,
        (5, 4, 7, 6),
    ),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (5, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (5, 4, 3, 4, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d, (5, 4, 7)),
    "transposed 2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d, (5, 4, 5, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), nn.BatchNorm3d, (5, 4, 3, 2, 3)),
}


def pair(layer: nn.Module, norm: nn.Module, *more: nn.Module) -> nn.Sequential:
    names = ("layer", "norm", "third", "fourth")
    model = nn.Sequential(OrderedDict(zip(names, (layer, seen_data(norm), *more), strict=False)))
    return model.double().requires_grad_(False)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_computes_what_both_did(name: str, affine: bool) -> None:
    build, norm, shape = LAYERS[name]
    model = pair(build(), norm(6, affine=affine, eps=0.1), nn.ReLU(inplace=True))
    fixed = fix(model, numbers(*shape), batch_norm="frozen", fold=True)
    assert type(fixed.norm) is nn.Identity
    assert type(fixed.layer) is type(model.layer)
    x = numbers(*shape) * 3
    torch.testing.assert_close(fixed.train()(x.clone()), copy.deepcopy(model).eval()(x.clone()), rtol=1e-12, atol=1e-12)
    assert fix_report(fixed).change.eval.relative < 1e-12
    assert not any(p.requires_grad for p in fixed.parameters())
    assert "folded into 'layer'" in str(fix_report(fixed))


def test_a_whole_network_is_folded_in_place_or_not() -> None:
    model = resnet().requires_grad_(False)
    model.head.requires_grad_(True)
    before = weights_of(model)
    fixed = fix(model, images(), batch_norm="frozen", fold=True)
    assert same(before, weights_of(model))
    left = [name for name, module in fixed.named_modules() if isinstance(module, FrozenBatchNorm)]
    assert left == ["norm"]  # behind a mean over positions
    assert fix_report(fixed).not_folded == {"norm": "no layer is right before it"}
    assert "'norm' is not folded: no layer is right before it." in str(fix_report(fixed))
    assert fix_report(fixed).change.eval.relative < 1e-5
    assert torch.equal(fix(model, images(), batch_norm="frozen", fold=True, inplace=True)(images()), fixed(images()))


def test_what_was_frozen_before_can_be_folded_later() -> None:
    frozen = fix(pair(nn.Linear(4, 6), nn.BatchNorm1d(6)), batch_norm="frozen")
    folded = fix(frozen, numbers(5, 4), fold=True)
    (conversion,) = fix_report(folded).conversions
    assert conversion.before.startswith("FrozenBatchNorm")
    assert isinstance(conversion, Conversion)


def test_the_parts_behind_a_normalisation_stay_when_it_is_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), seen_data(NormThenAct(4))).double().requires_grad_(False)
    x = numbers(5, 3, 6, 6)
    fixed = fix(model, x, batch_norm="frozen", fold=True)
    assert [type(part) for part in fixed[1]] == [nn.Identity, nn.Dropout, nn.ReLU]
    torch.testing.assert_close(fixed.eval()(x), model.eval()(x))
    (conversion,) = fix_report(fixed).conversions
    assert conversion.paths == ("1",)
    assert "folded into '0'" in conversion.after
    assert "parts remain" in conversion.after


class Using(nn.Module):
    """A convolution and its batch normalisation, in some arrangement."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), seen_data(nn.BatchNorm2d(3))
        for name, part in parts.items():
            setattr(self, name, part)
        self.requires_grad_(False)
        self.way = forward

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def used_twice(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    output: Tensor = m.norm(y) + y
    return output


def otherwise_in_training(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    output: Tensor = m.norm(y) + y if m.training else m.norm(y)
    return output


def by_the_data(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    output: Tensor = y if y.sum() > 1e9 else m.norm(y)
    return output


def trained(part: str) -> nn.Module:
    model = Using(lambda m, x: m.norm(m.conv(x)))
    getattr(model, part).requires_grad_(True)
    return model


def tied() -> nn.Module:
    model = Using(lambda m, x: m.norm(m.conv(x)) + m.other(x), other=nn.Conv2d(3, 3, 1))
    model.other.weight = model.conv.weight
    return model


def parametrized() -> nn.Module:
    model = Using(lambda m, x: m.norm(m.conv(x)))
    parametrizations.weight_norm(model.conv)
    return model.requires_grad_(False)


def hooked() -> nn.Module:
    model = Using(lambda m, x: m.norm(m.conv(x)))
    model.conv.register_forward_hook(lambda *_: None)
    return model


NOT_FOLDED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "output used twice": (lambda: Using(used_twice), "is used elsewhere"),
    "layer called twice": (lambda: Using(lambda m, x: m.norm(m.conv(m.conv(x)))), "called several times"),
    "norm called twice": (lambda: Using(lambda m, x: m.norm(m.norm(m.conv(x)))), "called 2 times"),
    "weights used elsewhere": (lambda: Using(lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum()), "by themselves"),
    "something between": (lambda: Using(lambda m, x: m.norm(m.conv(x).relu())), "no layer is right before"),
    "another module": (lambda: Using(lambda m, x: m.norm(m.act(m.conv(x))), act=nn.ReLU()), "before it is a ReLU"),
    "another way in training": (lambda: Using(otherwise_in_training), "depends on the mode"),
    "a way that depends on data": (lambda: Using(by_the_data), "cannot be traced"),
    "trained layer": (lambda: trained("conv"), "is trained"),
    "trained norm": (lambda: trained("norm"), "is trained"),
    "tied weight": (tied, "tied to another"),
    "parametrization": (parametrized, "hooks or parametrizations|ParametrizedConv2d"),
    "hook": (hooked, "hooks or parametrizations"),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_where_something_else_would_see_it_the_norm_stays_and_the_report_says_why(name: str) -> None:
    build, reason = NOT_FOLDED[name]
    model = build()
    fixed = fix(model, images(), batch_norm="frozen", fold=True)
    assert isinstance(fixed.norm, FrozenBatchNorm)
    why = fix_report(fixed).not_folded["norm"]
    assert any(words in why for words in reason.split("|")), why
    assert fix_report(fixed).change.eval.max_abs == 0


def test_a_linear_layer_whose_positions_are_normalised_is_not_folded() -> None:
    """[N, L, C] through BatchNorm1d(L): as many positions as features, and no error would tell."""
    model = pair(nn.Linear(4, 6), nn.BatchNorm1d(6))
    fixed = fix(model, numbers(5, 6, 4), batch_norm="frozen", fold=True)
    assert isinstance(fixed.norm, FrozenBatchNorm)
    assert "last axis" in fix_report(fixed).not_folded["norm"]


def test_arguments_that_the_example_leaves_out_leave_the_graph_open() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = pair(nn.Linear(4, 6), nn.BatchNorm1d(6))

        def forward(self, x: Tensor, raw: bool = False) -> Tensor:
            return self.body.layer(x) if raw else self.body(x)

    fixed = fix(Optional(), numbers(5, 4), batch_norm="frozen", fold=True)
    assert isinstance(fixed.body.norm, FrozenBatchNorm)
    assert "leaves out" in fix_report(fixed).not_folded["body.norm"]


def test_an_error_after_folding_restores_both() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = pair(nn.Linear(4, 6), nn.BatchNorm1d(6))

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.body.norm, nn.Identity):
                raise ModelError("broken by its author")
            y: Tensor = self.body(x)
            return y

    model = Picky()
    layer, norm = model.body.layer, model.body.norm
    with pytest.raises(ModelError, match="broken by its author"):
        fix(model, numbers(5, 4), batch_norm="frozen", fold=True, inplace=True)
    assert model.body.layer is layer
    assert model.body.norm is norm
