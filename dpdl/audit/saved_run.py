"""A run that `dpdl train` wrote, read back for an audit: its weights, data and claim, and its training done again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import accountants
from accountants import NeighboringRelation
from dpdl.checkpoint_format import read_tree
from dpdl.data import ImageData, load
from dpdl.errors import CheckpointError, ParameterError
from dpdl.execution import Execution
from dpdl.models import build_model
from dpdl.plan import PrivacyPlan
from dpdl.private import make_private
from dpdl.training import CHECKPOINT, REPORT, WEIGHTS, Settings

__all__ = ["SavedRun", "TrainAgain", "read_run"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedRun:
    """What a run directory holds.

    Attributes:
        directory: where.
        settings: as it was asked for; with a seed, the audit is of a run whose noise anybody can subtract.
        plan: with the noise that was computed, and the steps that were taken.
        delta: of its claim.
        data: read again from where it was read then.
        model: with the saved weights, in eval mode.
    """

    directory: Path
    settings: Settings
    plan: PrivacyPlan
    delta: float
    data: ImageData
    model: nn.Module

    def epsilon(self, relation: NeighboringRelation) -> float:
        """The upper bound at `delta` for a neighbouring relation; infinite where there is no noise."""
        if self.plan.noise_multiplier == 0:
            return math.inf
        return accountants.epsilon(
            noise_multiplier=self.plan.noise_multiplier,
            sample_rate=self.plan.sample_rate,
            steps=self.plan.steps,
            delta=self.delta,
            relation=relation,
        )

    @property
    def members(self) -> tuple[Tensor, Tensor]:
        """Training images and labels, as the model takes them."""
        return self._prepared(self.data.train_images), self.data.train_labels

    @property
    def non_members(self) -> tuple[Tensor, Tensor]:
        """Test images and labels, as the model takes them."""
        return self._prepared(self.data.test_images), self.data.test_labels

    @property
    def train_again(self) -> TrainAgain:
        """Its training, for other examples."""
        channels, height, width = self.data.train_images.shape[1:]
        return TrainAgain(self.settings, self.plan, (channels, height, width), len(self.data.classes))

    def _prepared(self, images: Tensor) -> Tensor:
        return images * 2 - 1 if self.settings.centred else images


@dataclass(frozen=True)
class TrainAgain:
    """The mechanism of a saved run, on any examples: same sampling rate, steps and noise, whatever their number.

    Only the divisor of the noisy sum follows the number of examples, which a plan takes for public.
    """

    settings: Settings
    plan: PrivacyPlan
    image_shape: tuple[int, int, int]
    classes: int

    def new_model(self) -> nn.Module:
        """The network, freshly initialised."""
        channels, height, width = self.image_shape
        return build_model(
            self.settings.model, in_channels=channels, image_size=(height, width), classes=self.classes
        ).to(self.settings.device)

    def __call__(self, inputs: Tensor, labels: Tensor, number: int) -> nn.Module:
        """A model, trained privately on these examples, with averaged weights if the run had those."""
        model = self.new_model()
        return self.train(model, TensorDataset(inputs, labels))

    def train(self, model: nn.Module, dataset: Dataset[Any]) -> nn.Module:
        """Train this very module; returns it, or the moving average of its weights."""
        settings = self.settings
        size = len(dataset)  # type: ignore[arg-type]  # in memory
        rate, steps = self.plan.sample_rate, self.plan.steps
        loader = DataLoader(dataset, batch_size=max(1, round(rate * size)), shuffle=True)
        plan = replace(self.plan, expected_batch_size=rate * size, dataset_size=None)
        plain = (
            torch.optim.Adam(model.parameters(), lr=settings.lr)
            if settings.optimizer == "adam"
            else torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
        )
        execution = Execution(engine=settings.engine, max_physical_batch_size=settings.max_physical_batch_size)
        private, optimizer, private_loader = make_private(model, plain, loader, plan, execution=execution)
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps if settings.lr_schedule == "linear" else 1.0)
        averaged = None
        if settings.averaging:
            averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.averaging))
        while optimizer.steps_taken < steps:
            for x, y in private_loader:
                before = optimizer.steps_taken
                optimizer.zero_grad()
                F.cross_entropy(private(_on(settings.device, x)), y.to(settings.device)).backward()
                optimizer.step()
                if optimizer.steps_taken > before:  # not so after the first parts of a large logical batch
                    scheduler.step()
                    if averaged is not None:
                        averaged.update_parameters(model)
        return model if averaged is None else averaged.module


def read_run(directory: Path, *, data_path: str | None = None) -> SavedRun:
    """Read what `dpdl train --output directory` wrote.

    Args:
        directory: of the run.
        data_path: where its data is, if not where it was read then.

    Returns:
        The run.

    Raises:
        CheckpointError: a file is missing, damaged, or of another data set.
        DataError: the data is not there any more.
    """
    for name in (REPORT, CHECKPOINT, WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"There is no run in {directory}: {name} is missing. Make one: dpdl train --output {directory}"
            )
    report = _report(directory / REPORT)
    extra = read_tree(directory / CHECKPOINT, named=directory / CHECKPOINT).get("extra")
    if not isinstance(extra, dict) or not {"settings", "data", "data_path"} <= extra.keys():
        raise CheckpointError(f"{directory / CHECKPOINT} is not of dpdl train. Audit the folder that it wrote.")
    settings = Settings.from_json(extra["settings"])
    data = load(data_path or extra["data_path"])
    if data.name != extra["data"]:
        raise CheckpointError(
            f"The run in {directory} was trained on {extra['data']}, but {data.source} is {data.name}."
        )
    plan, delta = _claimed(directory / REPORT, report, size=len(data.train_images))
    channels, height, width = data.train_images.shape[1:]
    model = TrainAgain(settings, plan, (channels, height, width), len(data.classes)).new_model()
    weights = read_tree(directory / WEIGHTS, named=directory / WEIGHTS)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:  # other names or shapes; no names at all
        raise CheckpointError(
            f"{directory / WEIGHTS} is not of the network that the run says it trained, {settings.model}. Audit the "
            "folder as dpdl train wrote it."
        ) from error
    model.eval()
    return SavedRun(directory=directory, settings=settings, plan=plan, delta=delta, data=data, model=model)


def _claimed(path: Path, report: dict[str, Any], *, size: int) -> tuple[PrivacyPlan, float]:
    """The plan, with the steps that were taken, and delta."""
    try:
        if report["steps"] == 0:
            raise ParameterError("it took no steps: nothing was released.")
        plan = PrivacyPlan(
            sample_rate=report["sample_rate"],
            expected_batch_size=report["expected_batch_size"],
            steps=report["steps"],
            noise_multiplier=report["noise_multiplier"],
            max_grad_norm=math.inf if report["max_grad_norm"] == "inf" else report["max_grad_norm"],
            dataset_size=size,
        )
        return plan, accountants.arguments.delta(report["delta"])
    except (ParameterError, OverflowError) as error:  # a whole number that no double holds
        raise CheckpointError(f"{path} is not the report of a run that can be audited: {error}") from error


def _on(device: str, inputs: Any) -> Any:
    return inputs.to(device) if isinstance(inputs, Tensor) else [part.to(device) for part in inputs]


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, too
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(report, dict):
        raise CheckpointError(f"{path} is not the report of a training run: it is no object.")
    needed = ("sample_rate", "expected_batch_size", "steps", "noise_multiplier", "max_grad_norm", "delta")
    missing = [name for name in needed if name not in report]
    if missing:
        raise CheckpointError(f"{path} is not the report of a training run: it has no {', '.join(missing)}.")
    found: dict[str, Any] = report
    return found
