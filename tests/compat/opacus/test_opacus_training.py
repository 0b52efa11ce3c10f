"""One step through the facade against gradients taken one at a time."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dpdl.compat.opacus import GradSampleModule, PrivacyEngine
from dpdl.compat.opacus.data_loader import DPDataLoader
from dpdl.compat.opacus.grad_sample.record import PerSampleRecord
from dpdl.compat.opacus.optimizers import DPOptimizer
from dpdl.compat.opacus.utils.batch_memory_manager import BatchMemoryManager
from dpdl.errors import PrivacyWarning
from tests.compat.opacus.small_run import (
    CLASSES,
    FEATURES,
    LR,
    N,
    assert_moved_by,
    clipped_sum,
    examples,
    loader,
    network,
    private,
    step,
)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_a_step_is_the_clipped_mean(mode: str) -> None:
    start = network()
    model, optimizer, batches = private(model=copy.deepcopy(start), grad_sample_mode=mode, max_grad_norm=0.7)
    for x, y in batches:
        step(model, optimizer, (x, y))
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def test_the_kinds_are_those_that_scripts_ask_for() -> None:
    model, optimizer, batches = private()
    assert isinstance(model, GradSampleModule)
    assert isinstance(optimizer, (DPOptimizer, torch.optim.Optimizer))
    assert isinstance(batches, (DPDataLoader, DataLoader))
    assert (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.expected_batch_size) == (0.0, 1.0, N)
    assert isinstance(optimizer.original_optimizer, torch.optim.SGD)
    assert optimizer.param_groups is optimizer.original_optimizer.param_groups
    assert [p.shape for p in model.parameters()] == [p.shape for p in model._module.parameters()]


def test_ghost_mode_returns_a_criterion_and_takes_the_same_step() -> None:
    start = network()
    model, optimizer, criterion, batches = private(
        model=copy.deepcopy(start), grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss(), max_grad_norm=0.7
    )
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        assert math.isclose(loss.item(), F.cross_entropy(start(x), y).item(), rel_tol=1e-5)
        loss.backward()
        optimizer.step()
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def test_ghost_loss_over_positions_leaves_ignored_ones_out_for_each_example() -> None:
    torch_rng = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 4, generator=torch_rng)
    targets = torch.tensor([[0, 1, -100], [2, -100, -100]])
    _, _, criterion, _ = private(grad_sample_mode="ghost", criterion=nn.CrossEntropyLoss())
    loss = criterion(logits.flatten(0, 1), targets.flatten(), shape=logits.shape)
    alone = [F.cross_entropy(logits[n], targets[n]) for n in range(2)]
    torch.testing.assert_close(loss.loss_per_sample, torch.stack(alone))
    assert math.isclose((2 * loss - 1.0).item(), 2 * float(sum(alone)) / 2 - 1, rel_tol=1e-5)


def test_per_layer_clipping_bounds_each_parameter() -> None:
    start = network()
    bounds = [0.3, 0.2, 0.5, 0.1]
    model, optimizer, batches = private(model=copy.deepcopy(start), clipping="per_layer", max_grad_norm=bounds)
    for batch in batches:
        step(model, optimizer, batch)
    sums = clipped_sum(start, *examples(), bounds)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def test_a_sum_is_not_divided() -> None:
    start = network()
    model, optimizer, batches = private(model=copy.deepcopy(start), loss_reduction="sum", max_grad_norm=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
    assert_moved_by(start, model._module, clipped_sum(start, *examples(), 0.1))


def test_without_a_wrapper_the_model_itself_trains_privately() -> None:
    start = network()
    model = copy.deepcopy(start)
    hooks, optimizer, batches = private(model=model, wrap_model=False, max_grad_norm=0.7)
    assert type(model) is nn.Sequential
    for batch in batches:
        step(model, optimizer, batch)
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model, {name: total / N for name, total in sums.items()})
    hooks.cleanup()
    assert "forward" not in model.__dict__
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in model.parameters())


class _TimeFirst(nn.Module):
    """[T, N, features] to [N, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).mean(0)


