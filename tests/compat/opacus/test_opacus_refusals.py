"""Ways to use the facade wrongly, most of which Opacus takes in silence: each is refused, and nothing is spent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from dpdl.compat.opacus import PrivacyEngine
from dpdl.compat.opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from dpdl.compat.opacus.optimizers import AdaClipDPOptimizer
from dpdl.errors import (
    ExampleMixingError,
    LoaderError,
    LossError,
    ModelError,
    ParameterError,
    PrivacyError,
    PrivacyWarning,
    StepError,
    WrapError,
)
from tests.compat.opacus.small_run import FEATURES, N, examples, loader, network, private, step


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([torch.zeros(FEATURES)])


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x - x.mean(0))


def _weighted() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples()), batch_size=4, sampler=WeightedRandomSampler([1.0] * N, 8))


def _elsewhere(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)


MAKING: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("adaptive clipping", {"clipping": "adaptive"}, ParameterError, "flat"),
    ("an unknown way to clip", {"clipping": "automatic"}, ParameterError, "per_layer"),
    ("an unknown mode", {"grad_sample_mode": "magic"}, ParameterError, "ghost"),
    ("FSDP", {"grad_sample_mode": "ghost_fsdp"}, ParameterError, "one device"),
    ("per_layer with one number", {"clipping": "per_layer"}, ParameterError, r"\[1.0\]"),
    ("per_layer in ghost mode is fine", {"clipping": "flat", "max_grad_norm": [1.0]}, ParameterError, "per_layer"),
    ("a negative norm", {"max_grad_norm": -1.0}, ParameterError, "> 0"),
    ("negative noise", {"noise_multiplier": -1.0}, ParameterError, ">= 0"),
    ("an unknown reduction", {"loss_reduction": "max"}, ParameterError, "mean"),
    ("random examples for empty batches", {"rand_on_empty": True}, ParameterError, "twice max_grad_norm"),
    ("a weighted sampler", {"data": _weighted()}, LoaderError, "WeightedRandomSampler"),
    ("the same without Poisson", {"data": _weighted(), "poisson_sampling": False}, LoaderError, "Weighted"),
    ("a stream", {"data": DataLoader(_Stream(), batch_size=2)}, LoaderError, "IterableDataset"),
    ("batch norm", {"model": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))}, ModelError, "1: BatchNorm1d"),
    (
        "batch norm without parameters",
        {"model": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))},
        ModelError,
        "1: BatchNorm1d",
    ),
    (
        "instance norm with statistics",
        {"model": nn.Sequential(nn.Conv1d(3, 2, 1), nn.InstanceNorm1d(2, track_running_stats=True))},
        ModelError,
        "track_running_stats",
    ),
    ("DataParallel", {"model": nn.DataParallel(network())}, ModelError, "DataParallel"),
    (
        "a criterion of another reduction",
        {"grad_sample_mode": "ghost", "criterion": nn.CrossEntropyLoss(reduction="sum")},
        ParameterError,
        "reduction",
    ),
]


@pytest.mark.parametrize(("what", "how", "error", "says"), MAKING, ids=[row[0] for row in MAKING])
@pytest.mark.filterwarnings("ignore::dpdl.errors.PrivacyWarning")
def test_making_it_is_refused(what: str, how: dict[str, Any], error: type[Exception], says: str) -> None:
    engine = PrivacyEngine()
    model = how.get("model") or network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=says) as caught:
        private(engine, **{**how, "model": model})
    assert isinstance(caught.value, PrivacyError)
    assert engine.accountant.history == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_refusals_at_making() -> None:
    model = network()
    with pytest.raises(ValueError, match="Module parameters are different than optimizer Parameters"):
        PrivacyEngine().make_private(
            module=model, optimizer=_elsewhere(model), data_loader=loader(), noise_multiplier=1.0, max_grad_norm=1.0
        )
    with pytest.raises(ValueError, match="secure_mode"):
        private(PrivacyEngine(secure_mode=True), noise_generator=torch.Generator())
    with pytest.raises(WrapError, match="LBFGS"):
        PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.LBFGS(model.parameters()),
            data_loader=loader(),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
    with pytest.raises(ParameterError, match="no accountant"):
        PrivacyEngine(accountant="magic")
    with pytest.raises(NotImplementedError, match="one process"):
        DifferentiallyPrivateDistributedDataParallel(model)
    with pytest.raises(NotImplementedError, match="adaptive"):
        AdaClipDPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_second_engine_does_not_take_over() -> None:
    model = network()
    private(PrivacyEngine(), model)
    with pytest.raises(WrapError, match="another PrivacyEngine"):
        private(PrivacyEngine(), model)


def _raw_step(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.original_optimizer.step()


def _plain_module(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    F.cross_entropy(model(x), y).backward()
    model._module(torch.ones(2, FEATURES)).sum().backward()
    optimizer.step()


def _hooks_off(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    F.cross_entropy(model(x), y).backward()
    model.disable_hooks()
    model(torch.ones(2, FEATURES)).sum().backward()
    optimizer.step()


def _foreign_batch(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    F.cross_entropy(model(x[:5]), y[:5]).backward()


def _no_backward(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    model(x)
    optimizer.step()


def _cleared(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()


def _sum_for_a_mean(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    F.cross_entropy(model(x), y, reduction="sum").backward()


def _contrastive(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    out = model(x)
    (out @ out.T).logsumexp(1).mean().backward()


def _new_parameters(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def _copied(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    copy.deepcopy(optimizer)


def _higher_gradients(model: Any, optimizer: Any, x: Any, y: Any) -> None:
    F.cross_entropy(model(x), y).backward(create_graph=True)


STEPPING: list[tuple[Callable[..., None], type[Exception], str]] = [
    (_raw_step, StepError, "without noise"),
    (_plain_module, StepError, "did not come from the private model"),
    (_hooks_off, StepError, "did not come from the private model"),
    (_foreign_batch, StepError, "5 examples"),
    (_no_backward, StepError, "no per-sample gradient"),
    (_cleared, StepError, "no per-sample gradient"),
    (_sum_for_a_mean, LossError, "sum over"),
    (_contrastive, LossError, "neither"),
    (_new_parameters, WrapError, "add_param_group"),
    (_copied, WrapError, "copied"),
    (_higher_gradients, StepError, "create_graph"),
]


@pytest.mark.filterwarnings("ignore:The loss could not be computed again:dpdl.errors.PrivacyWarning")
@pytest.mark.parametrize(("misuse", "error", "says"), STEPPING, ids=[row[0].__name__ for row in STEPPING])
def test_stepping_like_this_is_refused(misuse: Callable[..., None], error: type[Exception], says: str) -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, noise_multiplier=1.0)
    before = copy.deepcopy(model._module.state_dict())
    x, y = next(iter(batches))
    with pytest.raises(error, match=says):
        misuse(model, optimizer, x, y)
    assert engine.accountant.history == []
    assert all(torch.equal(value, before[name]) for name, value in model._module.state_dict().items())


def test_a_model_that_mixes_examples_is_refused_on_its_first_batch() -> None:
    model, _, batches = private(model=_Mixing())
    x, _ = next(iter(batches))
    with pytest.raises(ExampleMixingError):
        model(x)


def test_a_batch_is_good_for_one_step() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine)
    batch = next(iter(batches))
    step(model, optimizer, batch)
    with pytest.raises(StepError, match="step has used"):
        step(model, optimizer, batch)
    with pytest.raises(StepError):
        optimizer.step()
    assert engine.accountant.history == [(0.0, 1.0, 1)]


def test_a_batch_of_an_earlier_pass_is_refused() -> None:
    model, _, batches = private()
    x, y = next(iter(batches))
    loss = F.cross_entropy(model(x), y)
    next(iter(batches))
    with pytest.raises(StepError, match="earlier one"):
        loss.backward()


def test_gradients_of_the_last_step_are_not_used_twice() -> None:
    model, optimizer, batches = private(data=loader(batch_size=6))
    steps = iter(batches)
    x, y = next(steps)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    x, y = next(steps)
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(ValueError, match="zero_grad"):
        loss.backward()


def test_poisson_batches_are_not_accumulated() -> None:
    model, _, batches = private(data=loader(batch_size=6))
    steps = iter(batches)
    x, y = next(steps)
    F.cross_entropy(model(x), y).backward()
    x, y = next(steps)
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(ValueError, match="BatchMemoryManager"):
        loss.backward()


def test_gradients_of_two_passes_are_not_accumulated() -> None:
    with pytest.warns(PrivacyWarning):
        model, optimizer, batches = private(data=loader(batch_size=6), poisson_sampling=False)
    for _ in range(2):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="several passes"):
        optimizer.step()


def test_skipping_an_empty_batch_is_refused() -> None:
    model, optimizer, batches = private(data=loader(n=200, batch_size=1), noise_multiplier=1.0)

    def train() -> None:
        for x, y in batches:
            if len(x) == 0:
                continue
            step(model, optimizer, (x, y))

    with pytest.raises(StepError, match="was empty and was skipped"):
        train()


def test_skipping_other_batches_is_warned_of() -> None:
    model, optimizer, batches = private(data=loader(n=400, batch_size=20))

    def train() -> None:
        for index, batch in enumerate(batches):
            if index != 2:
                step(model, optimizer, batch)

    with pytest.warns(PrivacyWarning, match="skipped must not depend"):
        train()


def test_gradients_set_by_the_script_are_warned_of_and_clipped() -> None:
    model, optimizer, batches = private(max_grad_norm=1.0)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad_sample = torch.full((N, *p.shape), 1e6)
        with pytest.warns(PrivacyWarning, match="set by the script"):
            optimizer.step()
    total = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float(total.norm()) == pytest.approx(1.0, rel=1e-3)


def test_no_op_takes_gradients_of_the_script() -> None:
    model, optimizer, batches = private(grad_sample_mode="no_op", max_grad_norm=math.inf)
    for x, _ in batches:
        optimizer.zero_grad()
        model(x).sum().backward()
        for p in model.parameters():
            p.grad_sample = torch.ones(len(x), *p.shape)
        optimizer.step()
    assert all(bool((p.grad == 1).all()) for p in model.parameters())


def test_a_refusal_leaves_model_and_optimizer_usable() -> None:
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for how in ({"max_grad_norm": [1.0], "clipping": "per_layer"}, {"max_grad_norm": -1.0, "wrap_model": False}):
        settings: dict[str, Any] = {"noise_multiplier": 1.0, **how}
        with pytest.raises(ParameterError):
            PrivacyEngine().make_private(module=model, optimizer=inner, data_loader=loader(), **settings)
    assert "forward" not in model.__dict__
    x, y = examples()
    F.cross_entropy(model(x), y).backward()
    inner.step()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_a_model_that_is_hooked_again_runs_once() -> None:
    engine = PrivacyEngine()
    model = network()
    data = loader()
    private(engine, model, data=data, wrap_model=False)
    _, optimizer, batches = private(engine, model, data=data, wrap_model=False)
    for batch in batches:
        step(model, optimizer, batch)
    assert engine.accountant.history == [(0.0, 1.0, 1)]


def test_two_passes_at_once_are_refused() -> None:
    with pytest.warns(PrivacyWarning):
        _, _, batches = private(data=loader(batch_size=4), poisson_sampling=False)
    first, second = iter(batches), iter(batches)
    next(first)
    next(second)
    with pytest.raises(StepError, match="one iterator at a time"):
        next(first)
