"""The private model is the user's module in every respect but one: its training backward."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import ModelError, PrivacyError, StepError
from tests.oracles import one_at_a_time
from tests.small_run import (
    CLASSES,
    FEATURES,
    N,
    examples,
    network,
    one_step,
    plain_gradient,
    refused,
    released,
    same,
    small_run,
    train_on,
    weights_of,
)

X, Y = examples()
each_engine = pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])


# ── a plain module from outside ─────────────────────────────────────────────────────────────────────


def test_names_are_the_plain_modules() -> None:
    plain, private = network(), small_run().model
    assert list(private.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in private.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in private.named_modules()] == [n for n, _ in plain.named_modules()]
    assert sum(1 for _ in private.parameters()) == 4


def test_weights_go_back_and_forth() -> None:
    private = small_run()
    train_on(private, next(iter(private.loader)))
    fresh = network()
    fresh.load_state_dict(private.model.state_dict())
    assert same(weights_of(fresh), weights_of(private.model))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in fresh.state_dict().items()}
    assert str(private.model.load_state_dict(zeros)) == "<All keys matched successfully>"
    assert all(not tensor.any() for tensor in private.model.state_dict().values())


def test_a_deep_copy_is_the_plain_module_and_shares_nothing() -> None:
    private = small_run()
    twin = copy.deepcopy(private.model)
    assert type(twin) is nn.Sequential
    assert same(weights_of(twin), weights_of(private.model))
    train_on(private, next(iter(private.loader)))
    assert not same(weights_of(twin), weights_of(private.model))
    twin(X).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_averaging_follows_the_weights() -> None:
    private = small_run()
    average = torch.optim.swa_utils.AveragedModel(private.model)
    for _ in range(2):
        train_on(private, next(iter(private.loader)))
        average.update_parameters(private.model)
    assert set(average.module.state_dict()) == set(network().state_dict())


def test_pickling_gives_the_plain_module_or_is_refused_but_never_half_a_run() -> None:
    private = small_run(insecure_seed=None)
    try:
        twin = pickle.loads(pickle.dumps(private.model))
    except (TypeError, pickle.PicklingError):
        return
    assert not isinstance(twin, dpdl.PrivateModel)


class WithMethods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.temperature = 2.0
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.temperature * self.scale

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)


def test_attributes_and_methods_are_the_modules() -> None:
    private = small_run(WithMethods().double())
    assert private.model.temperature == 2.0
    assert private.model.layer is private.model.module.layer
    assert private.model.scale is private.model.module.scale
    assert private.model.predict(X).shape == (N,)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        private.model.nothing  # noqa: B018


def test_attributes_that_are_set_reach_the_module() -> None:
    """`model.temperature = 4` on the plain module changes what it computes."""
    private = small_run(WithMethods().double())
    with torch.no_grad():
        before = private.model(X)
        private.model.temperature = 4.0
        after = private.model(X)
    torch.testing.assert_close(after, before / 2)


def test_training_mode_goes_through_both_ways() -> None:
    private = small_run()
    private.model.eval()
    assert not any(child.training for child in private.model.module.modules())
    private.model.train()
    assert all(child.training for child in private.model.module.modules())
    private.model.module.eval()
    assert not private.model.training, "the user may have kept the name of the plain module"


def test_dtype_changes_go_through() -> None:
    private = small_run(network(torch.float32), dataset=TensorDataset(*examples(dtype=torch.float32)))
    train_on(private, next(iter(private.loader)))
    assert private.model.to(torch.float64) is private.model
    assert all(p.dtype == torch.float64 for p in private.model.module.parameters())
    private.optimizer.inner.state.clear()  # momentum of the old dtype, as in plain torch
    x, y = next(iter(private.loader))
    train_on(private, (x.double(), y))
    assert private.optimizer.steps_taken == 2


def test_a_module_of_its_own_attribute_named_module_still_works() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    private = small_run(Holder())
    assert next(iter(private.model.state_dict())) == "module.0.weight"
    train_on(private, next(iter(private.loader)))


def test_a_container_is_still_a_container() -> None:
    private = small_run()
    assert len(private.model) == 3
    assert private.model[0] is private.model.module[0]
    assert [type(child) for child in private.model] == [nn.Linear, nn.Tanh, nn.Linear]


def test_compiling_in_place_works_or_is_refused_in_words() -> None:
    """`model.compile()` replaces how a module is called; compiling before wrapping works."""
    private = small_run()
    with contextlib.suppress(PrivacyError):
        private.model.compile(backend="eager")
        train_on(private, next(iter(private.loader)))
        assert private.optimizer.steps_taken == 1


# ── evaluating ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
def test_without_gradients_anything_may_be_evaluated_at_any_time(mode: str, way: Any) -> None:
    private = small_run()
    getattr(private.model, mode)()
    next(iter(private.loader))
    for size in (0, 1, N, 50):
        with way():
            assert torch.equal(private.model(examples(size)[0]), private.model.module(examples(size)[0]))


def test_in_eval_mode_other_data_is_evaluated_with_gradients_on_and_gives_parameters_none() -> None:
    private = small_run()
    private.model.eval()
    probe = X[:5].clone().requires_grad_()
    private.model(probe).sum().backward()
    assert probe.grad is not None
    assert all(p.grad is None for p in private.model.parameters())


def test_evaluating_between_forward_and_backward_disturbs_nothing() -> None:
    disturbed, plain = small_run(), small_run()
    for private in (disturbed, plain):
        x, y = next(iter(private.loader))
        loss = F.cross_entropy(private.model(x), y)
        if private is disturbed:
            with torch.no_grad():
                private.model(X[:3])
            private.model.eval()
            private.model(X[:4])
            private.model.train()
        loss.backward()
        private.optimizer.step()
    assert same(released(disturbed), released(plain))


@each_engine
def test_training_in_eval_mode_is_training(engine: str) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.9), nn.Linear(8, CLASSES)).double().eval()
    expected = plain_gradient(model, lambda m: F.cross_entropy(m(X), Y))
    got = one_step(model, lambda m: F.cross_entropy(m(X), Y), engine=engine)
    error, name = one_at_a_time.worst_error(got, expected)
    assert error < 1e-9, name


# ── when things break ───────────────────────────────────────────────────────────────────────────────


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        if self.error is not None:
            raise self.error("in the middle of forward")
        return h


@each_engine
@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["at the first batch", "later"])
def test_after_a_forward_that_raised_the_next_call_works(engine: str, error: type[BaseException], when: str) -> None:
    model = Moody().double()
    private, undisturbed = small_run(model, engine=engine), small_run(copy.deepcopy(model), engine=engine)
    if when == "later":
        train_on(private, next(iter(private.loader)))
        train_on(undisturbed, next(iter(undisturbed.loader)))
    modes = [child.training for child in model.modules()]
    x, y = next(iter(private.loader))
    model.error = error
    with pytest.raises(error, match="in the middle of forward"):
        private.model(x)
    model.error = None
    assert modes == [child.training for child in model.modules()]
    assert not model._forward_hooks
    train_on(private, (x, y))
    train_on(undisturbed, next(iter(undisturbed.loader)))
    assert same(released(private), released(undisturbed))
    assert private.model.engine_name == undisturbed.model.engine_name


def test_everything_frozen_in_mid_run_is_refused_in_words() -> None:
    private = small_run()
    x, y = next(iter(private.loader))
    private.model.requires_grad_(False)
    with refused(private, ModelError, "requires_grad_(True)"):
        F.cross_entropy(private.model(x), y).backward()
        private.optimizer.step()


def test_a_call_without_a_batch_is_refused() -> None:
    private = small_run()
    next(iter(private.loader))
    with refused(private, ModelError, "batch axis"):
        private.model(torch.tensor(3.0))
    with refused(private, StepError, "7 examples"):
        private.model(examples(7)[0])
