"""A complete private training run on images: settings in, weights, history and report out.

This is what `dpdl train` and the accuracy benchmarks call. The loop in `_train_pass` is the one that a
user of the library writes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from dpdl.checkpoint import load_checkpoint, save_checkpoint
from dpdl.data import ImageData
from dpdl.errors import CheckpointError, ParameterError
from dpdl.execution import EngineName, Execution
from dpdl.models import build_model
from dpdl.optim import PrivateOptimizer
from dpdl.plan import PrivacyPlan
from dpdl.privacy_report import PrivacyReport
from dpdl.private import Private, make_private

__all__ = ["HistoryPoint", "Settings", "TrainingResult", "train"]

OptimizerName = Literal["sgd", "adam"]
LrSchedule = Literal["constant", "linear"]

EVALUATION_BATCH = 1000  # examples; bounds memory, changes nothing else
HISTORY_POINTS = 50  # times that accuracy and epsilon are looked at, besides after each pass

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.pt"
REPORT = "report.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a training run depends on, besides its data.

    Attributes:
        model: a name that `dpdl.models.build_model` knows.
        centred: whether pixels are mapped from [0, 1] to [-1, 1], in training and testing; the saved weights
            then expect that. The map is fixed, so it tells nothing of the data.
        epochs: passes over the data, in expectation.
        batch_size: expected examples in a logical batch.
        epsilon: the budget from which the noise is computed; or
        noise_multiplier: the noise itself. One of the two is None.
        delta: at which epsilon is computed and reported.
        max_grad_norm: C.
        optimizer, lr, momentum: of the optimizer; momentum is SGD's.
        lr_schedule: "constant", or "linear" from lr to 0 over the planned steps.
        averaging: decay of an exponential moving average of the weights over steps, which is then what is
            tested and saved; 0 for none. It is computed from released weights, at no cost in privacy.
        engine, max_physical_batch_size: as in `Execution`.
        insecure_seed: reproducible noise and sampling, for research only; also seeds the initial weights.
        device: where to train.
    """

    model: str = "auto"
    centred: bool = False
    epochs: int = 30
    batch_size: int = 256
    epsilon: float | None = 3.0
    noise_multiplier: float | None = None
    delta: float = 1e-5
    max_grad_norm: float = 0.1
    optimizer: OptimizerName = "sgd"
    lr: float = 0.5
    momentum: float = 0.9
    lr_schedule: LrSchedule = "constant"
    averaging: float = 0.0
    engine: EngineName = "auto"
    max_physical_batch_size: int | None = None
    insecure_seed: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise ParameterError(f"optimizer must be one of {get_args(OptimizerName)}, got {self.optimizer!r}.")
        if self.lr_schedule not in get_args(LrSchedule):
            raise ParameterError(f"lr_schedule must be one of {get_args(LrSchedule)}, got {self.lr_schedule!r}.")
        if not self.lr > 0:
            raise ParameterError(f"lr must be > 0, got {self.lr}.")
        if not 0 <= self.momentum < 1:
            raise ParameterError(f"momentum must be in [0, 1), got {self.momentum}.")
        if not 0 <= self.averaging < 1:
            raise ParameterError(f"averaging must be in [0, 1), got {self.averaging}.")
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ParameterError(f"batch_size must be a positive integer, got {self.batch_size!r}.")

    def to_json(self) -> str:
        """The settings as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings that `to_json` wrote.

        Raises:
            CheckpointError: fields are missing or unknown.
        """
        values = json.loads(text)
        if set(values) != {f.name for f in fields(cls)}:
            raise CheckpointError("The saved settings are of another version; they cannot be resumed.")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class HistoryPoint:
    """Where a run was after `step` steps.

    Attributes:
        step: noisy releases so far.
        epsilon: upper bound at the settings' delta.
        test_accuracy: fraction of test images classified rightly, of the weights at that step.
    """

    step: int
    epsilon: float
    test_accuracy: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run ended with.

    Attributes:
        settings: as it was asked for.
        plan: with the noise that was computed.
        report: the claim.
        history: over the steps; its last point is the end.
        completed: False if the run was stopped, and can be resumed.
        engine: what computed the gradients.
        seconds: spent training, in this process.
        test_images: how many the accuracy is of.
    """

    settings: Settings
    plan: PrivacyPlan
    report: PrivacyReport
    history: tuple[HistoryPoint, ...]
    completed: bool
    engine: str | None
    seconds: float
    test_images: int

    def to_dict(self) -> dict[str, Any]:
        """The report with what was trained, as plain values; an infinite number is the string "inf"."""
        return {
            **self.report.to_dict(),
            "training": {
                "settings": _without_infinity(self.settings),
                "completed": self.completed,
                "engine": self.engine,
                "seconds": round(self.seconds, 1),
                "test_accuracy": self.history[-1].test_accuracy if self.history else None,
                "test_images": self.test_images,
                "history": [_without_infinity(point) for point in self.history],
                "remark": "test images are not covered by the guarantee; their accuracy is published without noise",
            },
        }


def _without_infinity(values: Settings | HistoryPoint) -> dict[str, Any]:
    """As plain values that JSON has."""
    return {name: "inf" if value == math.inf else value for name, value in asdict(values).items()}


class Observer:
    """Told how a run goes; does nothing by itself."""

    def started(self, plan: PrivacyPlan, step: int) -> None:
        """The plan is made; `step` steps were taken before (in a resumed run)."""

    def stepped(self, step: int) -> None:
        """A release has happened."""

    def looked(self, point: HistoryPoint) -> None:
        """Accuracy and epsilon were computed."""


def train(
    settings: Settings,
    data: ImageData,
    *,
    output: Path,
    data_path: str | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train privately, write weights and report to `output`, and save state after each pass.

    Args:
        settings: what to train.
        data: on what.
        output: a directory; made if need be.
        data_path: where the data was read from, kept for resuming.
        resume: go on from the state in `output`.
        observer: told of progress.
        stop: asked after each step; when it answers True the state is saved and the run ends early.

    Raises:
        CheckpointError: there is nothing to resume, or it is of other settings.
        ParameterError: a setting is out of range.
    """
    observer = observer or Observer()
    output.mkdir(parents=True, exist_ok=True)
    if settings.insecure_seed is not None:
        torch.manual_seed(settings.insecure_seed)
    private = _private_run(settings, data)
    scheduler = _scheduler(settings, private.optimizer)
    averaged = AveragedModel(private.model, multi_avg_fn=get_ema_multi_avg_fn(settings.averaging))
    history: list[HistoryPoint] = []
    if resume:
        extra = load_checkpoint(output / CHECKPOINT, private.model, private.optimizer, scheduler=scheduler)
        if Settings.from_json(extra["settings"]) != settings or extra["data"] != data.name:
            raise CheckpointError(f"The run in {output} has other settings or data. Resume it with its own.")
        history = [HistoryPoint(**point) for point in extra["history"]]
        averaged.load_state_dict(extra["averaged"])

    plan = private.optimizer.plan
    observer.started(plan, private.optimizer.steps_taken)
    began = time.monotonic()
    run = _Run(private, scheduler, averaged, settings, data, history, observer)
    while not run.finished and not stop():
        run.train_pass(stop)
        run.look()
        save_checkpoint(
            output / CHECKPOINT,
            private.model,
            private.optimizer,
            scheduler=scheduler,
            extra={
                "settings": settings.to_json(),
                "data": data.name,
                "data_path": data_path,
                "history": [asdict(point) for point in history],
                "averaged": averaged.state_dict(),
            },
        )
    result = TrainingResult(
        settings=settings,
        plan=plan,
        report=private.optimizer.report(settings.delta),
        history=tuple(history),
        completed=run.finished,
        engine=private.model.engine_name,
        seconds=time.monotonic() - began,
        test_images=len(data.test_labels),
    )
    with (output / WEIGHTS).open("wb") as file:  # given a path, torch has an error of its own for a full disk
        torch.save(averaged.module.state_dict(), file)
    (output / REPORT).write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n")
    return result