def test_the_batch_may_be_on_the_second_axis() -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(5, N, FEATURES, generator=generator), examples()[1]
    data = DataLoader(
        TensorDataset(x.transpose(0, 1), y),
        batch_size=N,
        collate_fn=lambda rows: (torch.stack([r[0] for r in rows], 1), torch.stack([r[1] for r in rows])),
    )
    start = _TimeFirst()
    model, optimizer, batches = private(model=copy.deepcopy(start), data=data, batch_first=False, max_grad_norm=0.7)
    for batch in batches:
        step(model, optimizer, batch)

    class BatchFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = start.inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).mean(1)

    sums = clipped_sum(BatchFirst(), x.transpose(0, 1), y, 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


@pytest.mark.parametrize("size", [1, 5, N])
def test_parts_of_a_batch_make_the_same_step_as_the_whole(size: int) -> None:
    start = network()
    model, optimizer, batches = private(model=copy.deepcopy(start), max_grad_norm=0.7)
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=size, optimizer=optimizer) as parts:
        assert len(parts) == math.ceil(N / size)
        seen = 0
        for x, y in parts:
            assert len(x) <= size
            seen += len(x)
            step(model, optimizer, (x, y))
    assert seen == N
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def test_a_batch_left_half_done_is_dropped_not_added_to_the_next() -> None:
    start = network()
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine, model=copy.deepcopy(start), max_grad_norm=0.7)
    with BatchMemoryManager(data_loader=batches, max_physical_batch_size=5, optimizer=optimizer) as parts:
        for batch in parts:
            step(model, optimizer, batch)
            break
    assert engine.accountant.history == []
    for batch in batches:
        step(model, optimizer, batch)
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})
    assert engine.accountant.history == [(0.0, 1.0, 1)]


def test_two_backwards_of_one_batch_are_clipped_together() -> None:
    start = network()
    model, optimizer, batches = private(model=copy.deepcopy(start), max_grad_norm=0.7)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        F.mse_loss(model(2 * x).sum(1), y.float()).backward()
        optimizer.step()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = start

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x), self.inner(2 * x)

    def both(outputs: Any, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs[0], y) + F.mse_loss(outputs[1].sum(1), y.to(outputs[1].dtype))

    sums = clipped_sum(Both(), *examples(), 0.7, loss=both)
    gradient = {name.removeprefix("inner."): total / N for name, total in sums.items()}
    assert_moved_by(start, model._module, gradient)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew", "ghost"])
def test_an_empty_batch_is_a_step_of_noise(mode: str) -> None:
    start = network()
    engine = PrivacyEngine()
    model, optimizer, *_, batches = private(
        engine, copy.deepcopy(start), data=loader(n=200, batch_size=1), noise_multiplier=1.0, grad_sample_mode=mode
    )
    empty = 0
    for x, y in batches:
        before = copy.deepcopy(model._module.state_dict())
        step(model, optimizer, (x, y))
        if len(x) == 0:
            empty += 1
            moved = [(v - before[k]).abs().max() for k, v in model._module.state_dict().items()]
            assert all(bool(m > 0) for m in moved)
        if empty == 2:
            break
    assert empty == 2
    assert sum(steps for _, _, steps in engine.accountant.history) >= 2


def test_grad_samples_can_be_read_before_and_after_the_step() -> None:
    model, optimizer, batches = private(model=network())
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        before = [g.clone() for g in optimizer.grad_samples]
        optimizer.step()
    assert [tuple(g.shape) for g in before] == [(N, *p.shape) for p in model.parameters()]
    for g, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad_sample.clone(), g)
    optimizer.zero_grad()
    assert all(p.grad_sample is None and p.summed_grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_zero_grad_frees_what_the_batch_held(mode: str) -> None:
    model, optimizer, *_, batches = private(grad_sample_mode=mode)
    for batch in batches:
        step(model, optimizer, batch)
    record = weakref.ref(model.per_sample.last_record)
    optimizer.zero_grad()
    for p in model.parameters():
        p.__dict__.pop("_norm_sample", None)
    gc.collect()
    assert record() is None


def test_norms_and_sums_never_build_gradients_of_all_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PerSampleRecord, parameter: Any) -> Any:
        raise AssertionError("gradients were materialised")

    monkeypatch.setattr(PerSampleRecord, "of", refuse)
    model, optimizer, batches = private()
    for batch in batches:
        step(model, optimizer, batch)


def test_a_closure_is_called_and_its_loss_returned() -> None:
    model, optimizer, batches = private()
    for x, y in batches:

        def closure(x: Any = x, y: Any = y) -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        assert float(optimizer.step(closure)) == pytest.approx(float(F.cross_entropy(network()(x), y)), rel=1e-5)


def test_training_in_eval_mode_and_evaluating_work() -> None:
    start = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)).eval()
    model, optimizer, batches = private(model=copy.deepcopy(start), max_grad_norm=0.7)
    for batch in batches:
        step(model, optimizer, batch)
        with torch.no_grad():
            model(torch.zeros(7, FEATURES))
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def test_learning_rate_schedulers_and_frozen_parameters_work() -> None:
    start = network()
    model = copy.deepcopy(start)
    model[0].requires_grad_(False)
    wrapped, optimizer, batches = private(model=model, max_grad_norm=0.7)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    for batch in batches:
        step(wrapped, optimizer, batch)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR * 0.1)
    assert torch.equal(model[0].weight, start[0].weight)
    assert not torch.equal(model[2].weight, start[2].weight)


