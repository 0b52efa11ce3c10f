"""What `dpdl.fix` would lose is kept or refused, and a refusal changes nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dpdl.errors import ModelError, ParameterError, WrapError
from dpdl.validation import batch_norm_to_group_norm, fix, fix_report, replace_modules
from tests.small_run import FEATURES, examples, same, small_run, weights_of
from tests.validation.small_resnet import images, resnet
from tests.validation.test_conversions import seen_data

X, Y = examples()

# ── classes that do more ────────────────────────────────────────────────────────────────────────────


class NormThenAct(nn.BatchNorm2d):
    """As timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class ActThenNorm(NormThenAct):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


class WithAuxiliary(nn.BatchNorm2d):
    """Its auxiliary norms are a list, and not called."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.aux = nn.ModuleList([nn.BatchNorm2d(channels)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class WithGain(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(1))


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OnlyRenamed(nn.BatchNorm2d):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def test_what_a_class_does_after_normalising_is_kept() -> None:
    norm = seen_data(NormThenAct(3))
    model = nn.Sequential(OrderedDict(bn=norm))
    fixed = fix(model, images())
    assert list(dict(fixed.bn.named_children())) == ["norm", "drop", "act"]
    assert isinstance(fixed.bn.act, nn.ReLU)
    expected = torch.relu(batch_norm_to_group_norm(norm, positions=64)(images()))
    torch.testing.assert_close(fixed.eval()(images()), expected)
    assert "drop, act" in str(fix_report(fixed))
    frozen = fix(model, images(), batch_norm="frozen")
    assert torch.equal(frozen.eval()(images()), model.eval()(images()))
    assert isinstance(fix(OnlyRenamed(4)), nn.GroupNorm)


@pytest.mark.parametrize("kind", [ActThenNorm, WithAuxiliary, WithGain, Doubled])
def test_a_class_that_does_something_else_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ModelError, match=rf"module '0': {kind.__name__}.*would lose"):
        fix(nn.Sequential(kind(3)))


def test_a_forward_put_on_one_module_is_not_lost() -> None:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda x: 3 * nn.BatchNorm2d.forward(norm, x)
    with pytest.raises(ModelError, match="something else"):
        fix(nn.Sequential(norm), inplace=True)


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────


def hooked(register: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    register(model[1])
    return model


def in_data_parallel() -> nn.Module:
    return nn.Sequential(nn.DataParallel(nn.BatchNorm1d(3)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward hook": (lambda: hooked(lambda m: m.register_forward_hook(lambda *_: None)), "forward_hooks.*would lose"),
    "pre-hook": (lambda: hooked(lambda m: m.register_forward_pre_hook(lambda *_: None)), "forward_pre_hooks"),
    "backward hook": (lambda: hooked(lambda m: m.register_full_backward_hook(lambda *_: None)), "backward_hooks"),
    "state hook": (lambda: hooked(lambda m: m.register_state_dict_post_hook(lambda *_: None)), "state_dict_hooks"),
    "parametrization": (
        lambda: hooked(lambda m: nn.utils.parametrize.register_parametrization(m, "weight", nn.Tanh())),
        "has parametrizations.*remove_parametrizations",
    ),
    "lazy batch normalisation": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d()), "'1'.*no shape yet"),
    "lazy linear layer": (lambda: nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), "'0'.*no shape yet"),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.BatchNorm1d(3)), backend="eager"), "compiled"),
    "data parallel": (in_data_parallel, "'0' is a DataParallel"),
}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_and_the_model_left_alone(name: str, inplace: bool) -> None:
    build, words = REFUSED[name]
    model = build()
    before = repr(model)
    with pytest.raises(ModelError, match=words):
        fix(model, inplace=inplace)
    assert repr(model) == before


def test_parametrizations_elsewhere_are_no_obstacle() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    assert isinstance(fix(model, torch.randn(4, 3))[1], nn.GroupNorm)


def test_all_refusals_are_named_at_once_and_nothing_is_replaced() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), Doubled(3), WithGain(3))
    with pytest.raises(ModelError, match=r"(?s)Nothing was replaced.*'1'.*'2'"):
        fix(model, inplace=True)
    assert type(model[0]) is nn.BatchNorm2d


def test_wrong_arguments_are_refused() -> None:
    model = resnet()
    with pytest.raises(ParameterError, match="'group', 'layer', 'instance', 'frozen', got 'GN'"):
        fix(model, batch_norm="GN")
    with pytest.raises(ParameterError, match=r"(?s)'stem.1'.*16 channels.*got 5"):
        fix(model, num_groups=5, inplace=True)
    with pytest.raises(ParameterError, match='for batch_norm="group"'):
        fix(model, batch_norm="layer", num_groups=2)
    with pytest.raises(ParameterError, match="example_batch"):
        fix(model, fold=True)
    with pytest.raises(ParameterError, match="at least two"):
        fix(model, images(1))
    with pytest.raises(WrapError, match="Module, got function"):
        fix(lambda x: x)
    with pytest.raises(WrapError, match="private already"):
        fix(small_run().model)
    assert isinstance(model.norm, nn.BatchNorm1d)


@pytest.mark.parametrize("arguments", [{"batch_norm": "instance"}, {"num_groups": 16}])
def test_what_would_become_a_constant_is_refused(arguments: dict[str, object]) -> None:
    model = resnet()
    with pytest.raises(ModelError, match=r"'norm'.*single values.*\[4, 16\].*constant"):
        fix(model, images(), inplace=True, **arguments)
    assert isinstance(model.stem[1], nn.BatchNorm2d)


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.cache = nn.Parameter(torch.ones(1)) * 2  # with a graph
    with pytest.raises(ModelError, match="inplace=True"):
        fix(model)
    assert fix(model, inplace=True) is model


class RaisesIfFixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.GroupNorm):
            raise RuntimeError("broken by its author")
        return self.norm(x)


def test_an_error_on_the_way_leaves_the_model_as_it_was() -> None:
    model = RaisesIfFixed().double()
    norm, before = model.norm, weights_of(model)
    with pytest.raises(RuntimeError, match="broken by its author"):
        fix(model, X, inplace=True)
    assert model.norm is norm
    assert same(before, weights_of(model))


# ── one's own converter ─────────────────────────────────────────────────────────────────────────────


def test_modules_of_any_kind_are_replaced_by_any_function() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)))
    assert replace_modules(model, lambda _: nn.Tanh(), nn.ReLU) is model
    assert isinstance(model[1][0], nn.Tanh)
    linear = model[1][1]
    replace_modules(model, lambda module: module, nn.Linear)
    assert model[1][1] is linear
    assert isinstance(replace_modules(nn.ReLU(), lambda _: nn.Tanh(), nn.ReLU), nn.Tanh)


def test_modules_inside_of_a_replaced_one_are_not_looked_at() -> None:
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())))
    asked = []

    def convert(module: nn.Module) -> nn.Module:
        asked.append(module)
        return nn.Identity() if module is model[0] else module

    replace_modules(model, convert, nn.Sequential)
    assert len(asked) == 2
    assert isinstance(model[0], nn.Identity)