class _Run:
    """One run under way."""

    def __init__(
        self,
        private: Private,
        scheduler: LRScheduler,
        averaged: AveragedModel,
        settings: Settings,
        data: ImageData,
        history: list[HistoryPoint],
        observer: Observer,
    ) -> None:
        self.model, self.optimizer, self.loader = private
        self.scheduler = scheduler
        self.averaged = averaged
        self.delta = settings.delta
        self.device = torch.device(settings.device)
        self.test_images, self.test_labels = _prepared(data.test_images, settings), data.test_labels
        self.history = history
        self.observer = observer
        self.look_every = max(1, self.optimizer.plan.steps // HISTORY_POINTS)

    @property
    def finished(self) -> bool:
        """Whether the plan's steps are all taken."""
        return self.optimizer.steps_taken >= self.optimizer.plan.steps

    def train_pass(self, stop: Callable[[], bool]) -> None:
        """One pass over the private loader, or as much of it as `stop` allows."""
        self.model.train()
        for images, labels in self.loader:
            before = self.optimizer.steps_taken
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images.to(self.device)), labels.to(self.device)).backward()
            self.optimizer.step()
            if self.optimizer.steps_taken > before:  # not so after the first parts of a large logical batch
                self.scheduler.step()
                self.averaged.update_parameters(self.model)
                self.observer.stepped(self.optimizer.steps_taken)
                if self.optimizer.steps_taken % self.look_every == 0:
                    self.look()
                if stop():
                    return

    def look(self) -> None:
        """Compute accuracy and epsilon, once a step at most."""
        step = self.optimizer.steps_taken
        if self.history and self.history[-1].step == step:
            return
        accuracy = accuracy_of(self.averaged.module, self.test_images, self.test_labels, device=self.device)
        point = HistoryPoint(step=step, epsilon=self.optimizer.epsilon(self.delta), test_accuracy=accuracy)
        self.history.append(point)
        self.observer.looked(point)


