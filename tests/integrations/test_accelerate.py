"""accelerate around a private run: the same steps as without, mixed precision, saved states, refusals."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import CheckpointError, ParameterError, WrapError
from dpdl.integrations.accelerate import Accelerated, prepare_private
from tests.distributed.launch import launch
from tests.small_run import examples, network, same, small_run, train_on, weights_of

accelerate = pytest.importorskip("accelerate")

STEPS, BATCH, DELTA = 6, 4, 1e-3


def an_accelerator(**settings: Any) -> Any:
    return accelerate.Accelerator(cpu=True, **settings)


def plain_objects(model: Any = None) -> tuple[Any, Any, Any, Any]:
    model = network(torch.float32) if model is None else model
    loader = DataLoader(TensorDataset(*examples(dtype=torch.float32)), batch_size=BATCH, shuffle=True)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=STEPS, noise_multiplier=1.0, max_grad_norm=1.0)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader, plan


def prepared(accelerator: Any, **execution: Any) -> Accelerated:
    settings = {"accumulate_dtype": torch.float64, "insecure_seed": 33, **execution}
    return prepare_private(accelerator, *plain_objects(), execution=dpdl.Execution(**settings))


def train(accelerator: Any, made: Accelerated, steps: int = STEPS, scheduler: Any = None) -> None:
    model, optimizer, loader, run = made
    model.train()
    while run.optimizer.steps_taken < steps:
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if run.optimizer.steps_taken == steps:
                return


def without_accelerate() -> dpdl.Private:
    dataset = TensorDataset(*examples(dtype=torch.float32))
    private = small_run(network(torch.float32), dataset=dataset, batch_size=BATCH, steps=STEPS, noise_multiplier=1.0)
    for _ in range(2):
        for batch in private.loader:
            train_on(private, batch)
    return private


@pytest.mark.parametrize("limit", [None, 2])
def test_it_takes_the_steps_of_a_plain_loop(limit: int | None) -> None:
    accelerator = an_accelerator()
    made = prepared(accelerator, max_physical_batch_size=limit)
    train(accelerator, made)
    expected = without_accelerate()
    weights = weights_of(made.model)
    assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in weights_of(expected.model).items())
    assert made.run.optimizer.epsilon(DELTA) == expected.optimizer.epsilon(DELTA)


def test_mixed_precision_reaches_the_forward_and_not_the_sums() -> None:
    accelerator = an_accelerator(mixed_precision="bf16")
    made = prepared(accelerator)
    seen = []
    made.run.model.module[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(accelerator, made)
    assert torch.bfloat16 in seen
    assert torch.float32 not in seen
    exact, rough = weights_of(without_accelerate().model), weights_of(made.model)
    assert not same(exact, rough)
    assert all(torch.allclose(exact[name], rough[name], atol=0.02) for name in exact)
    assert all(p.dtype is torch.float32 and p.grad.dtype is torch.float32 for p in made.model.parameters())


@pytest.mark.parametrize("limit", [None, 2])
def test_a_loss_scale_is_taken_out_before_clipping(limit: int | None) -> None:
    accelerator = an_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # as accelerate sets it for fp16 on a GPU
    made = prepared(accelerator, max_physical_batch_size=limit)
    train(accelerator, made)
    exact, scaled = weights_of(without_accelerate().model), weights_of(made.model)
    assert all(torch.allclose(exact[name], scaled[name], atol=1e-5) for name in exact)
    assert accelerator.scaler.get_scale() == 1024.0


def test_a_scheduler_follows_the_steps() -> None:
    accelerator = an_accelerator()
    made = prepared(accelerator)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(made.run.optimizer, 2, gamma=0.1))
    train(accelerator, made, scheduler=scheduler)
    assert made.run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1**4)


@pytest.mark.parametrize("saved_at", [2, 3])  # in the middle and at the end of a pass
def test_a_saved_state_carries_ledger_and_place(tmp_path: Path, saved_at: int) -> None:
    accelerator = an_accelerator()
    first = prepared(accelerator)
    train(accelerator, first, steps=saved_at)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()

    second = prepared(accelerator)
    accelerator.load_state(str(tmp_path))
    assert second.run.optimizer.steps_taken == saved_at
    assert same(weights_of(second.model), weights_of(first.model))
    train(accelerator, second)
    assert same(weights_of(second.model), weights_of(without_accelerate().model))


def test_a_state_of_plain_training_is_refused(tmp_path: Path) -> None:
    accelerator = an_accelerator()
    model, optimizer, _, _ = plain_objects()
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    made = prepared(accelerator)
    with pytest.raises(CheckpointError, match="no ledger"):
        accelerator.load_state(str(tmp_path))
    assert made.run.optimizer.ledger.releases == 0


def rank_of_two(rank: int) -> tuple[str, dict[str, Any], float]:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")  # asked for, not used: the group is there
    accelerator = an_accelerator()
    made = prepared(accelerator)
    train(accelerator, made)
    weights = {name: value.tolist() for name, value in weights_of(made.model).items()}
    return accelerator.distributed_type.name, weights, made.run.optimizer.epsilon(DELTA)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    first, second = launch(rank_of_two, 2, tmp_path)
    assert first == second, (first, second)
    assert first[0] == "MULTI_CPU", first
    expected = without_accelerate()
    assert first[2] == expected.optimizer.epsilon(DELTA)
    for name, value in weights_of(expected.model).items():
        assert torch.allclose(torch.tensor(first[1][name]), value, atol=1e-6)


def test_settings_that_cannot_work_are_refused() -> None:
    accelerator = an_accelerator(gradient_accumulation_steps=2)
    with pytest.raises(ParameterError, match="gradient_accumulation_steps=2"):
        prepared(accelerator)


def test_a_compiling_accelerator_is_refused() -> None:
    accelerator = an_accelerator(dynamo_backend="eager")
    with pytest.raises(ParameterError, match="dynamo_backend EAGER"):
        prepared(accelerator)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_was_prepared_before_is_refused(which: int) -> None:
    accelerator = an_accelerator()
    made = list(plain_objects())
    made[which] = accelerator.prepare(made[which])
    with pytest.raises(WrapError, match="prepared by accelerate already"):
        prepare_private(accelerator, *made)