def test_several_batches_of_one_pass_may_be_one_step_without_poisson_sampling() -> None:
    start = network()
    with pytest.warns(PrivacyWarning, match="amplifies nothing"):
        model, optimizer, batches = private(
            model=copy.deepcopy(start), data=loader(batch_size=4), poisson_sampling=False, max_grad_norm=0.7
        )
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
    assert optimizer.accumulated_iterations == 3
    assert [len(g) for g in optimizer.grad_samples] == [N] * 4
    optimizer.step()
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def test_a_gradient_scaler_changes_nothing() -> None:
    start = network()
    model, optimizer, batches = private(model=copy.deepcopy(start), max_grad_norm=0.7)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    sums = clipped_sum(start, *examples(), 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def _noise(optimizer_settings: dict[str, Any], parameters: int) -> torch.Tensor:
    """What 40 steps of pure noise add to one wide layer, in units of the learning rate."""
    model = nn.Linear(parameters, 1, bias=False)
    private_model, optimizer, batches = private(
        model=model, data=DataLoader([torch.zeros(parameters)] * 40, batch_size=4), **optimizer_settings
    )
    moves = []
    for x in batches:
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        loss = private_model(x)
        (loss.sum() if optimizer_settings.get("loss_reduction") == "sum" else loss.mean()).backward()
        optimizer.step()
        moves.append((before - model.weight.detach()).flatten() / LR)
    return torch.stack(moves)


@pytest.mark.parametrize(
    ("settings", "std"),
    [
        ({"noise_multiplier": 2.0, "max_grad_norm": 3.0}, 2.0 * 3.0 / 4),
        ({"noise_multiplier": 2.0, "max_grad_norm": [3.0], "clipping": "per_layer"}, 2.0 * 3.0 / 4),
        ({"noise_multiplier": 2.0, "max_grad_norm": 3.0, "loss_reduction": "sum"}, 2.0 * 3.0),
    ],
)
def test_noise_has_the_right_scale(settings: dict[str, Any], std: float) -> None:
    found = _noise(settings, 5000)
    assert found.numel() == 50_000
    # The standard error of the estimate is std / sqrt(2 * 50,000), 0.3 %.
    assert abs(float(found.std()) / std - 1) < 0.015
    assert not abs(float(found.std()) / (std * 1.05) - 1) < 0.015
    assert abs(float(found.mean())) < 5 * std / math.sqrt(found.numel())
    assert abs(float(torch.corrcoef(found[:2])[0, 1])) < 0.07  # each step has noise of its own


def test_per_layer_noise_covers_all_bounds_together() -> None:
    model = nn.Sequential(nn.Linear(3000, 1, bias=False), nn.Linear(1, 3000, bias=False))
    wrapped, optimizer, batches = private(
        model=model,
        data=DataLoader([torch.zeros(3000)] * 8, batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=[3.0, 4.0],
        clipping="per_layer",
    )
    for x in batches:
        optimizer.zero_grad()
        wrapped(x).mean().backward()
        optimizer.step()
    for p in model.parameters():
        assert abs(float(p.grad.std()) * 8 / 5.0 - 1) < 0.07


def test_example_that_is_not_finite_is_left_out() -> None:
    x, y = examples()
    x = x.clone()
    x[3] = math.nan
    start = network()
    data = DataLoader(TensorDataset(x, y), batch_size=N)
    model, optimizer, batches = private(model=copy.deepcopy(start), data=data, max_grad_norm=0.7)
    for batch in batches:
        step(model, optimizer, batch)
    kept = [n for n in range(N) if n != 3]
    sums = clipped_sum(start, x[kept], y[kept], 0.7)
    assert_moved_by(start, model._module, {name: total / N for name, total in sums.items()})


def test_the_same_model_can_be_made_private_again_by_its_engine() -> None:
    engine = PrivacyEngine()
    model, optimizer, batches = private(engine)
    for batch in batches:
        step(model, optimizer, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)
        model, optimizer, batches = engine.make_private(
            module=model, optimizer=optimizer, data_loader=batches, noise_multiplier=1.0, max_grad_norm=2.0
        )
    for batch in batches:
        step(model, optimizer, batch)
    assert engine.accountant.history == [(0.0, 1.0, 1), (1.0, 1.0, 1)]