def _private_run(settings: Settings, data: ImageData) -> Private:
    loader = DataLoader(
        TensorDataset(_prepared(data.train_images, settings), data.train_labels),
        batch_size=settings.batch_size,
        shuffle=True,
    )
    plan = PrivacyPlan.for_loader(
        loader,
        epochs=settings.epochs,
        epsilon=settings.epsilon,
        delta=None if settings.epsilon is None else settings.delta,
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
    )
    channels, height, width = data.train_images.shape[1:]
    model = build_model(settings.model, in_channels=channels, image_size=(height, width), classes=len(data.classes)).to(
        settings.device
    )
    execution = Execution(
        engine=settings.engine,
        max_physical_batch_size=settings.max_physical_batch_size,
        insecure_seed=settings.insecure_seed,
    )
    return make_private(model, _optimizer(settings, model), loader, plan, execution=execution)


def _optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=settings.lr)
    return torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)


def _prepared(images: Tensor, settings: Settings) -> Tensor:
    return images * 2 - 1 if settings.centred else images


def _scheduler(settings: Settings, optimizer: PrivateOptimizer) -> LRScheduler:
    steps = optimizer.plan.steps
    if settings.lr_schedule == "linear":
        return LambdaLR(optimizer, lambda step: 1 - step / steps)
    return LambdaLR(optimizer, lambda step: 1.0)


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor, *, device: torch.device) -> float:
    """Fraction of images [N, C, H, W] that the model, in eval mode, gives their label [N]."""
    was_training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(labels), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            right += int((model(images[rows].to(device)).argmax(1).cpu() == labels[rows]).sum())
    model.train(was_training)
    return right / len(labels)
