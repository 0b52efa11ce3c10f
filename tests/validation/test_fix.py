"""`dpdl.fix`: the model can be trained privately afterwards, and is otherwise what it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpdl.validation import FrozenBatchNorm, check, fix, fix_report
from tests.small_run import FEATURES, N, examples, same, small_run, step_once, weights_of
from tests.validation.mixers import BATCH_NORMS, InstanceNormThatTracks, model_with
from tests.validation.small_resnet import images, resnet

X, Y = examples()
CHOICES = ("group", "layer", "instance", "frozen")

# ── what comes out ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch_norm", ["group", "layer", "frozen"])
@pytest.mark.parametrize("with_batch", [True, False])
def test_a_fixed_model_is_clean_and_trains_privately(batch_norm: str, with_batch: bool) -> None:
    model = fix(resnet(), images() if with_batch else None, batch_norm=batch_norm)
    assert check(model, images())
    model = model.double()
    data = TensorDataset(images(N).double(), Y)
    private = small_run(model, dataset=data, noise_multiplier=1.0, accumulate_dtype=torch.float64)
    before = weights_of(private.model)
    step_once(private)
    assert private.model.engine_name == "tape"
    moved = {name for name, weight in weights_of(private.model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, _ in private.model.named_parameters()}


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_every_batch_normalisation_is_repaired(name: str) -> None:
    model = model_with(BATCH_NORMS[name]())
    fixed = fix(model, X)
    assert check(fixed, X)
    assert isinstance(fixed.body.bad, nn.GroupNorm)
    assert fix_report(fixed).remaining == ()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize("batch_norm", CHOICES)
def test_a_model_that_is_itself_a_batch_normalisation(batch_norm: str, kind: type[nn.Module]) -> None:
    axes = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: 2}[kind]
    norm = kind(6)
    x = torch.randn(4, 6, *[5] * axes)
    fixed = fix(norm, x, batch_norm=batch_norm)
    assert check(fixed, x)
    assert fix_report(fixed).conversions[0].paths == ("",)
    assert fix(norm, inplace=True).weight is norm.weight


def test_groups_are_chosen_by_the_shapes_of_the_example_batch() -> None:
    model = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32))
    assert fix(model)[1].num_groups == 2
    assert fix(model, torch.randn(4, 3, 20))[1].num_groups == 32
    assert fix(model, torch.randn(4, 3, 2))[1].num_groups == 4


def test_the_values_of_the_example_batch_never_reach_the_model() -> None:
    models = [fix(resnet(), scale * images()) for scale in (1, 100)]
    assert same(weights_of(models[0]), weights_of(models[1]))
    assert repr(models[0]) == repr(models[1])


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_one_that_is_frozen_stays_so_in_training_mode(scale: float) -> None:
    """A pretrained model: batch normalisation in eval mode inside of a model in training mode."""
    model = resnet().train()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in frozen:
        module.eval()
    fixed = fix(model, scale * images())
    assert isinstance(fixed.blocks[0].bn1, FrozenBatchNorm)
    assert isinstance(fixed.norm, nn.GroupNorm)
    fixed = fix(resnet(), images(), batch_norm="frozen")
    change = fix_report(fixed).change
    assert change.eval.max_abs == 0
    assert change.train.max_abs > 0
    assert torch.equal(fixed.train()(images()), resnet().eval()(images()))


def test_a_whole_model_in_eval_mode_is_not_taken_for_frozen() -> None:
    assert isinstance(fix(resnet().eval()).norm, nn.GroupNorm)


def test_without_statistics_eval_mode_is_not_frozen() -> None:
    """It normalises by the batch then, too."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4, track_running_stats=False).eval()).double()
    assert not check(model, X)
    assert check(fix(model, X), X)


