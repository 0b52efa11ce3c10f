"""Lightning's Trainer on a private run: the same steps as a plain loop, and refusals of what cannot work."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from dpdl.errors import CheckpointError, ParameterError, StepError, WrapError
from dpdl.integrations.lightning import private_training
from tests.small_run import examples, network, same, small_run, train_on, weights_of

DELTA = 1e-3
STEPS, BATCH = 6, 4  # three batches of expected size 4 in a pass over 12 examples


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    pytest.importorskip(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield importlib.import_module(request.param)


def a_run(**settings: Any) -> dpdl.Private:
    settings = {"batch_size": BATCH, "steps": STEPS, "noise_multiplier": 1.0, **settings}
    return small_run(network(torch.float32), dataset=TensorDataset(*examples(dtype=torch.float32)), **settings)


def classifier(package: ModuleType, private: dpdl.Private, *, optimizer: Any = None) -> Any:
    class Classifier(package.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = private.model

        def configure_optimizers(self) -> Any:
            return private.optimizer if optimizer is None else optimizer

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            assert not torch.is_grad_enabled()
            assert not self.net.training
            self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    return Classifier()


def trainer(package: ModuleType, folder: Path, *callbacks: Any, **settings: Any) -> Any:
    settings = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **settings}
    return package.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=True,
        **settings,
    )


def fitted(
    package: ModuleType,
    folder: Path,
    private: dpdl.Private,
    *callbacks: Any,
    module: Any = None,
    loader: Any = None,
    held_out: Any = None,
    ckpt: Path | None = None,
    **settings: Any,
) -> Any:
    """As the guide has it."""
    callback = private_training(private, delta=DELTA)
    fit = trainer(package, folder, callback, *callbacks, **settings)
    resumed = {} if ckpt is None else {"ckpt_path": ckpt, "weights_only": True}
    fit.fit(module or classifier(package, private), loader or callback.loader, held_out, **resumed)
    return fit


def plainly(private: dpdl.Private, passes: int = 2) -> dict[str, Tensor]:
    """The weights that an ordinary loop arrives at."""
    for _ in range(passes):
        for batch in private.loader:
            train_on(private, batch)
    return weights_of(private.model)


def held_out() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(20, dtype=torch.float32)), batch_size=8)


def test_it_takes_the_steps_of_a_plain_loop(package: ModuleType, tmp_path: Path) -> None:
    private = a_run()
    fit = fitted(package, tmp_path, private, held_out=held_out())
    assert private.optimizer.steps_taken == STEPS == fit.global_step
    assert same(weights_of(private.model), plainly(a_run()))
    logged = float(fit.callback_metrics["epsilon"])
    spent = private.optimizer.epsilon(DELTA)
    assert spent <= logged < spent * (1 + 1e-6)
    assert 0 <= float(fit.callback_metrics["accuracy"]) <= 1


def test_a_run_ends_with_its_plan_though_lightning_would_go_on(package: ModuleType, tmp_path: Path) -> None:
    private = a_run(steps=4)
    fit = fitted(package, tmp_path, private, max_epochs=10)
    assert private.optimizer.steps_taken == 4
    assert fit.state.finished


def test_a_schedule_and_bfloat16_work(package: ModuleType, tmp_path: Path) -> None:
    private = a_run()

    class Scheduled(classifier(package, private).__class__):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return [private.optimizer], [torch.optim.lr_scheduler.StepLR(private.optimizer, 1, gamma=0.5)]

    fitted(package, tmp_path, private, module=Scheduled(), precision="bf16-mixed")
    assert private.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 4)
    assert all(p.dtype is torch.float32 for p in private.model.parameters())


def half_precision(package: ModuleType) -> Any:
    precision = importlib.import_module(f"{package.__name__}.plugins").MixedPrecision
    return precision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("limit", [1, 3])
def test_parts_of_a_batch_are_one_step(package: ModuleType, tmp_path: Path, limit: int) -> None:
    private = a_run(max_physical_batch_size=limit)
    fit = fitted(package, tmp_path, private, held_out=held_out(), precision="64-true" if limit == 1 else "32-true")
    assert private.optimizer.steps_taken == STEPS == fit.global_step
    whole = plainly(a_run())
    assert all(
        torch.allclose(whole[name].double(), value.double(), atol=1e-5)
        for name, value in weights_of(private.model).items()
    )
    assert private.optimizer.diagnostics.examples > STEPS


def test_a_loss_scale_is_taken_out_before_clipping(package: ModuleType, tmp_path: Path) -> None:
    private = a_run()
    fitted(package, tmp_path, private, plugins=[half_precision(package)])
    assert private.optimizer.steps_taken == STEPS
    exact, rough = plainly(a_run()), weights_of(private.model)
    assert all(torch.allclose(exact[name], rough[name], atol=0.01) for name in exact)


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("saved_at", [2, 3])  # in the middle and at the end of a pass
def test_a_checkpoint_carries_ledger_and_place(package: ModuleType, tmp_path: Path, saved_at: int) -> None:
    whole = plainly(a_run())
    first = a_run()
    checkpoints = importlib.import_module(f"{package.__name__}.callbacks").ModelCheckpoint
    keep = checkpoints(dirpath=tmp_path, filename="{step}", every_n_train_steps=saved_at, save_top_k=-1)
    fit = fitted(package, tmp_path, first, keep, enable_checkpointing=True)

    second = a_run()
    fit = fitted(package, tmp_path, second, ckpt=tmp_path / f"step={saved_at}.ckpt")
    assert second.optimizer.steps_taken == STEPS == fit.global_step
    assert second.optimizer.epsilon(DELTA) == first.optimizer.epsilon(DELTA)
    assert same(weights_of(second.model), whole)


def test_a_checkpoint_of_plain_training_is_refused(package: ModuleType, tmp_path: Path) -> None:
    class Plain(classifier(package, a_run()).__class__):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network(torch.float32)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    fit = trainer(package, tmp_path)
    fit.fit(Plain(), held_out())
    fit.save_checkpoint(tmp_path / "plain.ckpt")
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    private = a_run()
    with pytest.raises(CheckpointError, match="no ledger"):
        fitted(package, tmp_path, private, ckpt=tmp_path / "plain.ckpt")
    with pytest.raises(KeyError, match="only the model"):
        fitted(package, tmp_path, private, ckpt=tmp_path / "weights.ckpt")
    assert private.optimizer.ledger.releases == 0


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        ({"overfit_batches": 2}, "overfit_batches=2"),
        ({"strategy": "ddp"}, "DDPStrategy"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    package: ModuleType, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    private = a_run()
    before = weights_of(private.model)
    with pytest.raises(ParameterError, match=words):
        fitted(package, tmp_path, private, **settings)
    assert private.optimizer.ledger.releases == 0
    assert same(weights_of(private.model), before)


def test_another_optimizer_is_refused(package: ModuleType, tmp_path: Path) -> None:
    private = a_run()
    other = classifier(package, private, optimizer=torch.optim.Adam(private.model.parameters()))
    with pytest.raises(WrapError, match=r"Adam.*Return private\.optimizer"):
        fitted(package, tmp_path, private, module=other)


def test_another_loader_is_refused(package: ModuleType, tmp_path: Path) -> None:
    private = a_run()
    with pytest.raises(WrapError, match=r"DataLoader.*callback\.loader"):
        fitted(package, tmp_path, private, loader=held_out())
    assert private.optimizer.ledger.releases == 0


def test_a_module_without_the_private_model_is_refused(package: ModuleType, tmp_path: Path) -> None:
    private = a_run()
    module = classifier(package, private)
    module.net = nn.Linear(3, 2)
    with pytest.raises(WrapError, match="not a part of Classifier"):
        fitted(package, tmp_path, private, module=module)


def test_manual_optimization_is_refused(package: ModuleType, tmp_path: Path) -> None:
    private = a_run()
    module = classifier(package, private)
    module.automatic_optimization = False
    with pytest.raises(ParameterError, match="automatic_optimization=False"):
        fitted(package, tmp_path, private, module=module)


def test_batches_in_parts_with_a_loss_scale_are_refused(package: ModuleType, tmp_path: Path) -> None:
    private = a_run(max_physical_batch_size=2)
    with pytest.raises(ParameterError, match="max_physical_batch_size=2"):
        fitted(package, tmp_path, private, plugins=[half_precision(package)])
    assert private.optimizer.ledger.releases == 0


def test_a_step_that_returns_no_loss_is_refused(package: ModuleType, tmp_path: Path) -> None:
    private = a_run(batch_size=12)
    module = classifier(package, private)
    module.training_step = lambda batch, batch_idx: None
    with pytest.raises(StepError, match="before backward"):
        fitted(package, tmp_path, private, module=module)
    assert private.optimizer.ledger.releases == 0


def test_the_callback_takes_what_make_private_returned_only() -> None:
    pytest.importorskip("lightning")
    with pytest.raises(WrapError, match="make_private"):
        private_training(network(), delta=DELTA)  # type: ignore[arg-type]