def test_instance_normalisation_that_keeps_statistics_is_repaired() -> None:
    model = model_with(InstanceNormThatTracks())
    assert not check(model, X)
    fixed = fix(model, X)
    assert check(fixed, X)
    assert fix_report(fixed).change.train.max_abs == 0
    model.body.bad.norm.eval()
    assert isinstance(fix(model).body.bad.norm, FrozenBatchNorm)
    untouched = nn.Sequential(nn.InstanceNorm2d(3))
    assert fix(untouched, inplace=True)[0] is untouched[0]
    assert fix_report(untouched).conversions == ()


def test_layers_that_peers_replace_stay() -> None:
    """Opacus needs modules of its own for these; the engines take torch's."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.gru = nn.GRU(4, 4, batch_first=True)
            self.rnn = nn.RNN(4, 4, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
            return self.act(self.attention(y, y, y)[0])

    x = torch.randn(4, 5, 4)
    fixed = fix(Recurrent(), x)
    assert fix_report(fixed).conversions == ()
    assert fix_report(fixed).remaining == ()
    assert fixed.act.inplace


# ── identity ────────────────────────────────────────────────────────────────────────────────────────


def test_a_copy_is_changed_unless_asked() -> None:
    model = resnet()
    before, text = weights_of(model), repr(model)
    fixed = fix(model, images())
    assert fixed is not model
    assert same(before, weights_of(model))
    assert text == repr(model)
    assert {id(p) for p in fixed.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert fix(model, images(), inplace=True) is model
    assert isinstance(model.norm, nn.GroupNorm)


def test_in_place_an_optimizer_keeps_its_parameters() -> None:
    model = resnet()
    parameters = dict(model.named_parameters())
    fix(model, inplace=True)
    after = dict(model.named_parameters())
    assert parameters.keys() == after.keys()
    assert all(after[name] is p for name, p in parameters.items())


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(3, 3))})
    fixed = fix(model)
    assert isinstance(fixed["a"], nn.GroupNorm)
    assert fixed["b"][0] is fixed["a"]
    (conversion,) = fix_report(fixed).conversions
    assert conversion.paths == ("a", "b.0")
    assert "'a' = 'b.0'" in str(conversion)


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.LayerNorm(3))
    model[1].weight = model[2].weight = model[0].weight
    for batch_norm in CHOICES:
        fixed = fix(model, batch_norm=batch_norm)
        assert fixed[0].weight is fixed[1].weight
        assert fixed[0].weight is fixed[2].weight
        assert fixed[0].bias is not fixed[1].bias


def test_modes_and_the_rest_of_the_model_are_kept() -> None:
    model = resnet()
    model.blocks[0].bn1.requires_grad_(False)
    model.head.eval()
    handle = model.stem[2].register_forward_hook(lambda *_: None)
    fixed = fix(model, images())
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in fixed.named_modules()} == modes
    assert not fixed.blocks[0].bn1.weight.requires_grad
    assert len(fixed.stem[2]._forward_hooks) == 1
    handle.remove()


# ── in place ────────────────────────────────────────────────────────────────────────────────────────


def test_in_place_modules_stay_where_they_do_no_harm() -> None:
    fixed = fix(resnet(), images())
    assert all(m.inplace for m in fixed.modules() if isinstance(m, nn.ReLU))


def test_in_place_modules_that_overwrite_what_a_backward_needs_are_switched() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Sigmoid(), nn.ReLU(inplace=True), nn.BatchNorm1d(4)).double()
    with pytest.raises(RuntimeError, match="inplace"):
        model(X).sum().backward()
    fixed = fix(model, X)
    assert not fixed[2].inplace
    fixed(X).sum().backward()
    assert "'2': ReLU(inplace=True) -> ReLU()" in str(fix_report(fixed))
    assert model[2].inplace


def test_in_place_modules_are_not_switched_in_vain() -> None:
    """Something else is wrong with this one."""

    class Stuck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(FEATURES, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            z = y.sigmoid()
            y = self.act(y) * z
            z.zero_()
            return y

    fixed = fix(Stuck().double(), X)
    assert fixed.act.inplace
    assert fix_report(fixed).conversions == ()
